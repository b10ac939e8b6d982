"""Curvature of the loss for models larger than the memory at hand: block by block, on one device or several.

A forward pass puts every block's input away; the backward pass, from the last block to the first, takes it again, runs
the block once more with gradients, and has the block's curvatures complete before it goes on. So a block's weights and
curvatures are needed for a short while only, and what reads the curvatures can work while the rest is measured.
Every device has a share of the windows; a block's sums are added up on the first. Devices beyond the first are worked
on by processes of their own (athena_gguf.calibration.remote).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from athena_gguf.calibration.curvature import (
    Collector,
    Curvature,
    Lookup,
    RowPower,
    Sums,
    loss,
    not_finite,
    require_gradients,
)
from athena_gguf.calibration.parts import Together
from athena_gguf.calibration.precision import measuring
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.gpu import refused, repeatable, warn
from athena_gguf.model import LinearLayer
from athena_gguf.model.blocks import BlockModel

if TYPE_CHECKING:
    import torch

_OUTPUT = 1 << 27  # logits made in one go, at most, if that is a window or more


class Passes:
    """As `measure_curvature`, from the last layer to the first; each block's curvatures as soon as they are measured.

    `first` and `others`: one a device, which work through `tokens` of text together. `advance` is called with the
    tokens done, two thirds of them by `backward`.
    """

    def __init__(
        self,
        first: LocalPart,
        tokens: int,
        advance: Callable[[float], None] = lambda tokens: None,
        others: Sequence[Part] = (),
    ) -> None:
        self.blocks, self.advance, self.tokens = first.blocks.blocks, advance, tokens
        self.parts: list[Part] = [first, *others]
        self.device = first.blocks.device
        self.share = self.tokens / (3 * len(self.blocks))  # of the work, without the output
        self.together: Together[Part] = Together(self.parts)

    def close(self) -> None:
        """Wait until no device is at work."""
        self.together.close()

    def forward(self) -> None:
        """Every block's input, put away."""
        with measuring(self.device):
            self.together.do(lambda part: part.begin())
            for index in range(len(self.blocks)):
                self.together.do(lambda part, at=index: part.forward(at))  # type: ignore[misc]
                self.advance(self.share)

    def backward(
        self,
        layers: Sequence[LinearLayer],
        lookup: Lookup,
        finished: Collection[str] = (),
        pause: Callable[[], None] = lambda: None,
    ) -> Iterator[Curvature]:
        """The curvatures, after the forward pass. `layers`: of the first model. Inputs whose tensors are all `finished`
        are not measured again. `lookup` is filled in at the end. `pause` is called before every block's work."""
        inner = {id(module): index for index, block in enumerate(self.blocks) for module in block.modules()}
        by_block: dict[int, list[LinearLayer]] = {}
        for layer in layers:
            if layer.tensor_name not in finished:
                by_block.setdefault(inner.get(id(layer.torch_module), _NO_BLOCK), []).append(layer)
        for index in (_NO_BLOCK, *reversed(range(len(self.blocks)))):
            pause()
            those = by_block.get(index, [])
            with measuring(self.device):
                if index == _NO_BLOCK:
                    first, *others = self.together.do(lambda part, of=those: part.output(of))  # type: ignore[misc]
                else:
                    first, *others = self.together.do(lambda part, at=index, of=those: part.backward(at, of))  # type: ignore[misc]
                    self.advance(2 * self.share)
                while others:
                    first.add(others.pop(0))
            found = first.finish()
            del first
            while found:
                yield found.pop(0)
        lookup.power = sum(self.together.do(lambda part: part.end())) / self.tokens


_NO_BLOCK = -1


class _Refused(Exception):
    """An operation of a block is not `repeatable`; nothing was taken from the shelf."""


class Part(Protocol):
    """One device and its share of the windows. What `output` and `backward` give is to be added to the collector that
    the first device's give."""

    def begin(self) -> None:
        """The inputs of the first block."""

    def forward(self, index: int) -> None:
        """The inputs of the next block."""

    def output(self, layers: Sequence[LinearLayer]) -> Collector | Sums:
        """From the last block's output to the loss and back."""

    def backward(self, index: int, layers: Sequence[LinearLayer]) -> Collector | Sums:
        """From the gradient at a block's output to that at its input, the same bits every time if the model's
        operations allow it."""

    def end(self) -> float:
        """From the first block's input to the embeddings: the sum of the squares that `Lookup` is the mean of."""


