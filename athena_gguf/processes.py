"""Processes of this package: how they are started, and how they ended, in words."""

import signal
import sys
from pathlib import Path

import athena_gguf


def command(module: str) -> list[str]:
    """Starts a process of `main()` of one of this package's modules; arguments may follow.

    Not with -m, which would import what lies in the current folder, be it the model's.
    """
    package = str(Path(athena_gguf.__file__).absolute().parent.parent)
    start = f"import sys; sys.path[:] = [*filter(None, sys.path), {package!r}]; from {module} import main; main()"
    return [sys.executable, "-c", start]


def how_it_ended(code: int) -> str:
    """For the exit code that `subprocess` gives, below zero for a signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
