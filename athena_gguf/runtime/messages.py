"""What a llama.cpp tool complains about."""

import re

_STAMP = re.compile(r"^[\d.]+ (?P<level>[A-Z]) ")  # time and level that the tools put before a line


def complaint(said: str) -> str:
    """The first error line of a tool's log, without its time stamp; else the first that looks like one; else the last.

    The first error is the cause; what follows is only where it was noticed.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if (match := _STAMP.match(line)) and match["level"] == "E"]
    suspects = [line for line in lines if re.search(r"error|fail|invalid", line, re.IGNORECASE)]
    return _STAMP.sub("", (errors or suspects or lines[-1:] or ["it said nothing"])[0])
