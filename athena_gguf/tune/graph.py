"""Gradients of a loss, on a GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Loss = Callable[["torch.Tensor"], "torch.Tensor"]


def gradients(loss: Loss, example: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Loss:
    """A function that adds the gradients of `loss(x)` to those of `parameters` and gives the loss.

    For x of the shape of `example`, on its device. On a GPU products are of bfloat16 numbers, where it has them, and
    the work is recorded once and played back, since Python takes several times as long to start the kernels of a small
    model as they run. A model that asks the GPU for a value on its way, so that nothing can be recorded, runs as
    without.
    """
    import torch

    device = example.device
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    mixed = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        # Nothing is kept of weights in bfloat16: what a recording keeps would be gone when it is played back.
        context: Any = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()
        with context:
            found = loss(x)
        found.backward()
        return found.detach()

    if device.type != "cuda":
        return run
    recorded = _record(run, example)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.zero_()
    return recorded or run


def _record(run: Loss, example: torch.Tensor) -> Loss | None:
    """None if that is not possible."""
    import torch

    with torch.cuda.device(example.device):
        given = example.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up outside the recording
            for _ in range(2):
                run(given)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return None

    def play(x: torch.Tensor) -> torch.Tensor:
        given.copy_(x)
        graph.replay()
        return result.clone()

    return play
