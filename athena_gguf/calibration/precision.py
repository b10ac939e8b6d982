"""How products are computed while the curvature is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def measuring(beside: torch.device | None = None) -> Iterator[None]:
    """Products of bfloat16 numbers (TF32 on a GPU) with sums in float32, where the processor has them: twice as fast,
    and accurate enough for a sum over many tokens. Not for encoding, nor for single tokens, whose products take
    gigabytes then. All processors take part.

    The precision is the whole process's: `beside` names the device where it works beside an encoding. On a GPU it then
    stays as it is, since the encoding would have it or not as time will have it; on a CPU they take turns.
    """
    import torch

    from athena_gguf.memory import cores

    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    if beside is None or beside.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(max(threads, cores()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
