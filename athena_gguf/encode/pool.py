"""Spreads the encoding of tensors over CPU threads, in pieces of rows.

Every piece is computed by one thread with single-threaded algebra, and the cut into pieces does not depend on the
number of threads: neither does the result.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from athena_gguf.encode.matrix import Encoded, EncodeOptions, encode_rows
from athena_gguf.encode.metric import Metric
from athena_gguf.format import AType

if TYPE_CHECKING:
    import torch

PIECE = 256  # rows


class EncodePool:
    """Use as a context manager; leaving it cancels what has not started."""

    def __init__(self, options: EncodeOptions, threads: int) -> None:
        import torch

        self.options = options
        # The initializer runs in every worker thread: torch's thread count is kept per thread.
        self.executor = ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> EncodePool:
        import torch

        # So does this thread: algebra that is shared with busy cores waits for them more than it gains.
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        torch.set_num_threads(self.before)
        self.executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, weight: torch.Tensor, metric: Metric, kind: AType) -> Callable[[], Encoded]:
        """Start encoding `weight` [rows, columns]; the result's call waits for it."""
        from athena_gguf.encode.passes import feedback_pass, sweep

        feedback_pass(kind)  # made here: workers that ask for them at once would each compile their own
        sweep(kind)
        pieces: list[Future[Encoded]] = [
            self.executor.submit(encode_rows, weight[a : a + PIECE], metric, kind, self.options)
            for a in range(0, len(weight), PIECE)
        ]

        def result() -> Encoded:
            parts = [p.result() for p in pieces]
            data = np.concatenate([p.data for p in parts])
            return Encoded(data, sum(p.loss for p in parts), sum(p.power for p in parts))

        return result