class LocalPart:
    """A `Part` that this process works on: its share `windows` [windows, length], `batch_windows` of them at a time.
    `with_weights`: the curvatures have those of its tokens."""

    def __init__(
        self,
        blocks: BlockModel,
        shelf: Shelf,
        windows: torch.Tensor,
        batch_windows: int,
        labels: str = "text",
        seed: int = 0,
        with_weights: bool = False,
    ) -> None:
        self.blocks, self.shelf, self.labels, self.seed = blocks, shelf, labels, seed
        self.batches = [batch.to(blocks.device) for batch in windows.split(batch_windows)]
        self.probe = self.batches[0][:1, :8]
        self.repeats, self.weights_of = True, windows.numel() if with_weights else 0

    def _collector(self, layers: Sequence[LinearLayer], probe: Callable[[], object]) -> Collector:
        """Of these layers in this device's copy of the model."""
        layers = [layer.of(self.blocks.model) for layer in layers]
        return Collector(layers, probe, weights_of=self.weights_of)

    def begin(self) -> None:
        import torch

        with torch.no_grad():
            self.small = self.blocks.embed(self.probe)
            for b, batch in enumerate(self.batches):
                self.shelf.put((0, b), self.blocks.embed(batch))

    def forward(self, index: int) -> None:
        import torch

        with torch.no_grad(), self.blocks.loaded(index):
            self.blocks.prefetch(index + 1)
            for b in range(len(self.batches)):
                self.shelf.put((index + 1, b), self.blocks.run(index, self.shelf.look((index, b))))

    def output(self, layers: Sequence[LinearLayer]) -> Collector:
        """Few windows at a time, since logits are large."""
        import torch

        blocks, small = self.blocks, self.small
        generator = torch.Generator(blocks.device).manual_seed(self.seed)
        with torch.no_grad():
            width = blocks.output(small, self.probe).shape[-1]
        collector = self._collector(layers, lambda: blocks.output(small, self.probe))
        with collector:
            for b, batch in enumerate(self.batches):
                hidden = self.shelf.take((len(blocks.blocks), b))
                gradient = torch.empty_like(hidden)
                step = max(1, _OUTPUT // (width * batch.shape[1]))
                for a in range(0, len(batch), step):
                    collector.clear()
                    x = hidden[a : a + step].clone().requires_grad_(True)
                    tokens = batch[a : a + step]
                    try:
                        loss(blocks.output(x, tokens), tokens, self.labels, generator).backward()
                    except FloatingPointError as error:
                        raise not_finite(None) from error
                    assert x.grad is not None
                    gradient[a : a + step] = x.grad
                self.shelf.put(("gradient", b), gradient)
        return collector

    def backward(self, index: int, layers: Sequence[LinearLayer]) -> Collector:
        if self.repeats:
            try:
                with repeatable():
                    return self._backward(index, layers)
            except _Refused as error:
                self.repeats = False
                warn(error)
        return self._backward(index, layers)

    def _backward(self, index: int, layers: Sequence[LinearLayer]) -> Collector:
        """Raises `_Refused`."""
        blocks, shelf = self.blocks, self.shelf
        with blocks.loaded(index):
            collector = self._collector(layers, lambda: blocks.run(index, self.small))
            with collector:
                for b in range(len(self.batches)):
                    collector.clear()
                    x, gradient = shelf.take((index, b)), shelf.take(("gradient", b))
                    try:
                        blocks.run(index, x.requires_grad_(True)).backward(gradient)
                    except RuntimeError as error:
                        if b or not refused(error):
                            raise
                        shelf.put((index, b), x)
                        shelf.put(("gradient", b), gradient)
                        raise _Refused(error) from error
                    assert x.grad is not None
                    shelf.put(("gradient", b), x.grad)
        return collector

    def end(self) -> float:
        rows = RowPower(self.blocks.device)
        handle = require_gradients(self.blocks.model, rows)
        try:
            for b, batch in enumerate(self.batches):
                self.blocks.embed(batch).backward(self.shelf.take(("gradient", b)))
        finally:
            handle.remove()
        return float(rows.sum)


def most_windows(length: int) -> int:
    """Windows of `length` tokens of a batch, at most: more would keep a GPU no busier, and take memory."""
    return max(1, min(16, 16384 // length))


def largest_batch(windows: torch.Tensor, budget: int, per_window: int) -> int:
    """Windows of a batch so that `per_window` bytes of each fit a budget; at least one.

    A power of two where the budget says it, as a GPU's free memory differs a little from one run to the next, and with
    the number the last bits of the sums.
    """
    fit = 1 << (max(1, budget // max(1, per_window)).bit_length() - 1)
    return max(1, min(most_windows(windows.shape[1]), len(windows), fit))
