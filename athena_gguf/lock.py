"""A folder that one process at a time works in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from athena_gguf import progress
from athena_gguf.errors import AthenaError


@contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Make `folder` and hold it (where the platform has flock), after any other process that does.

    Raises AthenaError naming the command line's `option` for another folder if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise AthenaError(f"{folder}: {error.strerror}; choose another folder with {option}") from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"waiting for another process that works in {folder}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
