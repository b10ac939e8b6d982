"""A file appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from athena_gguf.errors import AthenaError


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


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """The name of a new empty file in the folder of `target`, which replaces it on success and is removed otherwise."""
    if target.exists() and not target.is_file():
        raise AthenaError(f"{target} is no regular file; choose another name")
    try:
        handle, name = tempfile.mkstemp(prefix=".athena-", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise AthenaError(f"{target} cannot be written: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp made it private
        os.replace(temporary, target)
    except OSError as error:
        raise AthenaError(f"{target} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `target` when the block ends without an exception."""
    with temporary_beside(target) as temporary, open(temporary, "wb") as out:
        yield out
