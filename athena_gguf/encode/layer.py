"""Encodes the tensors that read one layer input, on one device."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from athena_gguf.encode.experts import encode_experts
from athena_gguf.encode.matrix import Encoded
from athena_gguf.encode.metric import layer_metric
from athena_gguf.encode.pool import GPU_PIECE, EncodePool
from athena_gguf.format import TYPES

if TYPE_CHECKING:
    import torch


class Weights(Protocol):
    """A tensor of a file, or rows in memory."""

    @property
    def name(self) -> str: ...

    @property
    def n_elements(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def to_torch(self, device: torch.device | str) -> torch.Tensor:
        """As float32."""
        ...


def encode_layer(
    pool: EncodePool,
    matrix: torch.Tensor | None,
    tensors: Sequence[Weights],
    kinds: Mapping[str, str],
    device: torch.device | str,
    first_expert: int = 0,
    finished: Container[str] = (),
) -> Iterator[tuple[str, Encoded]]:
    """Name and encoding of every one of `tensors`: [rows, columns] under the curvature `matrix` [columns, columns] or,
    with None, the identity; [experts, rows, columns] under [experts, columns, columns]. `kinds`: A types by name;
    `first_expert`: the number of the first, for errors. `finished`: those that are not wanted any more; on a GPU they
    count where small tensors are encoded together, whose last bits depend on what they are together with. Raises
    AthenaError naming the tensor if a curvature is none.
    """
    wanted = [tensor for tensor in tensors if tensor.name not in finished]
    if matrix is not None and matrix.ndim > 2:
        weights = {tensor.name: tensor.to_torch(device) for tensor in wanted}
        types = {tensor.name: TYPES[kinds[tensor.name]] for tensor in wanted}
        yield from encode_experts(pool, weights, types, matrix, pool.options.damping, first_expert).items()
        return
    if pool.gpu:
        metric = layer_metric(matrix, tensors[0].columns, pool.options.damping, tensors[0].name, device, pool.threads)
        for batch in _batches(tensors, kinds):
            if all(tensor.name in finished for tensor in batch):
                continue
            on_card = [tensor.to_torch(device) for tensor in batch]
            found = pool.submit_together(on_card, metric, TYPES[kinds[batch[0].name]])
            del on_card
            yield from (
                (tensor.name, encoded)
                for tensor, encoded in zip(batch, found(), strict=True)
                if tensor.name not in finished
            )
        return
    for name, result in list(start_layer(pool, matrix, wanted, kinds)):
        yield name, result()


def _batches(tensors: Sequence[Weights], kinds: Mapping[str, str]) -> Iterator[list[Weights]]:
    """In order, those of one type together while they are small."""
    batch: list[Weights] = []
    for tensor in sorted(tensors, key=lambda tensor: kinds[tensor.name]):
        size = sum(other.n_elements for other in (*batch, tensor))
        if batch and (kinds[batch[0].name] != kinds[tensor.name] or size > GPU_PIECE):
            yield batch
            batch = []
        batch.append(tensor)
    if batch:
        yield batch


def start_layer(
    pool: EncodePool,
    matrix: torch.Tensor | None,
    tensors: Sequence[Weights],
    kinds: Mapping[str, str],
) -> Iterator[tuple[str, Callable[[], Encoded]]]:
    """As `encode_layer`, of tensors [rows, columns] on the CPU: the encoding of each begins when it is asked for, and
    its call waits for it."""
    metric = layer_metric(matrix, tensors[0].columns, pool.options.damping, tensors[0].name, "cpu", pool.threads)
    for tensor in tensors:
        yield tensor.name, pool.submit(tensor.to_torch("cpu"), metric, TYPES[kinds[tensor.name]])
