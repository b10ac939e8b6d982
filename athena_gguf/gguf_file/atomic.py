"""A file appears whole or not at all, and what a killed process leaves is removed by the next one."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from athena_gguf.errors import AthenaError

_FILE, _FOLDER = ".part", ".work"  # endings of temporary names


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise AthenaError if the disk of `folder` has fewer than `needed` bytes free for `what`."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise AthenaError(f"{folder}: {error.strerror}") from error
    if free < needed:
        mib = 1024 * 1024
        raise AthenaError(
            f"{what} needs {needed / mib:.1f} MiB in {folder}, which has {free / mib:.1f} MiB free; make room or "
            "choose another place"
        )


def require_no_input(out: Path, inputs: Iterable[Path]) -> None:
    """Raise AthenaError if the file `out` would replace one of `inputs`, whatever either is called (links)."""
    for path in inputs:
        linked = os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path)
        if linked or os.path.realpath(out) == os.path.realpath(path):
            same = "" if os.path.abspath(out) == os.path.abspath(path) else f" (it is {path})"
            raise AthenaError(f"{out} is an input of this conversion{same}; write the result elsewhere")


def _prefix(target: Path) -> str:
    return f".{target.name[:200]}."


def _hold(path: Path) -> int | None:
    """A handle that holds the lock of a file or folder, None where the platform has none. The lock goes with the
    process, however it ends. Raises FileNotFoundError if the path was removed before it could be held."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    if not path.exists():
        os.close(handle)
        raise FileNotFoundError(path)
    return handle


def remove_abandoned(target: Path) -> None:
    """Remove what processes that are no more have left beside `target` while they made it."""
    _remove_abandoned(target.parent, glob.escape(_prefix(target)))


def remove_all_abandoned(folder: Path) -> None:
    """The same for every name in `folder`."""
    _remove_abandoned(folder, ".")


def _remove_abandoned(folder: Path, prefix: str) -> None:
    try:
        import fcntl
    except ImportError:
        return
    for ending in (_FILE, _FOLDER):
        for path in folder.glob(prefix + "*" + ending):
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            except OSError:  # held by its maker, or not ours to remove
                pass
            finally:
                os.close(handle)


@contextmanager
def _made(target: Path, make: Callable[[], str]) -> Iterator[Path]:
    """What `make` makes beside `target`, held until the block ends."""
    try:
        remove_abandoned(target)
        while True:
            path = Path(make())
            try:
                handle = _hold(path)
                break
            except FileNotFoundError:  # another process took it for abandoned before it was held
                continue
    except OSError as error:
        raise AthenaError(f"{target} cannot be written: {error.strerror}") from error
    try:
        yield path
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder for the time of the block in the folder of `target`, where there is room for the work on it."""

    def make() -> str:
        return tempfile.mkdtemp(prefix=_prefix(target), suffix=_FOLDER, dir=target.parent)

    with _made(target, make) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_beside(target: Path, sync: bool = True) -> Iterator[Path]:
    """The name of a new empty file in the folder of `target`, which replaces it on success and is removed otherwise.

    `sync`: wait until it is on the disk first, so that it is whole after a loss of power too. Where the process is
    killed in between, a file called `.NAME.*.part` stays, which the next one that writes `target` removes.
    """
    if target.exists() and not target.is_file():
        raise AthenaError(f"{target} is no regular file; choose another name")

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=_FILE, dir=target.parent)
        os.close(handle)
        return name

    with _made(target, make) as temporary:
        try:
            yield temporary
            if sync:
                to_disk(temporary)
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)  # mkstemp made it private
            os.replace(temporary, target)
        except OSError as error:
            raise AthenaError(f"{target} cannot be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Return when what was written to the file is on the disk. Raises OSError if it cannot be brought there."""
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `target` when the block ends without an exception."""
    with temporary_beside(target) as temporary, open(temporary, "wb") as out:
        yield out
