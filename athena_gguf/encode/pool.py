"""Spreads the encoding of tensors over CPU threads, in pieces of rows, or feeds them to a GPU one after the other.

On the CPU every piece is computed by one thread with single-threaded algebra, and the cut into pieces does not depend
on the number of threads: neither does the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from athena_gguf.encode.matrix import Encoded, EncodedRows, EncodeOptions, encode_each
from athena_gguf.encode.metric import Metric
from athena_gguf.format import AType

if TYPE_CHECKING:
    import torch

PIECE = 256  # rows
GPU_PIECE = 1 << 26  # weights, of about 40 bytes on the device


class EncodePool:
    """Use as a context manager; leaving it cancels what has not started."""

    def __init__(
        self, options: EncodeOptions, threads: int, device: torch.device | str = "cpu", own_stream: bool = False
    ) -> None:
        """`own_stream`: of a GPU, beside other work there. Raises AthenaError if the device is a GPU for which kernels
        cannot be made."""
        import torch

        self.options, self.threads, self.gpu = options, threads, torch.device(device).type == "cuda"
        self.stream = torch.cuda.Stream(device) if own_stream else None
        # The initializer runs in every worker thread: torch's thread count is kept per thread.
        self.executor = ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(1,))
        self.workers = self.executor
        if self.gpu:
            from athena_gguf.encode.cuda.launch import require_cuda

            require_cuda()
            # One thread hands the device its work; others would only take turns with it.
            self.workers = ThreadPoolExecutor(1, "encode on the GPU")

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
        self.workers.shutdown(wait=True, cancel_futures=True)

    def submit(self, weight: torch.Tensor, metric: Metric, kind: AType) -> Callable[[], Encoded]:
        """Start encoding `weight` [rows, columns], metric on the pool's device; the result's call waits for it."""
        together = self.submit_together([weight], metric, kind)
        return lambda: together()[0]

    def submit_together(
        self, weights: Sequence[torch.Tensor], metric: Metric, kind: AType
    ) -> Callable[[], list[Encoded]]:
        """As `submit`, of several weights as one, which keeps a GPU busier than one after the other."""
        import torch

        from athena_gguf.encode.passes import feedback_pass, sweep

        lengths = [len(weight) for weight in weights]
        ends = np.cumsum(lengths)
        rows, columns = int(ends[-1]), weights[0].shape[1]
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        piece, ready = PIECE, None
        if self.gpu:
            piece = -(-rows // -(-rows * columns // GPU_PIECE))
            ready = mark(metric.device)
        else:
            feedback_pass(kind)  # made here: workers that ask for them at once would each compile their own
            sweep(kind)
        pieces: list[Future[EncodedRows]] = [
            self.workers.submit(self._encode, weight[a : a + piece], metric, kind, ready) for a in range(0, rows, piece)
        ]

        def result() -> list[Encoded]:
            parts = [p.result() for p in pieces]
            found = EncodedRows(*(np.concatenate([getattr(p, of) for p in parts]) for of in ("data", "loss", "power")))
            return [found.total(end - length, end) for end, length in zip(ends, lengths, strict=True)]

        return result

    def _encode(self, weight: torch.Tensor, metric: Metric, kind: AType, ready: torch.cuda.Event | None) -> EncodedRows:
        import torch

        if ready is None:
            return encode_each(weight, metric, kind, self.options, self.gpu)
        with torch.cuda.device(metric.device), torch.cuda.stream(self.stream):
            ready.wait()
            return encode_each(weight, metric, kind, self.options, self.gpu)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """What this thread's stream has to do until now on a GPU, for other streams to wait for; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
