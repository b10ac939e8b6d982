"""How products are computed while the curvature is measured."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def measuring() -> Iterator[None]:
    """Products of bfloat16 numbers (TF32 on a GPU) with sums in float32, where the processor has them: twice as fast,
    and accurate enough for a sum over many tokens. Not for encoding, nor for single tokens, whose products take
    gigabytes then. All processors take part. On a GPU sums are added in the same order every time, so that a
    measurement that is made again gives the same bits."""
    import torch

    from athena_gguf.memory import cores

    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(max(threads, cores()))
    try:
        with _same_every_time():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _same_every_time() -> Iterator[None]:
    import torch

    if not torch.cuda.is_available():
        yield
        return
    # cuBLAS asks for it where several streams are busy.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
            yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
