"""Layer inputs behind the layers that are quantized already, against those of the original model, block by block.

With x the input of a layer in the original model, y that behind the layers quantized before it, and token weights u,
the layer is encoded under H = sum u y y^T, and not for its weights W but for

    W + a (W D + L) (H + damping)^-1,    D = sum u (x - y) y^T,    L = sum u d y^T

where d is what the residual stream lacks at the place where the layer's output is added to it (L = 0 for layers that
do not end there). With a = 1 that is the linear regression of the original outputs (and of the stream) on y, held at W
by the damping: GPTAQ (Li et al. 2025) has W D, for u = 1. Few tokens say little about what can be made up for, and a
regression that follows them loses on others: so a rests on the part of it that lowers the error most on tokens that
it has not seen, by cross-validation over two halves of the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from athena_gguf.calibration.curvature import add_products
from athena_gguf.calibration.parts import Together
from athena_gguf.calibration.precision import measuring
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.shelf import Shelf
    from athena_gguf.model import LinearLayer
    from athena_gguf.model.blocks import BlockModel
    from athena_gguf.plan import Plan

# Of the part that lowers a layer's error most, so much: by trial, the model's divergence is least (docs/quality.md).
_PART = 0.7
_ROWS = 1024  # of a weight that the cross-validation looks at, at most


@dataclass
class Moments:
    """Of a layer input, over some windows: the sums H and D [columns, columns] and L [rows, columns], None for 0, and
    `total` of u, which they are not divided by."""

    h: torch.Tensor
    off: torch.Tensor
    lack: torch.Tensor | None
    total: float

    def add(self, other: Moments) -> None:
        self.h += other.h.to(self.h.device)
        self.off += other.off.to(self.h.device)
        if self.lack is not None and other.lack is not None:
            self.lack += other.lack.to(self.h.device)
        self.total += other.total

    def forget(self, h: bool = True) -> None:
        """Give back the memory, of H too or not."""
        import torch

        nothing = torch.empty(0)
        self.h, self.off, self.lack = nothing if h else self.h, nothing, None

    def finish(self) -> None:
        """Divide by the `total`, which is 1 then; H becomes symmetric to the last bit."""
        self.h = (self.h + self.h.T).div_(2 * self.total)
        self.off /= self.total
        if self.lack is not None:
            self.lack /= self.total
        self.total = 1.0


Halves = tuple[Moments, Moments]  # of every other window


@dataclass(frozen=True)
class Anatomy:
    """Of a block: its linear layers' names in the order in which they run, and for those whose output is added to the
    residual stream as it is, the submodule that reads the stream before, "" for the block itself."""

    order: tuple[str, ...]
    streams: dict[str, str]


class Part(Protocol):
    """Two copies of a model run side by side on one device, for its share of the `windows`, so many."""

    windows: int

    def begin(self, embeddings: torch.Tensor | None) -> None:
        """As `Prefix.begin`."""

    def enter(self, index: int) -> None:
        """The block is loaded in both, until `leave`."""

    def leave(self) -> None:
        """Of `enter`."""

    def go_on(self, index: int) -> None:
        """To the inputs of the next block, in both."""

    def put(self, index: int, module: str, weight: torch.Tensor) -> None:
        """As `Prefix.put`."""

    def moments(self, index: int, name: str, weights: torch.Tensor, place: str | None, last: bool) -> Halves:
        """As `Prefix.moments`, of the share."""


class LocalPart:
    """A `Part` that this process works on. `shelf` holds the hidden states of `windows` [windows, length], of which
    `batch` run at a time; `first`: how many windows other parts have before them."""

    def __init__(
        self,
        original: BlockModel,
        quantized: BlockModel,
        windows: torch.Tensor,
        batch: int,
        shelf: Shelf,
        first: int = 0,
    ) -> None:
        self.original, self.quantized, self.shelf = original, quantized, shelf
        self.windows = len(windows)
        self.device, self.loaded = original.device, ExitStack()
        # Every other window of all: those of one text or kind stand together.
        numbers = [list(range((half - first) % 2, len(windows), 2)) for half in (0, 1)]
        # The half, and which windows run together.
        self.those = [(half, of[a : a + batch]) for half, of in enumerate(numbers) for a in range(0, len(of), batch)]
        self.batches = [windows[which].to(self.device) for _, which in self.those]
        quantized.share(original)
        self.gone_on = False  # the original has its next block's inputs

    def begin(self, embeddings: torch.Tensor | None) -> None:
        import torch

        with torch.no_grad(), measuring(self.device):
            self.small = self.original.embed(self.batches[0][:1, :8])
            for b, tokens in enumerate(self.batches):
                hidden = self.original.embed(tokens)
                self.shelf.put((True, b), hidden)
                if embeddings is None:
                    self.shelf.put((False, b), hidden)
            if embeddings is None:
                return
            module = self.quantized.model.get_input_embeddings()
            shared, self.quantized.arguments = module.weight, {}
            module.weight = torch.nn.Parameter(embeddings.to(shared), requires_grad=False)
            for b, tokens in enumerate(self.batches):
                self.shelf.put((False, b), self.quantized.embed(tokens))
            module.weight = shared

    def enter(self, index: int) -> None:
        self.loaded.enter_context(self.original.loaded(index))
        self.loaded.enter_context(self.quantized.copied(index, self.original))
        self.gone_on = False

    def leave(self) -> None:
        self.loaded.close()

    def go_on(self, index: int) -> None:
        import torch

        models = (self.original, self.quantized)
        with torch.no_grad(), measuring(self.device):
            for model in models[self.gone_on :]:
                for b in range(len(self.batches)):
                    key = model is self.original, b
                    self.shelf.put(key, model.run(index, self.shelf.take(key)))

    def put(self, index: int, module: str, weight: torch.Tensor) -> None:
        import torch

        with torch.no_grad():
            self.quantized.blocks[index].get_submodule(module).weight.copy_(weight)

    def moments(self, index: int, name: str, weights: torch.Tensor, place: str | None, last: bool) -> Halves:
        import torch

        rows, columns = self.original.blocks[index].get_submodule(name).weight.shape
        by_window = weights.view(self.windows, -1)
        of_batches = [by_window[which].flatten() for _, which in self.those]

        def zeros(rows: int) -> torch.Tensor:
            return torch.zeros(rows, columns, device=self.device)

        lacks = [zeros(rows) if place is not None else None for _ in range(2)]
        found = [Moments(zeros(columns), zeros(columns), lack, 0.0) for lack in lacks]
        names = [name, *([place] if place else [])]
        with torch.no_grad(), measuring(self.device):
            for b, ((half, _), u) in enumerate(zip(self.those, of_batches, strict=True)):
                found[half].total += float(u.double().sum())
                u = u.to(self.device)[:, None]
                x, y = self.shelf.look((True, b)), self.shelf.look((False, b))
                theirs, out = self._read(self.original, index, x, names, last)
                ours, _ = self._read(self.quantized, index, y, names, False)
                if last:
                    self.shelf.drop((True, b))
                    self.shelf.put((True, b), out)
                if place == "":
                    theirs[""], ours[""] = _flat(x), _flat(y)
                read, sums = ours[name], found[half]
                add_products(sums.h, read * u.sqrt())
                add_products(sums.off, (theirs[name] - read) * u, read)
                if sums.lack is not None and place is not None:
                    add_products(sums.lack, (theirs[place] - ours[place]) * u, read)
        self.gone_on |= last
        return found[0], found[1]

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

    def anatomy(self, index: int) -> Anatomy:
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


class Prefix:
    """Two copies of a model run side by side, block after block: `original`, and the quantized one, whose layers are
    replaced (`put`) as they become known. `layers`: of the original, that count. Every one of the `parts`, of which the
    first is of this process, has its share of the windows."""

    def __init__(self, layers: Sequence[LinearLayer], first: LocalPart, others: Sequence[Part] = ()) -> None:
        self.first, self.parts, self.original = first, [first, *others], first.original
        blocks = self.original.blocks
        inner = {id(m): (n, name) for n, block in enumerate(blocks) for name, m in block.named_modules()}
        places = ((layer.tensor_name, inner.get(id(layer.torch_module))) for layer in layers)
        # Tensors of the blocks' layers: the block's number and the module's name there.
        self.places = {name: place for name, place in places if place is not None}
        self.device = self.original.device
        self.together: Together[Part] = Together(self.parts)

    @property
    def embeddings(self) -> torch.Tensor:
        """Of the original [tokens, columns]."""
        found: torch.Tensor = self.original.model.get_input_embeddings().weight
        return found

    def begin(self, embeddings: torch.Tensor | None = None) -> None:
        """The inputs of the first block. `embeddings` [tokens, columns]: the quantized model's, None for those of the
        original."""
        self.together.do(lambda part: part.begin(embeddings))

    @contextmanager
    def block(self, index: int) -> Iterator[Anatomy]:
        """The block is loaded in both copies."""
        try:
            self.together.do(lambda part: part.enter(index))
            yield self.first.anatomy(index)
        finally:
            self.together.do(lambda part: part.leave())

    def go_on(self, index: int) -> None:
        """To the inputs of the next block, in both."""
        self.together.do(lambda part: part.go_on(index))

    def weight(self, index: int, module: str) -> torch.Tensor:
        """Of a layer of a loaded block in the original model [rows, columns]."""
        found: torch.Tensor = self.original.blocks[index].get_submodule(module).weight
        return found

    def put(self, index: int, module: str, weight: torch.Tensor) -> None:
        """Replace the weight [rows, columns] of a layer of a loaded block in the quantized model."""
        weight = weight.to(self.weight(index, module).dtype)
        self.together.do(lambda part: part.put(index, module, weight))

    def moments(
        self, index: int, name: str, weights: torch.Tensor, place: str | None = None, last: bool = False
    ) -> Halves:
        """Of the input of the layer `name` of a block, as the quantized model is now. `weights`: u of all tokens,
        window by window. `place`: of the Anatomy's streams, None for L = 0. `last`: the original model goes on to the
        next block meanwhile, since no other layer of this one is asked for. Raises AthenaError for NaN or Inf."""
        import torch

        sizes = [part.windows for part in self.parts]
        shares = [part.flatten() for part in weights.view(sum(sizes), -1).split(sizes)]
        of_part = {id(part): share for part, share in zip(self.parts, shares, strict=True)}
        first, *others = self.together.do(lambda part: part.moments(index, name, of_part[id(part)], place, last))
        while others:
            for ours, theirs in zip(first, others.pop(0), strict=True):
                ours.add(theirs)
        sums = [one for half in first for one in (half.h, half.off, half.lack) if one is not None]
        if not all(bool(torch.isfinite(one).all()) for one in sums):
            raise AthenaError(
                f"{self.original.names[id(self.original.blocks[index])]}.{name}: NaN or Inf in its input; check the "
                "model's weights, or use --no-sequential"
            )
        found: Halves = first
        return found


def possible(model_dir: Path, plan: Plan) -> bool:
    """Whether a model can be run block by block, and has no experts, which are sent other tokens behind quantized
    layers. Tried on the CPU, since a GPU may be at work."""
    import torch

    if any(len(plan.shapes[name]) > 2 for name in plan.curved):
        return False
    return _opened(model_dir, torch.device("cpu"), torch.bfloat16) is not None


def open_twice(model_dir: Path, device: torch.device) -> tuple[BlockModel, BlockModel]:
    """Copies of a model for which that is `possible`, in float32 on a CPU. Raises AthenaError if it is not."""
    import torch

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    original, quantized = (_opened(model_dir, device, dtype) for _ in range(2))
    if original is None or quantized is None:
        raise AthenaError(f"{model_dir}: the model cannot be run block by block; use --no-sequential")
    return original, quantized


def _opened(model_dir: Path, device: torch.device, dtype: torch.dtype) -> BlockModel | None:
    from athena_gguf.model.blocks import open_blocks

    return open_blocks(model_dir, device, dtype)


class _Stop(Exception):
    """Ends a block's run."""


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2).float()


