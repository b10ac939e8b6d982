"""Layer inputs behind the layers that are quantized already, against those of the original model, block by block.

With x the input of a layer in the original model, y that behind the layers quantized before it, and token weights u,
the layer is encoded under H = sum u y y^T, and not for its weights W but for

    W + a (W D + L) (H + damping)^-1,    D = sum u (x - y) y^T,    L = sum u d y^T

where d is what the residual stream lacks at the place where the layer's output is added to it (L = 0 for layers that
do not end there). With a = 1 that is the linear regression of the original outputs (and of the stream) on y, held at W
by the damping: GPTAQ (Li et al. 2025) has W D, for u = 1. A part of it does better, since D rests on few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf.calibration.curvature import add_products
from athena_gguf.calibration.precision import measuring
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.shelf import Shelf
    from athena_gguf.model import LinearLayer
    from athena_gguf.model.blocks import BlockModel
    from athena_gguf.plan import Plan

CORRECTION = 0.35  # a


@dataclass
class Moments:
    """Of a layer input, over sum u. `h`, `off`: H and D [columns, columns]; `lack`: L [rows, columns], None for 0."""

    h: torch.Tensor
    off: torch.Tensor
    lack: torch.Tensor | None


@dataclass(frozen=True)
class Anatomy:
    """Of a block: its linear layers' names in the order in which they run, and for those whose output is added to the
    residual stream as it is, the submodule that reads the stream before, "" for the block itself."""

    order: tuple[str, ...]
    streams: dict[str, str]


class Prefix:
    """Two copies of a model run side by side, block after block: `original`, and `quantized`, whose layers are replaced
    (`put`) as they become known. `layers`: of the original, that count. `shelf` holds the hidden states of `windows`
    [windows, length], of which `batch` run at a time."""

    def __init__(
        self,
        original: BlockModel,
        quantized: BlockModel,
        layers: Sequence[LinearLayer],
        windows: torch.Tensor,
        batch: int,
        shelf: Shelf,
    ) -> None:
        self.original, self.quantized, self.shelf = original, quantized, shelf
        self.device = original.device
        inner = {id(m): (n, name) for n, block in enumerate(original.blocks) for name, m in block.named_modules()}
        places = ((layer.tensor_name, inner.get(id(layer.torch_module))) for layer in layers)
        # Tensors of the blocks' layers: the block's number and the module's name there.
        self.places = {name: place for name, place in places if place is not None}
        self.batches = [part.to(self.device) for part in windows.split(batch)]
        self.gone_on = False  # the original has its next block's inputs

    @property
    def models(self) -> tuple[BlockModel, BlockModel]:
        return self.original, self.quantized

    def begin(self) -> None:
        """The inputs of the first block: embeddings count as they are in the original."""
        import torch

        with torch.no_grad(), measuring(self.device):
            self.small = self.original.embed(self.batches[0][:1, :8])
            for b, tokens in enumerate(self.batches):
                hidden = self.original.embed(tokens)
                for key in (True, False):
                    self.shelf.put((key, b), hidden)
        self.quantized.share(self.original)

    @contextmanager
    def block(self, index: int) -> Iterator[Anatomy]:
        """The block is loaded in both."""
        import torch

        with self.original.loaded(index), self.quantized.loaded(index), torch.no_grad():
            self.gone_on = False
            yield self._anatomy(index)

    def go_on(self, index: int) -> None:
        """To the inputs of the next block, in both."""
        with measuring(self.device):
            for model in self.models[self.gone_on :]:
                for b in range(len(self.batches)):
                    key = model is self.original, b
                    self.shelf.put(key, model.run(index, self.shelf.take(key)))

    def weight(self, index: int, module: str) -> torch.Tensor:
        """Of a layer of a loaded block in the original model [rows, columns]."""
        found: torch.Tensor = self.original.blocks[index].get_submodule(module).weight
        return found

    def put(self, index: int, module: str, weight: torch.Tensor) -> None:
        """Replace the weight [rows, columns] of a layer of a loaded block in the quantized model."""
        self.quantized.blocks[index].get_submodule(module).weight.copy_(weight)

    def moments(
        self, index: int, name: str, weights: torch.Tensor, place: str | None = None, last: bool = False
    ) -> Moments:
        """Of the input of the layer `name` of a block, as the quantized model is now. `weights`: u of all tokens,
        window by window. `place`: of the Anatomy's streams, None for L = 0. `last`: the original model goes on to the
        next block meanwhile, since no other layer of this one is asked for. Raises AthenaError for NaN or Inf."""
        import torch

        rows, columns = self.weight(index, name).shape
        h, off = (torch.zeros(columns, columns, device=self.device) for _ in range(2))
        lack = None if place is None else torch.zeros(rows, columns, device=self.device)
        names = [name, *([place] if place else [])]
        with measuring(self.device):
            for b, u in enumerate(weights.split([tokens.numel() for tokens in self.batches])):
                u = u.to(self.device)[:, None]
                x, y = self.shelf.look((True, b)), self.shelf.look((False, b))
                theirs, out = self._read(self.original, index, x, names, last)
                ours, _ = self._read(self.quantized, index, y, names, False)
                if last:
                    self.shelf.take((True, b))
                    self.shelf.put((True, b), out)
                theirs[""], ours[""] = _flat(x), _flat(y)
                read = ours[name]
                add_products(h, read * u.sqrt())
                add_products(off, (theirs[name] - read) * u, read)
                if lack is not None and place is not None:
                    add_products(lack, (theirs[place] - ours[place]) * u, read)
        self.gone_on |= last
        total = float(weights.double().sum())
        sums = (h, off) if lack is None else (h, off, lack)
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise AthenaError(
                f"{self.original.names[id(self.original.blocks[index])]}.{name}: NaN or Inf in its input; check the "
                "model's weights, or use --no-sequential"
            )
        return Moments((h + h.T) / (2 * total), off / total, None if lack is None else lack / total)

    def _read(
        self, model: BlockModel, index: int, hidden: torch.Tensor, names: Sequence[str], whole: bool
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """What submodules of a block read [tokens, columns], by name, and with `whole` its output; otherwise the run
        ends where all of them are known."""
        found: dict[str, torch.Tensor] = {}
        block = model.blocks[index]

        def reader(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
            def read(module: Any, args: tuple[Any, ...]) -> None:
                found[name] = _flat(args[0])
                if len(found) == len(names) and not whole:
                    raise _Stop

            return read

        handles = [block.get_submodule(name).register_forward_pre_hook(reader(name)) for name in names]
        try:
            return found, model.run(index, hidden)
        except _Stop:
            return found, None
        finally:
            for handle in handles:
                handle.remove()

    def _anatomy(self, index: int) -> Anatomy:
        """Found by running a few tokens."""
        import torch

        block = self.original.blocks[index]
        read: dict[str, torch.Tensor] = {"": self.small}
        gave: dict[str, torch.Tensor] = {}

        def watch(name: str, linear: bool) -> Callable[[Any, tuple[Any, ...], Any], None]:
            def seen(module: Any, args: tuple[Any, ...], output: Any) -> None:
                if linear:
                    gave[name] = output
                elif args and isinstance(args[0], torch.Tensor) and args[0].shape == self.small.shape:
                    read[name] = args[0]

            return seen

        modules = [(name, m, isinstance(m, torch.nn.Linear)) for name, m in block.named_modules() if name]
        handles = [module.register_forward_hook(watch(name, linear)) for name, module, linear in modules]
        try:
            out = self.original.run(index, self.small)
        finally:
            for handle in handles:
                handle.remove()
        streams = {}
        for name, y in gave.items():
            if y.shape != self.small.shape:
                continue
            for place, before in read.items():
                after = before + y
                if not torch.equal(after, before) and any(torch.equal(after, end) for end in (*read.values(), out)):
                    streams[name] = place
                    break
        return Anatomy(tuple(gave), streams)


def open_for_prefix(model_dir: Path, plan: Plan, device: torch.device) -> BlockModel | None:
    """The model of a directory; None where it cannot be run block by block, or has experts, which are sent other tokens
    behind quantized layers."""
    import torch

    from athena_gguf.model.blocks import open_blocks

    if any(len(plan.shapes[name]) > 2 for name in plan.curved):
        return None
    return open_blocks(model_dir, device, torch.float32 if device.type == "cpu" else torch.bfloat16)


class _Stop(Exception):
    """Ends a block's run."""


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2).float()


def targets(
    weights: Sequence[torch.Tensor], moments: Moments, damping: float, correction: float = CORRECTION
) -> list[torch.Tensor]:
    """What is to be encoded for each of `weights` [rows, columns] float32, which read the same input. `damping`: of H's
    mean diagonal. Raises torch's LinAlgError if H is not positive semidefinite."""
    import torch

    damped = moments.h.double()
    damped.diagonal().add_(damping * (float(damped.diagonal().mean()) or 1.0))
    factor = torch.linalg.cholesky(damped)
    del damped
    found = []
    for weight in weights:
        wanted = (weight @ moments.off).double()
        if moments.lack is not None:
            wanted += moments.lack.double()
        change = torch.cholesky_solve(wanted.T, factor).T
        found.append((weight.double() + correction * change).float())
    return found
