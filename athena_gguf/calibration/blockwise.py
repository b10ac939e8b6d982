"""Curvature of the loss for models larger than the memory at hand: block by block.

A forward pass puts every block's input away; the backward pass, from the last block to the first, takes it again, runs
the block once more with gradients, and has the block's curvatures complete before it goes on. So a block's weights and
curvatures are needed for a short while only, and what reads the curvatures can work while the rest is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from athena_gguf.calibration.curvature import (
    Collector,
    Curvature,
    Lookup,
    RowPower,
    loss,
    not_finite,
    require_gradients,
)
from athena_gguf.calibration.precision import measuring
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.model import LinearLayer
from athena_gguf.model.blocks import BlockModel

if TYPE_CHECKING:
    import torch

_OUTPUT = 1 << 27  # logits made in one go, at most, if that is a window or more


def measure_blockwise(
    blocks: BlockModel,
    layers: Sequence[LinearLayer],
    windows: torch.Tensor,
    batch_windows: int,
    shelf: Shelf,
    lookup: Lookup,
    finished: Collection[str] = (),
    labels: str = "text",
    seed: int = 0,
    advance: Callable[[float], None] = lambda tokens: None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Curvature]:
    """As `measure_curvature`, from the last layer to the first; each block's curvatures as soon as they are measured.

    `layers`: of `blocks.model`. Inputs whose tensors are all `finished` are not measured again. `lookup` is filled in
    at the end. `pause` is called before every block's work.
    """
    import torch

    batches = [batch.to(blocks.device) for batch in windows.split(batch_windows)]
    share = 1 / (3 * len(blocks.blocks))  # of the work of a pass over the tokens, without the output
    with torch.no_grad(), measuring():
        probe = batches[0][:1, :8]
        small = blocks.embed(probe)
        for b, batch in enumerate(batches):
            shelf.put((0, b), blocks.embed(batch))
        for index in range(len(blocks.blocks)):
            with blocks.loaded(index):
                for b, batch in enumerate(batches):
                    shelf.put((index + 1, b), blocks.run(index, shelf.look((index, b))))
                    advance(batch.numel() * share)

    wanted = [layer for layer in layers if layer.tensor_name not in finished]
    inner = {id(module): index for index, block in enumerate(blocks.blocks) for module in block.modules()}
    by_block: dict[int, list[LinearLayer]] = {}
    for layer in wanted:
        by_block.setdefault(inner.get(id(layer.module), -1), []).append(layer)

    yield from _output(blocks, by_block.get(-1, []), batches, shelf, small, probe, labels, seed)

    for index in reversed(range(len(blocks.blocks))):
        pause()
        with blocks.loaded(index), measuring():
            collector = Collector(by_block.get(index, []), lambda at=index: blocks.run(at, small))  # type: ignore[misc]
            with collector:
                for b, batch in enumerate(batches):
                    collector.clear()
                    x = shelf.take((index, b)).requires_grad_(True)
                    blocks.run(index, x).backward(shelf.take(("gradient", b)))
                    assert x.grad is not None
                    shelf.put(("gradient", b), x.grad)
                    advance(2 * batch.numel() * share)
        found = collector.finish()
        del collector, x
        while found:
            yield found.pop(0)

    rows = RowPower(blocks.device)
    handle = require_gradients(blocks.model, rows)
    try:
        for b, batch in enumerate(batches):
            blocks.embed(batch).backward(shelf.take(("gradient", b)))
    finally:
        handle.remove()
    lookup.power = float(rows.sum) / windows.numel()


def _output(
    blocks: BlockModel,
    layers: list[LinearLayer],
    batches: list[torch.Tensor],
    shelf: Shelf,
    small: torch.Tensor,
    probe: torch.Tensor,
    labels: str,
    seed: int,
) -> Iterator[Curvature]:
    """From the last block's output to the loss and back; few windows at a time, since logits are large."""
    import torch

    generator = torch.Generator(blocks.device).manual_seed(seed)
    last = len(blocks.blocks)
    with measuring():
        with torch.no_grad():
            width = blocks.output(small, probe).shape[-1]
        collector = Collector(layers, lambda: blocks.output(small, probe))
        with collector:
            for b, batch in enumerate(batches):
                hidden = shelf.take((last, b))
                gradient = torch.empty_like(hidden)
                step = max(1, _OUTPUT // (width * batch.shape[1]))
                for a in range(0, len(batch), step):
                    collector.clear()
                    x = hidden[a : a + step].clone().requires_grad_(True)
                    tokens = batch[a : a + step]
                    try:
                        loss(blocks.output(x, tokens), tokens, labels, generator).backward()
                    except FloatingPointError as error:
                        raise not_finite(None) from error
                    assert x.grad is not None
                    gradient[a : a + step] = x.grad
                shelf.put(("gradient", b), gradient)
    yield from collector.finish()


def largest_batch(windows: Any, budget: int, per_window: int) -> int:
    """Windows of a batch so that `per_window` bytes of each fit a budget; at least one, at most sixteen."""
    return int(max(1, min(16, len(windows), budget // max(1, per_window))))
