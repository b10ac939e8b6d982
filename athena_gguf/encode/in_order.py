"""Encodes a model's blocks from the first to the last, each layer under the inputs that it has behind those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf import progress
from athena_gguf.encode.layer import encode_layer
from athena_gguf.encode.pool import EncodePool
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.reader import Tensor
from athena_gguf.memory import cores
from athena_gguf.plan import block_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from athena_gguf.calibration.curvature import Curvature
    from athena_gguf.calibration.prefix import Anatomy, Moments, Prefix
    from athena_gguf.encode import EncodeOptions
    from athena_gguf.encode.stage import Writer
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan


class InOrder:
    """`take` what is known of the layers' inputs, in any order, then `run`. `opened` gives what the model runs in;
    `timed(name)` is a context that adds to a stage's time."""

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[Prefix]],
        plan: Plan,
        base: GGUFFile,
        settings: EncodeOptions,
        writer: Writer,
        timed: Callable[[str], Any],
    ) -> None:
        self.opened, self.plan, self.base = opened, plan, base
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
                prefix.begin()
            self.pool = exits.enter_context(EncodePool(self.settings, cores(), prefix.device))
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

    def _block(self, index: int, anatomy: Anatomy, names: Mapping[str, str]) -> None:
        """`names`: of the tensors, by module."""
        order = [(module, names[module]) for module in anatomy.order if module in names]
        ahead = [name for _, name in order if name in self.groups]
        for module, name in order:
            if name in ahead:
                group, weights = self.groups[name]
                ahead = [other for other in ahead if other not in group]
                with self.timed("curvature"):
                    rows = {other: self._rows(index, at, other) for at, other in order if other in group}
                    alone = len(group) == 1 and rows[name] is not None
                    place = anatomy.streams.get(module) if alone else None
                    moments = self.prefix.moments(index, module, weights, place, last=not ahead)
                with self.timed("encoding"):
                    found = self._encode(group, rows[name], moments)
                for at, other in order:
                    if other in found:
                        self._put(index, at, rows[other], other, found[other])
            if name in self.finished:
                self._put(index, module, self._rows(index, module, name), name, self.writer.done.data(name))

    def _encode(
        self, group: Sequence[str], rows: npt.NDArray[np.int64] | None, moments: Moments
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """The bytes of tensors that read one input, which are put away too. `rows`: of the first of them."""
        import torch

        from athena_gguf.calibration.prefix import targets
        from athena_gguf.encode.metric import threads_for

        device = self.prefix.device
        if moments.lack is not None and rows is not None:  # in the file's order
            moments.lack[torch.from_numpy(rows).to(device)] = moments.lack.clone()
        weights = [self.base.tensors[name].to_torch(device) for name in group]
        wanted = []
        with threads_for(moments.h):
            try:
                found_targets = targets(weights, moments, self.settings.damping)
            except torch.linalg.LinAlgError as error:
                raise AthenaError(f"tensor {group[0]}: {error}; give more or other calibration text") from error
        for name, target in zip(group, found_targets, strict=True):
            data = target.cpu().numpy()
            wanted.append(Tensor(name, data.shape, "F32", data.view(np.uint8)))
        found = {}
        kinds = self.plan.encoded
        for name, encoded in encode_layer(self.pool, moments.h, wanted, kinds, device, finished=self.finished):
            self.writer.put(name, encoded)
            found[name] = encoded.data
        return found

    def _rows(self, index: int, module: str, name: str) -> npt.NDArray[np.int64] | None:
        """For every row of a module its place in the file; None, with a warning, if the file has other rows."""
        from athena_gguf.tune.student import row_order

        rows = self.base.tensors[name].to_float32()
        weight = self.prefix.weight(index, module).float().cpu().numpy()
        found = row_order(rows, weight)
        if found is None:
            found = _rounded_order(rows, weight)
        if found is None:
            progress.note(f"warning: {name} has other rows than the model's {module}: its errors are not made up for")
        return found

    def _put(
        self, index: int, module: str, rows: npt.NDArray[np.int64] | None, name: str, data: npt.NDArray[np.uint8]
    ) -> None:
        """A tensor's bytes into the quantized model, unless the file has other rows than the module."""
        import torch

        if rows is not None:
            tensor = Tensor(name, self.plan.shapes[name], self.plan.kind(name), data)
            self.prefix.put(index, module, torch.from_numpy(tensor.to_float32()[rows]))


def _rounded_order(
    file_rows: npt.NDArray[np.float32], module_rows: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64] | None:
    """As `row_order` of rows that one side has rounded to another type of 16 bits: by their places along a line."""
    line = np.random.default_rng(0).standard_normal(file_rows.shape[1])
    order = np.empty(len(module_rows), np.int64)
    order[np.argsort(module_rows @ line)] = np.argsort(file_rows @ line)
    return order if np.allclose(file_rows[order], module_rows, rtol=2**-7, atol=2**-24) else None
