"""A model whose decoder blocks are run one at a time, their weights loaded when needed and dropped after.

The model's own code stays in charge of everything around the blocks (embeddings, masks, positions, the output): it runs
with stand-ins for the blocks that record what each is called with, or that put a given hidden state in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.model.checkpoint import Checkpoint
from athena_gguf.model.linear import LinearLayer
from athena_gguf.model.load import check_model_dir, quiet_transformers
from athena_gguf.model.pieces import Piece, parameter_pieces

if TYPE_CHECKING:
    import torch


class _Stop(Exception):
    """Ends a run of the model's code after the last block's stand-in."""


class BlockModel:
    """`model`: the transformers model; the weights of `blocks`, its decoder blocks in order, are on the meta device
    unless loaded, all others on `device`. `pieces`: of the `checkpoint`, that parameters and buffers are made of.
    `resident`: bytes of blocks that may stay loaded on the device."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        pieces: dict[str, list[Piece]],
        device: torch.device,
        resident: int = 0,
    ) -> None:
        import torch

        self.model, self.checkpoint, self.pieces, self.device = model, checkpoint, pieces, device
        self.blocks = list(model.get_decoder().layers)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.resident = self.left = min(resident, sum(p.nbytes for b in self.blocks for p in b.parameters()))
        self.kept: set[int] = set()
        self.ahead: dict[str, Future[torch.Tensor]] = {}
        self.reader = ThreadPoolExecutor(1, "weights")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.tuples = False
        inner = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        outer = [name for name, parameter in model.named_parameters() if id(parameter) not in inner]
        for name in outer:
            self._fill(name)
        model.tie_weights()
        for name, buffer in model.named_buffers():
            given = pieces.get(name)
            _set(model, name, checkpoint.parameter(given, device, buffer.dtype) if given else buffer.to(device))
        self.arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    @property
    def resident_bytes(self) -> int:
        """Of what is or may become loaded for good."""
        inner = {id(p) for block in self.blocks for p in block.parameters()}
        return self.resident + sum(p.nbytes for p in self.model.parameters() if id(p) not in inner)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first block's input [windows, length, hidden] for `tokens` [windows, length] on the device; notes what
        else the blocks are called with for tokens of this shape."""
        arguments: list[dict[str, Any]] = []
        first: list[torch.Tensor] = []

        def stand_in(index: int, hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
            if more:
                raise TypeError("a block with several positional arguments")
            first.append(hidden)
            arguments.append(named)
            if index == len(self.blocks) - 1:
                raise _Stop
            return (hidden,) if self.tuples else hidden

        try:
            with self._stand_ins(stand_in):
                self.model(input_ids=tokens, use_cache=False)
        except _Stop:
            pass
        self.arguments[tuple(tokens.shape)] = arguments
        return first[0]

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """A loaded block's output for its input; `embed` has seen tokens of this shape."""
        found = self.blocks[index](hidden, **self.arguments[tuple(hidden.shape[:2])][index])
        return found[0] if isinstance(found, tuple) else found

    def share(self, other: BlockModel) -> None:
        """Take all but the blocks' weights from another copy of the model, which has seen the tokens to be run."""
        inner = {id(parameter) for block in other.blocks for parameter in block.parameters()}
        for name, parameter in other.model.named_parameters():
            if id(parameter) not in inner:
                _set(self.model, name, parameter)
        self.model.tie_weights()
        self.arguments = other.arguments

    def output(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [windows, length, vocabulary] for the last block's output."""
        last = len(self.blocks) - 1

        def stand_in(index: int, given: torch.Tensor, *more: Any, **named: Any) -> Any:
            found = hidden if index == last else given
            return (found,) if self.tuples else found

        with self._stand_ins(stand_in):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def columns(self, layer: LinearLayer, which: list[int]) -> torch.Tensor:
        """Some columns of a layer's weight [..., rows, how many], loaded or not."""
        import torch

        pieces = self.pieces.get(layer.parameter_name)
        if pieces is None:  # tied, and so never dropped
            weight: torch.Tensor = layer.module.weight[..., which]
            return weight
        return layer.rows_of(self.checkpoint.parameter(pieces, torch.device("cpu"), None, which))

    def prefetch(self, index: int) -> None:
        """Begin to load a block, if there is one of this number, and room for it and the one before to stay."""
        if index >= len(self.blocks) or index in self.kept:
            return
        if 2 * sum(p.nbytes for p in self.blocks[index].parameters()) > self.left:
            return
        for name in self._parameters(index):
            if name in self.pieces and name not in self.ahead:
                self.ahead[name] = self.reader.submit(self._read_ahead, name)

    @contextmanager
    def loaded(self, index: int) -> Iterator[Any]:
        """The block, with its weights on the device."""
        block = self.blocks[index]
        if index not in self.kept:
            for name in self._parameters(index):
                self._fill(name)
        try:
            yield block
        finally:
            size = sum(p.nbytes for p in block.parameters())
            if index not in self.kept and size <= self.left:
                self.left -= size
                self.kept.add(index)
            if index not in self.kept:
                _drop(block)

    @contextmanager
    def copied(self, index: int, other: BlockModel) -> Iterator[Any]:
        """The block, with the weights that it has in another copy of the model, where it is loaded."""
        import torch

        block = self.blocks[index]
        for name, parameter in other.blocks[index].named_parameters():
            _set(block, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
        try:
            yield block
        finally:
            _drop(block)

    def _parameters(self, index: int) -> list[str]:
        """Names of a block's parameters in the model."""
        block = self.blocks[index]
        return [f"{self.names[id(block)]}.{name}" for name, _ in block.named_parameters()]

    def _fill(self, name: str) -> None:
        import torch

        if name not in self.pieces:  # tied to another one
            return
        value = self.ahead.pop(name).result() if name in self.ahead else self._read(name)
        _set(self.model, name, torch.nn.Parameter(value, requires_grad=False))

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.parameter(self.pieces[name], self.device, self.model.get_parameter(name).dtype)

    def _read_ahead(self, name: str) -> torch.Tensor:
        """On a GPU in a stream of its own, so that it does not wait for what there is to do before."""
        import torch

        if self.stream is None:
            return self._read(name)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            value = self._read(name)
        self.stream.synchronize()
        value.record_stream(torch.cuda.default_stream(self.device))
        return value

    @contextmanager
    def _stand_ins(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        def bound(index: int) -> Callable[..., Any]:
            return lambda hidden, *more, **named: stand_in(index, hidden, *more, **named)

        for index, block in enumerate(self.blocks):
            block.forward = bound(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def open_blocks(
    model_dir: Path, device: torch.device, dtype: torch.dtype, resident: int = 0, probe: int = 8
) -> BlockModel | None:
    """The model of a directory, with none of its blocks loaded; None where they cannot be run one by one: parameters
    that are not in the checkpoint, or made of it in an unknown way, or blocks that pass each other more than the hidden
    state. `resident`: bytes of blocks that may stay loaded on the device. `probe`: tokens of a run that finds out."""
    import torch
    import transformers

    check_model_dir(model_dir)
    quiet_transformers()
    checkpoint = Checkpoint(model_dir)
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        layers = model.get_decoder().layers
        pieces = parameter_pieces(model, checkpoint.shapes)
    except Exception as error:  # whatever a model unlike these, or another transformers, raises
        progress.note(f"the model cannot be run block by block, and is loaded whole: {type(error).__name__}: {error}")
        return None
    if getattr(config, "quantization_config", None):  # weights that are nothing without their scales
        return None
    # Tied weights are one parameter, listed once, under the name that the checkpoint has or its twin.
    tied = dict(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {})
    if pieces is None or not isinstance(layers, torch.nn.ModuleList):
        return None
    if any(name not in pieces and tied.get(name) not in pieces for name, _ in model.named_parameters()):
        return None
    model.eval().requires_grad_(False)
    found = BlockModel(model, checkpoint, pieces, device, resident)
    return found if _runs_by_blocks(found, probe) else None


def _runs_by_blocks(model: BlockModel, probe: int) -> bool:
    import torch

    tokens = torch.zeros(1, probe, dtype=torch.long, device=model.device)
    for model.tuples in (False, True):
        try:
            with torch.no_grad():
                hidden = model.embed(tokens)
                logits = model.output(hidden, tokens)
                shapes = []
                for index in (0, len(model.blocks) - 1):
                    with model.loaded(index):
                        shapes.append(model.run(index, hidden).shape)
        except Exception:  # a model whose code does not go with stand-ins
            continue
        plain = all(_is_plain(value) for named in model.arguments[1, probe] for value in named.values())
        if plain and logits.shape[:-1] == tokens.shape and all(shape == hidden.shape for shape in shapes):
            return True
    return False


def _is_plain(value: Any) -> bool:
    """Whether an argument of a block is no container that blocks could pass each other things in."""
    import torch

    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def _drop(block: Any) -> None:
    """Its weights, whose shapes and types stay known."""
    import torch

    for name, parameter in list(block.named_parameters()):
        _set(block, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))


def _set(module: Any, name: str, value: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile have parameters without memory, and real buffers."""
    import torch

    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]
