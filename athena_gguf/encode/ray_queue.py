"""Encodes on a Ray cluster: a task for the tensors of one layer input, or for a share of large ones.

Weights and curvatures go through Ray's object store, so that machines need no access to any file. A share is whole
pieces of rows or whole experts, cut as on one machine: the bytes are the same, wherever the shares are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf.cluster import RETRIES, check_package, first_line, package, task_error
from athena_gguf.encode.experts import IN_FLIGHT
from athena_gguf.encode.matrix import Encoded, EncodeOptions
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.reader import Tensor
from athena_gguf.memory import host_bytes

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from athena_gguf.cluster import Cluster
    from athena_gguf.encode.stage import Writer
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan

SHARE = 1 << 26  # weights of a task, about; each task factors its curvature anew
LOOK = 30.0  # seconds without an end of a task after which the machines are counted
_METRIC = 34  # bytes for each pair of columns that a Metric is made in
_WORKER = 1 << 29  # bytes of a worker that has loaded everything
_ROUND = 1 << 28  # of the memory that tasks ask for: workers are leased by what they ask for


@dataclass(frozen=True)
class _Share:
    """A part of a tensor along its first axis, the `at`th, which begins at `start`."""

    tensor: Tensor
    at: int
    start: int


@dataclass(eq=False)
class _Sent:
    """A curvature in the object store, from when `reference` is one, which tasks share."""

    array: npt.NDArray[np.float32]
    n_bytes: int
    reference: Any = None


@dataclass(frozen=True)
class _Task:
    """`names`: of all tensors of its layer input; `n_bytes`: of its weights; `memory`: bytes that it takes."""

    shares: list[_Share]
    names: Sequence[str]
    curvature: _Sent | None
    n_bytes: int
    memory: int


@dataclass(frozen=True)
class _Running:
    """`weights`: in the object store; `apart`: it may not run on this machine."""

    task: _Task
    weights: Any
    apart: bool


class RayQueue:
    """Keeps every machine of the cluster busy, with one task waiting for each that runs, as far as the object store and
    this machine's memory have room.

    `measures`: curvatures are measured on the processors of this machine. It then gets tasks only while the others have
    enough and the measurement waits for them: both at once would wait for each other.
    """

    def __init__(
        self, plan: Plan, base: GGUFFile, settings: EncodeOptions, writer: Writer, cluster: Cluster, measures: bool
    ) -> None:
        self.plan, self.base, self.settings, self.writer, self.cluster = plan, base, settings, writer, cluster
        self.measures, self.here = measures, cluster.here()
        self.ray = cluster.ray
        self.remote = self.ray.remote(num_cpus=cluster.cpus, max_retries=RETRIES)(_encode)
        # The store writes to a disk what it has no room for. Half of it is left to what comes back and to others.
        self.room = min(cluster.store_bytes() // 2, host_bytes() // 8)
        self.running: dict[Any, _Running] = {}
        self.parts: dict[str, list[Encoded | None]] = {}

    def __enter__(self) -> RayQueue:
        return self

    def __exit__(self, *exception: object) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)

    def add(self, matrix: torch.Tensor | None, names: Sequence[str]) -> None:
        """Start with tensors that read an input of this curvature."""
        tensors = [self.base.tensors[name] for name in names]
        curvature = None if matrix is None else matrix.float().cpu().numpy()
        stacked = curvature is not None and curvature.ndim > 2
        sent = None if curvature is None else _Sent(curvature, curvature.nbytes)
        for shares in (_experts if stacked else _rows)(tensors):
            first = shares[0]
            if stacked and curvature is not None:
                part = curvature[first.start : first.start + len(first.tensor.data)]
                sent = _Sent(part, part.nbytes)
            n_bytes = sum(share.tensor.n_bytes for share in shares)
            task = _Task(shares, names, sent, n_bytes, self._memory(shares, sent))
            apart = self._place(task)
            for share in shares:
                self.parts.setdefault(share.tensor.name, []).append(None)
            if sent is not None and sent.reference is None:
                sent.reference = self.ray.put(sent.array)
            # As plain data: what is wrong with a machine's version is said before classes of ours are needed there.
            weights = [(t.name, t.shape, t.type_name, t.data) for t in (share.tensor for share in shares)]
            self._start(task, self.ray.put(weights), apart)

    def pause(self) -> None:
        """Wait for what may run on this machine if that measures, and for everything if there is no other."""
        others = self.cluster.slots().keys() - {self.here}
        if not others:
            self.drain()
        elif self.measures:
            while not all(running.apart for running in self.running.values()):
                self._collect()

    def drain(self) -> None:
        while self.running:
            self._collect()

    def _memory(self, shares: Sequence[_Share], curvature: _Sent | None) -> int:
        """Bytes that a task takes, about, but no more than every machine has, where it could not run; 0 if none says
        what it has."""
        tensor = shares[0].tensor
        metrics = 1 if len(tensor.shape) == 2 else min(tensor.shape[0], IN_FLIGHT + 1)
        weights = 4 * sum(share.tensor.n_elements for share in shares)
        copy = 0 if curvature is None else curvature.n_bytes
        n_bytes = _WORKER + _METRIC * tensor.columns**2 * metrics + copy + weights
        return min(-(-n_bytes // _ROUND) * _ROUND, self.cluster.task_bytes())

    def _place(self, task: _Task) -> bool:
        """Wait until there is room for the task; whether it is to run on another machine than this."""
        while True:
            slots = self.cluster.slots()
            here = slots.pop(self.here, 0)
            if not self.measures or not slots:
                apart, free = False, len(self.running) < 2 * (sum(slots.values()) + here)
            else:
                loose = sum(not running.apart for running in self.running.values())
                apart = len(self.running) - loose < 2 * sum(slots.values())
                free = apart or loose < here
            if not self.running or (free and self._in_flight(task) <= self.room):
                return apart
            self._collect()

    def _in_flight(self, *more: _Task) -> int:
        """Bytes in the object store: the weights of every task, and every curvature once."""
        tasks = [running.task for running in self.running.values()] + list(more)
        curvatures = {id(task.curvature): task.curvature.n_bytes for task in tasks if task.curvature is not None}
        return sum(task.n_bytes for task in tasks) + sum(curvatures.values())

    def _start(self, task: _Task, weights: Any, apart: bool) -> None:
        options: dict[str, Any] = {"memory": task.memory} if task.memory else {}
        if apart:
            options["label_selector"] = {"ray.io/node-id": f"!{self.here}"}
        reference = self.remote.options(**options).remote(
            package(),
            self.cluster.cpus,
            vars(self.settings),
            {name: self.plan.encoded[name] for name in task.names},
            None if task.curvature is None else task.curvature.reference,
            weights,
            task.shares[0].start,
        )
        self.running[reference] = _Running(task, weights, apart)

    def _collect(self) -> None:
        """Wait for the end of a task, and take what it made."""
        while not (ended := self.ray.wait(list(self.running), num_returns=1, timeout=LOOK)[0]):
            if not self.cluster.slots().keys() - {self.here}:
                self._bring_here()
        shares = self.running.pop(ended[0]).task.shares
        for share, encoded in zip(shares, self._result(ended[0], shares[0].tensor.name), strict=True):
            self._put(share, encoded)

    def _bring_here(self) -> None:
        """The other machines are gone: what was to run there would wait for ever."""
        for reference, running in list(self.running.items()):
            if running.apart:
                self.ray.cancel(reference, force=True)
                del self.running[reference]
                self._start(running.task, running.weights, False)

    def _result(self, reference: Any, name: str) -> list[Encoded]:
        errors = self.ray.exceptions
        goes_on = "The same command goes on where this one stopped if it has a --work-dir"
        try:
            return list(self.ray.get(reference))
        except errors.RayTaskError as error:
            raise task_error(f"tensor {name}", error) from error
        except errors.OutOfMemoryError as error:
            raise AthenaError(
                f"tensor {name}: the machines of the Ray cluster had no memory for its encoding, {RETRIES + 1} times: "
                f"{first_line(error)}; end other programs there, or take machines with more. {goes_on}"
            ) from error
        except errors.RayError as error:  # the worker died, or its machine, or what it had sent is gone
            raise AthenaError(
                f"tensor {name}: its encoding on the Ray cluster was lost {RETRIES + 1} times: {first_line(error)}; "
                f"see whether the machines have memory enough. {goes_on}"
            ) from error

    def _put(self, share: _Share, encoded: Encoded) -> None:
        """Hand the tensor to the writer if this was the last share of it."""
        name = share.tensor.name
        self.parts[name][share.at] = encoded
        parts = [part for part in self.parts[name] if part is not None]
        if sum(len(part.data) for part in parts) == self.plan.shapes[name][0]:
            del self.parts[name]
            data = np.concatenate([part.data for part in parts])
            self.writer.put(name, Encoded(data, sum(part.loss for part in parts), sum(part.power for part in parts)))


def _rows(tensors: Sequence[Tensor]) -> Iterator[list[_Share]]:
    """Tasks' shares of tensors [rows, columns]."""
    from athena_gguf.encode.pool import PIECE

    found: list[_Share] = []
    for tensor in tensors:
        rows = max(1, SHARE // tensor.columns // PIECE) * PIECE
        for at, start in enumerate(range(0, tensor.shape[0], rows)):
            share = _Share(_cut(tensor, start, start + rows), at, start)
            if found and sum(s.tensor.n_elements for s in (*found, share)) > SHARE:
                yield found
                found = []
            found.append(share)
    yield found


def _experts(tensors: Sequence[Tensor]) -> Iterator[list[_Share]]:
    """Tasks' shares of tensors [experts, rows, columns]: the same experts of each."""
    count = tensors[0].shape[0]
    each = max(1, SHARE * count // sum(tensor.n_elements for tensor in tensors))
    for at, start in enumerate(range(0, count, each)):
        yield [_Share(_cut(tensor, start, start + each), at, start) for tensor in tensors]


def _cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    data = tensor.data[start:stop]
    return replace(tensor, shape=(len(data), *tensor.shape[1:]), data=data)


def _encode(
    sent: tuple[str, int],
    threads: int,
    settings: Mapping[str, Any],
    kinds: Mapping[str, str],
    curvature: npt.NDArray[np.float32] | None,
    weights: Sequence[tuple[str, tuple[int, ...], str, npt.NDArray[np.uint8]]],
    first: int,
) -> list[Encoded]:
    """The task, on a worker."""
    check_package(sent)
    import torch

    from athena_gguf.encode.layer import encode_layer
    from athena_gguf.encode.pool import EncodePool

    # A copy: torch takes no memory that is read-only, as the object store's is.
    matrix = None if curvature is None else torch.from_numpy(curvature.copy())
    tensors = [Tensor(*fields) for fields in weights]
    with EncodePool(EncodeOptions(**settings), threads) as pool:
        return [encoded for _, encoded in encode_layer(pool, matrix, tensors, kinds, "cpu", first)]
