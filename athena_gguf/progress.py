"""What a long command is doing, on stderr: progress bars on a terminal, plain lines elsewhere; or warnings only, or a
JSON object a line for programs (docs/scripting.md)."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Literal

Form = Literal["text", "quiet", "json"]
Advance = Callable[[float], None]

_LINE_SECONDS = 20.0  # between two plain lines of one bar
_TELLING = 0.05  # share done from which the time left is more than a guess: kernels are compiled at first
_EVENT_SECONDS = 1.0  # between two JSON lines of one bar
_WARNING = "warning: "
_form: Form = "text"
_shown: Any = None
_users = 0  # of the display that is shown
_showing = Lock()


def set_form(form: Form) -> None:
    """For the whole process. `quiet`: warnings only, `json`: everything, an object a line."""
    global _form
    _form = form


def form() -> Form:
    return _form


def note(text: str) -> None:
    """One line. In the quiet form only if it begins with "warning: "."""
    warning = text.startswith(_WARNING)
    if _form == "json":
        _event("warning" if warning else "note", text=text.removeprefix(_WARNING))
    elif _form == "text" or warning:
        print(text, file=sys.stderr, flush=True)


def error(text: str, code: int) -> None:
    """Why the command ends with the exit code `code`."""
    if _form == "json":
        _event("error", text=text, code=code)
        return
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error: {text}{plain}", file=sys.stderr, flush=True)


def interrupted(code: int) -> None:
    """The command ends because it was asked to."""
    if _form == "json":
        _event("error", text="interrupted", code=code)
    else:
        print("interrupted", file=sys.stderr, flush=True)


def drawn() -> bool:
    """Whether bars are drawn, on a terminal."""
    return _form == "text" and sys.stderr.isatty()


def tell(bar_name: str, text: str) -> None:
    """What the open bar of that name is at: in its text where it is drawn, a line elsewhere."""
    if not drawn():
        note(text)
        return
    with _showing:
        for task in _shown.tasks if _users else ():
            if task.description.startswith(bar_name):
                _shown.update(task.id, description=f"{bar_name}: {text}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A step of unknown length: its name when it starts, the seconds it took when it ends."""
    start = time.monotonic()
    if _form == "json":
        _event("start", stage=name)
        yield
    elif drawn():
        with _display() as display:
            task = display.add_task(name, total=None)
            try:
                yield
            finally:
                display.remove_task(task)
    else:
        note(f"{name} ...")
        yield
    _end(name, time.monotonic() - start)


class Stopwatch:
    """A clock, in seconds, that stands still for what is done in `paused`."""

    def __init__(self) -> None:
        self._paused = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start


@contextmanager
def bar(name: str, total: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """A step of `total` units; call what this yields with the units done since the last call. `clock`: of the seconds
    that it took, where other things are done in between."""
    start = clock()
    if _form == "json":
        _event("start", stage=name, total=total)
        yield _reports(total, clock, _EVENT_SECONDS, lambda done, s, left: _progress(name, done, total, s, left))
    elif drawn():
        with _display() as display:
            task = display.add_task(name, total=total)
            try:
                yield lambda units: display.advance(task, units)
            finally:
                display.remove_task(task)
    else:
        note(f"{name} ...")
        yield _reports(total, clock, _LINE_SECONDS, lambda done, s, left: _line(name, done / total, s, left))
    _end(name, clock() - start)


@contextmanager
def late_bar(name: str, total: float) -> Iterator[Advance]:
    """As `bar`, but the step begins with the first call of what this yields."""
    with ExitStack() as stack:
        begun: list[Advance] = []

        def advance(units: float) -> None:
            if not begun:
                begun.append(stack.enter_context(bar(name, total)))
            begun[0](units)

        yield advance


@contextmanager
def _display() -> Iterator[Any]:
    """The terminal's display of bars: one for all that are open, in whatever order they end and by whatever thread,
    since a terminal can have no other."""
    global _shown, _users
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with _showing:
        if not _users:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=False))
            clock = (TimeElapsedColumn(), TimeRemainingColumn())
            _shown = Progress(*columns, *clock, console=Console(stderr=True), transient=True)
            _shown.start()
        _users += 1
    try:
        yield _shown
    finally:
        with _showing:
            _users -= 1
            if not _users:
                _shown.stop()


def _end(name: str, seconds: float) -> None:
    if _form == "json":
        _event("end", stage=name, seconds=round(seconds, 3))
    else:
        note(f"{name}: {seconds:.1f} s")


def _reports(
    total: float, clock: Callable[[], float], pause: float, say: Callable[[float, float, float], None]
) -> Advance:
    """Calls `say` with the units done, the seconds that took and those left, at most once in `pause` seconds."""
    done, start = 0.0, clock()
    spoken = start

    def advance(units: float) -> None:
        nonlocal done, spoken
        done += units
        now = clock()
        if now - spoken >= pause and 0 < done < total:
            spoken = now
            say(done, now - start, (now - start) * (total - done) / done)

    return advance


def _line(name: str, share: float, seconds: float, left: float) -> None:
    told = f", about {left:.0f} s left" if share >= _TELLING else ""
    note(f"{name}: {100 * share:.0f}% after {seconds:.0f} s{told}")


def _progress(name: str, done: float, total: float, seconds: float, left: float) -> None:
    _event("progress", stage=name, done=done, total=total, seconds=round(seconds, 3), left=round(left, 1))


def _event(event: str, **content: object) -> None:
    line = {"time": round(time.time(), 3), "event": event} | content
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)
