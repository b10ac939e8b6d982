"""Products and settings of torch on a GPU: bfloat16 numbers with sums in float32, the same bits every time, and too
little memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from athena_gguf import progress
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@cache
def mixed(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices into float32 there."""
    import torch

    if device.type != "cuda":
        return False
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        total = torch.addmm(torch.ones(16, 16, device=device), one, one, out_dtype=torch.float32)
        return bool((total == 17).all()) and torch.bmm(one[None], one[None], out_dtype=torch.float32).shape[0] == 1
    except (RuntimeError, TypeError):
        return False


def prepare_to_repeat() -> None:
    """Before the first product on a GPU of this process: torch takes its deterministic algorithms only where this
    variable is set for cuBLAS. torch's workspace is 32 MiB a stream then, as on an H100 anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _can_repeat()


@cache
def _can_repeat() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    with _deterministic():
        try:
            torch.ones(2, 2, device="cuda").mm(torch.ones(2, 2, device="cuda"))
        except RuntimeError:  # cuBLAS was in use before `prepare_to_repeat`
            return False
    return True


@contextmanager
def repeatable() -> Iterator[None]:
    """Backward passes of attention on a GPU add up in an order that is always the same.

    Without this the kernels of torch (FlashAttention's, the memory-efficient ones) add to the queries' gradients in the
    order in which blocks of threads arrive. The setting is the whole process's; what else this package computes on a
    GPU takes the same algorithms with and without it. An operation that has no such algorithm raises, which `refused`
    tells from other errors. Does nothing without a GPU, or where cuBLAS was in use before `prepare_to_repeat`.
    """
    if not _can_repeat():
        yield
        return
    with _deterministic():
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    import torch

    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # of no use here, and slow
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def refused(error: Exception) -> bool:
    """Whether this is what torch raises inside `repeatable` for an operation that has no such algorithm."""
    return isinstance(error, RuntimeError) and "deterministic" in str(error).lower()


def repeated(work: Callable[[], T]) -> T:
    """What `work` gives, `repeatable` if its operations allow it; otherwise it is begun again."""
    try:
        with repeatable():
            return work()
    except RuntimeError as error:
        if not refused(error):
            raise
        warn(error)
    return work()


@contextmanager
def shortage_named(device: torch.device) -> Iterator[None]:
    """Turn a failed request for the memory of a GPU into an AthenaError that names it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AthenaError(
            f"{device}: its memory is too small: {error}; close what else runs there, change --gpu-memory, choose "
            "other GPUs with CUDA_VISIBLE_DEVICES, or use --device cpu"
        ) from error


def warn(error: Exception) -> None:
    """Say that an operation was `refused`."""
    progress.note(f"two conversions of this model may differ in their last bits: {str(error).partition(',')[0]}")
