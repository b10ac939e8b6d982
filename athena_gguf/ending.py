"""How a process ended, in words."""

import signal


def how_it_ended(code: int) -> str:
    """For the exit code that `subprocess` gives, below zero for a signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