def targets(
    weights: Sequence[torch.Tensor], halves: Halves, damping: float, correction: float | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """H [columns, columns], over sum u, and what is to be encoded for each of `weights` [rows, columns] float32, which
    read the same input. `damping`: of H's mean diagonal. `correction`: a, None for what the cross-validation gives. The
    halves are used up. Raises torch's LinAlgError if H is not positive semidefinite."""
    import torch

    a = _PART * _that_holds(weights, halves, damping) if correction is None else correction
    moments, other = halves
    moments.add(other)
    other.forget()
    moments.finish()
    factor = _factor(moments.h, damping)
    if moments.lack is None and sum(map(len, weights)) > len(moments.h):  # D once, and not W D for every weight
        shift = torch.cholesky_solve(moments.off.double().T, factor).T.float()
        found = [weight + a * (weight @ shift) for weight in weights]
    else:
        changes = (torch.cholesky_solve(_wanted(weight, moments).double().T, factor).T for weight in weights)
        found = [weight + a * change.float() for weight, change in zip(weights, changes, strict=True)]
    moments.forget(h=False)
    return moments.h, found


def _wanted(weight: torch.Tensor, moments: Moments, rows: slice = slice(None)) -> torch.Tensor:
    """W D + L, of some rows."""
    found = weight[rows] @ moments.off
    return found if moments.lack is None else found + moments.lack[rows]


def _factor(h: torch.Tensor, damping: float) -> torch.Tensor:
    """Of the damped H, in float64."""
    import torch

    return torch.linalg.cholesky(_damped(h.to(torch.float64, copy=True), damping))


def _rough_factor(h: torch.Tensor, damping: float) -> torch.Tensor:
    """In float32 where that is enough: GPUs for games are 64 times as fast at it."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(_damped(h.clone(), damping))
    return _factor(h, damping) if failed.item() else factor


def _damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    h.diagonal().add_(damping * (float(h.diagonal().mean()) or 1.0))
    return h


def _that_holds(weights: Sequence[torch.Tensor], halves: Halves, damping: float) -> float:
    """The regression on either half lowers the other's error most if it is made this part of itself,

        b = sum <C_1, W D_2 + L_2> / sum tr(C_1 H_2 C_1^T),    C_1 = (W D_1 + L_1) (H_1 + damping)^-1

    If g of the error can be made up for, and half of the tokens put n of it there by chance, b is g / (g + n); that of
    all tokens is g / (g + n / 2) = 2 b / (1 + b)."""
    import torch

    if not all(half.total for half in halves):
        return 0.0
    gained = power = 0.0
    for one, other in (halves, halves[::-1]):
        factor = _rough_factor(one.h, damping)
        for weight in weights:
            some = slice(None, None, -(-len(weight) // _ROWS))
            change = torch.cholesky_solve(_wanted(weight, one, some).T.to(factor), factor).T.float()
            gained += float((change * _wanted(weight, other, some)).sum(dtype=torch.float64))
            power += float(((change @ other.h) * change).sum(dtype=torch.float64))
    b = min(1.0, max(0.0, gained / power)) if power else 0.0
    return 2 * b / (1 + b)
