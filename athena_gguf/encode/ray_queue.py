"""Encodes on a Ray cluster: a task for the tensors of one layer input, or for a share of large ones.

Weights and curvatures go through Ray's object store, so that machines need no access to any file. A share is whole
pieces of rows or whole experts, cut as on one machine: the bytes are the same, wherever the shares are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf import __version__
from athena_gguf.encode.matrix import Encoded, EncodeOptions
from athena_gguf.errors import AthenaError
from athena_gguf.memory import host_bytes

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from athena_gguf.cluster import Cluster
    from athena_gguf.encode.stage import Writer
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.gguf_file.reader import Tensor
    from athena_gguf.plan import Plan

SHARE = 1 << 26  # weights of a task, about; each task factors its curvature anew
RETRIES = 3  # of a task whose worker or machine is lost


@dataclass(frozen=True)
class _Share:
    """A part of a tensor along its first axis, the `at`th, which begins at `start`."""

    tensor: Tensor
    at: int
    start: int


@dataclass(frozen=True)
class _Task:
    shares: list[_Share]
    n_bytes: int


class RayQueue:
    """Keeps every machine of the cluster busy, with one task waiting for each that runs, as far as the object store and
    this machine's memory have room."""

    def __init__(self, plan: Plan, base: GGUFFile, settings: EncodeOptions, writer: Writer, cluster: Cluster) -> None:
        self.plan, self.base, self.settings, self.writer, self.cluster = plan, base, settings, writer, cluster
        self.ray = cluster.ray
        self.task = self.ray.remote(num_cpus=cluster.cpus, max_retries=RETRIES)(_encode)
        # The store writes to a disk what it has no room for. Half of it is left to what comes back and to others.
        self.room = min(cluster.store_bytes() // 2, host_bytes() // 8)
        self.running: dict[Any, _Task] = {}
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
        sent = None
        for shares in (_experts if stacked else _rows)(tensors):
            first = shares[0]
            part = curvature
            if stacked and curvature is not None:
                part = curvature[first.start : first.start + len(first.tensor.data)]
            size = sum(share.tensor.n_bytes for share in shares) + (0 if part is None else part.nbytes)
            self._collect(2 * self.cluster.slots() - 1, self.room - size)
            if part is not None and (stacked or sent is None):
                sent = self.ray.put(part)
            for share in shares:
                self.parts.setdefault(share.tensor.name, []).append(None)
            reference = self.task.remote(
                __version__,
                self.cluster.cpus,
                self.settings,
                {name: self.plan.encoded[name] for name in names},
                sent,
                self.ray.put([share.tensor for share in shares]),
                first.start,
            )
            self.running[reference] = _Task(shares, size)

    def drain(self) -> None:
        self._collect(0, 0)

    def _collect(self, tasks: int, n_bytes: int) -> None:
        """Wait until at most so many tasks, with inputs of at most so many bytes, are in flight; or none."""
        while self.running and (
            len(self.running) > tasks or sum(task.n_bytes for task in self.running.values()) > n_bytes
        ):
            (reference,), _ = self.ray.wait(list(self.running), num_returns=1)
            shares = self.running.pop(reference).shares
            for share, encoded in zip(shares, self._result(reference, shares[0].tensor.name), strict=True):
                self._put(share, encoded)

    def _result(self, reference: Any, name: str) -> list[Encoded]:
        errors = self.ray.exceptions
        try:
            return list(self.ray.get(reference))
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, AthenaError) else error from None
        except errors.RayError as error:  # the worker died, or its machine, or what it had sent is gone
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AthenaError(
                f"tensor {name}: its encoding on the Ray cluster was lost {RETRIES + 1} times: {said}; see whether the "
                "machines have memory enough. The same command goes on where this one stopped if it has a --work-dir"
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
    version: str,
    threads: int,
    settings: EncodeOptions,
    kinds: Mapping[str, str],
    curvature: npt.NDArray[np.float32] | None,
    tensors: Sequence[Tensor],
    first: int,
) -> list[Encoded]:
    """The task, on a worker."""
    if version != __version__:
        raise AthenaError(
            f"a machine of the Ray cluster has athena-gguf {__version__}, and this one {version}; install the same"
        )
    import torch

    from athena_gguf.encode.layer import encode_layer
    from athena_gguf.encode.pool import EncodePool

    # A copy: torch takes no memory that is read-only, as the object store's is.
    matrix = None if curvature is None else torch.from_numpy(curvature.copy())
    with EncodePool(settings, threads) as pool:
        return [encoded for _, encoded in encode_layer(pool, matrix, tensors, kinds, "cpu", first)]
