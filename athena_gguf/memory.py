"""Processors and memory of this machine, and the C library's allocator, told to keep what was freed."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from athena_gguf.errors import AthenaError

# Parameters of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_TURN = 2e-4  # seconds until a thread that runs Python lets another one do so


def keep_freed_memory() -> None:
    """Have malloc reuse large blocks instead of returning them to the system at every free.

    Tensors of some megabytes come and go many times a second here, and each would be mapped, cleared and unmapped
    again: a tenth of the time of a calibration. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that some versions take
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns more often: one that hands a GPU its work does so in thousands of short calls, and another
    one that compiles, or reads, must not stop it for long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def host_bytes() -> int:
    """Memory that can be had without swapping; half of all, or 4 GiB, where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):
        if not hasattr(os, "sysconf"):  # Windows
            return 4 << 30
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextmanager
def shortage_explained(what: str) -> Iterator[None]:
    """Turn a failed request for the host's memory into an AthenaError that names `what` was done."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        said = str(error).strip().splitlines()
        more = f" ({said[0][:200]})" if said else ""
        raise AthenaError(
            f"{what}: not enough memory{more}; close other programs, raise the limit, or give less with "
            "--host-memory. The same command goes on where this one stopped if it has a --work-dir"
        ) from error


def is_shortage(error: Exception) -> bool:
    """Whether this is what Python, torch or a thread without room for its stack raises when memory is short."""
    signs = ["can't allocate memory", "can't start new thread", "Cannot allocate memory", "bad_alloc"]
    signs += ["could not create a primitive", "failed to map segment"]  # of oneDNN, and of what loads libraries
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
