"""What a long command is doing, on stderr: progress bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 20.0  # between two plain lines of one bar

Advance = Callable[[float], None]


def note(text: str) -> None:
    """One line."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A step of unknown length: its name when it starts, the seconds it took when it ends."""
    start = time.monotonic()
    if not sys.stderr.isatty():
        note(f"{name} ...")
        yield
    else:
        from rich.console import Console

        with Console(stderr=True).status(name):
            yield
    note(f"{name}: {time.monotonic() - start:.1f} s")


@contextmanager
def bar(name: str, total: float) -> Iterator[Advance]:
    """A step of `total` units; call what this yields with the units done since the last call."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        clock = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *clock, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda units: progress.advance(task, units)
    else:
        note(f"{name} ...")
        yield _plain_lines(name, total, start)
    note(f"{name}: {time.monotonic() - start:.1f} s")


def _plain_lines(name: str, total: float, start: float) -> Advance:
    done, spoken = 0.0, start

    def advance(units: float) -> None:
        nonlocal done, spoken
        done += units
        now = time.monotonic()
        if now - spoken >= _LINE_SECONDS and 0 < done < total:
            spoken = now
            left = (now - start) * (total - done) / done
            note(f"{name}: {100 * done / total:.0f}% after {now - start:.0f} s, about {left:.0f} s left")

    return advance
