"""Encodes a model's blocks from the first to the last, each layer under the inputs that it has behind those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf import progress
from athena_gguf.encode.pool import EncodePool
from athena_gguf.encode.row_queue import RowEncoders
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.reader import Tensor
from athena_gguf.memory import cores
from athena_gguf.model.rows import PIECE, rows_in_file, same_rows
from athena_gguf.plan import block_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from athena_gguf.calibration.curvature import Curvature
    from athena_gguf.calibration.prefix import Anatomy, Halves, Prefix
    from athena_gguf.cards import Card
    from athena_gguf.encode import EncodeOptions
    from athena_gguf.encode.stage import Writer
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan


_EMBEDDINGS = "token_embd.weight"


class InOrder:
    """`take` what is known of the layers' inputs, in any order, then `run`. `opened` gives what the model runs in;
    `timed(name)` is a context that adds to a stage's time; `cards` encode a share of every tensor's rows."""

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[Prefix]],
        plan: Plan,
        base: GGUFFile,
        settings: EncodeOptions,
        writer: Writer,
        timed: Callable[[str], Any],
        cards: Sequence[Card] = (),
    ) -> None:
        self.opened, self.plan, self.base, self.cards = opened, plan, base, cards
        self.settings, self.writer, self.timed = settings, writer, timed
        self.groups: dict[str, tuple[Sequence[str], torch.Tensor]] = {}  # by name: all that read the input, and u
        self.finished: frozenset[str] = frozenset()  # before it began

    def take(self, curvature: Curvature, names: Sequence[str]) -> bool:
        """Whether the tensors `names` are of a block's layers, and so wait for `run`."""
        if curvature.weights is None or not all(map(block_of, names)):
            return False
        self.groups |= dict.fromkeys(names, (names, curvature.weights))
        return True

    def run(self) -> None:
        """Encode what was taken. Tensors that are finished stay as they are; blocks after the last that has something
        to encode are not run. Raises AthenaError naming the layer for an input that is not finite."""
        if not self.groups:
            return
        with self.timed("encoding"):
            self.writer.drain()
        self.finished = frozenset(self.writer.done.paths)
        with ExitStack() as exits:
            with self.timed("curvature"):
                self.prefix = prefix = exits.enter_context(self.opened())
                prefix.begin(self._embeddings())
            pool = exits.enter_context(EncodePool(self.settings, cores(), prefix.device))
            self.encoders = exits.enter_context(RowEncoders(pool, prefix.device, self.cards))
            last = max(prefix.places[name][0] for name in self.groups)
            for index in range(last + 1):
                names = {module: name for name, (n, module) in prefix.places.items() if n == index}
                with ExitStack() as block:
                    with self.timed("curvature"):
                        anatomy = block.enter_context(prefix.block(index))
                    self._block(index, anatomy, names)
                    if index < last:
                        with self.timed("curvature"):
                            prefix.go_on(index)

    def _embeddings(self) -> torch.Tensor | None:
        """Of the file as it will be [tokens, columns], on the host; None if they are none of it, and, with a warning,
        if the model looks up others."""
        import torch

        if _EMBEDDINGS not in self.finished:
            return None
        ours, theirs = self.base.tensors[_EMBEDDINGS], self.prefix.embeddings
        data = self.writer.done.data(_EMBEDDINGS)
        quantized = Tensor(_EMBEDDINGS, ours.shape, self.plan.kind(_EMBEDDINGS), data)
        found, step = torch.empty(theirs.shape, dtype=theirs.dtype), max(1, PIECE // ours.columns)
        same = ours.shape == tuple(theirs.shape)
        for a in range(0, len(found) if same else 0, step):
            rows = slice(a, a + step)
            same = same and same_rows(torch.from_numpy(ours.to_float32(rows)), theirs[rows].float().cpu())
            found[rows] = torch.from_numpy(quantized.to_float32(rows))
        if same:
            return found
        progress.note(f"warning: {_EMBEDDINGS} is not what the model looks up: its errors are not made up for")
        return None

    def _block(self, index: int, anatomy: Anatomy, names: Mapping[str, str]) -> None:
        """`names`: of the tensors, by module."""
        order = [(module, names[module]) for module in anatomy.order if module in names]
        ahead = [name for _, name in order if name in self.groups]
        rows = cache(partial(self._rows, index))
        for module, name in order:
            if name in ahead:
                group, weights = self.groups[name]
                ahead = [other for other in ahead if other not in group]
                with self.timed("curvature"):
                    alone = len(group) == 1 and rows(module, name) is not None
                    place = anatomy.streams.get(module) if alone else None
                    halves = self.prefix.moments(index, module, weights, place, last=not ahead)
                with self.timed("encoding"):
                    found = self._encode(group, rows(module, name), halves)
                for at, other in order:
                    if other in found:
                        self._put(index, at, rows(at, other), other, found[other])
            if name in self.finished:
                self._put(index, module, rows(module, name), name, self.writer.done.data(name))

    def _encode(
        self, group: Sequence[str], rows: torch.Tensor | None, halves: Halves
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """The bytes of tensors that read one input, which are put away too. `rows`: of the first of them."""
        import torch

        from athena_gguf.calibration.prefix import targets
        from athena_gguf.encode.metric import threads_for

        for half in halves:
            if half.lack is not None and rows is not None:  # in the file's order
                half.lack[rows] = half.lack.clone()
        weights = [self.base.tensors[name].to_torch(self.prefix.device) for name in group]
        with threads_for(halves[0].h):
            try:
                h, wanted = targets(weights, halves, self.settings.damping)
            except torch.linalg.LinAlgError as error:
                raise AthenaError(f"tensor {group[0]}: {error}; give more or other calibration text") from error
        del weights
        found = {}
        kinds = {name: self.plan.encoded[name] for name in group}
        for name, encoded in self.encoders.encode(h, dict(zip(group, wanted, strict=True)), kinds, self.finished):
            self.writer.put(name, encoded)
            found[name] = encoded.data
        return found

    def _rows(self, index: int, module: str, name: str) -> torch.Tensor | None:
        """For every row of a module its place in the file; None, with a warning, if the file has other rows."""
        rows = self.base.tensors[name].to_torch(self.prefix.device)
        found = rows_in_file(rows, self.prefix.weight(index, module).float())
        if found is None:
            progress.note(f"warning: {name} has other rows than the model's {module}: its errors are not made up for")
        return found

    def _put(self, index: int, module: str, rows: torch.Tensor | None, name: str, data: npt.NDArray[np.uint8]) -> None:
        """A tensor's bytes into the quantized model, unless the file has other rows than the module."""
        if rows is not None:
            self.prefix.put(index, module, self._decoded(name, data)[rows])

    def _decoded(self, name: str, data: npt.NDArray[np.uint8]) -> torch.Tensor:
        return Tensor(name, self.plan.shapes[name], self.plan.kind(name), data).to_torch(self.prefix.device)
