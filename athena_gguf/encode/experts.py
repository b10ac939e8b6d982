"""Encodes the stacked weights of a mixture of experts, every expert under the curvature of what it was sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from athena_gguf.encode.matrix import Encoded
from athena_gguf.encode.metric import layer_metric
from athena_gguf.encode.pool import EncodePool
from athena_gguf.format import AType

if TYPE_CHECKING:
    import torch

IN_FLIGHT = 8  # experts whose metrics are held on the CPU; a GPU holds one


def encode_experts(
    pool: EncodePool,
    weights: Mapping[str, torch.Tensor],
    kinds: Mapping[str, AType],
    matrices: torch.Tensor,
    damping: float,
    first_expert: int = 0,
) -> dict[str, Encoded]:
    """The tensors `weights` [experts, rows, columns] of one input, by name, under `matrices` [experts, columns,
    columns]; the data is [experts, rows, row bytes]. `first_expert`: the number of the first of them. Raises
    AthenaError naming the tensor if a curvature is none."""
    parts: dict[str, list[Encoded]] = {name: [] for name in weights}
    waiting: deque[tuple[str, Callable[[], Encoded]]] = deque()

    def collect(most: int) -> None:
        while len(waiting) > most:
            name, result = waiting.popleft()
            parts[name].append(result())

    first = next(iter(weights))
    for expert, matrix in enumerate(matrices):
        collect(0 if pool.gpu else IN_FLIGHT)
        device = weights[first].device
        about = f"{first}, expert {first_expert + expert}"
        metric = layer_metric(matrix, matrix.shape[-1], damping, about, device, pool.threads)
        for name, weight in weights.items():
            waiting.append((name, pool.submit(weight[expert], metric, kinds[name])))
    collect(0)
    return {name: _joined(found) for name, found in parts.items()}


def _joined(parts: list[Encoded]) -> Encoded:
    data = np.stack([part.data for part in parts])
    return Encoded(data, sum(part.loss for part in parts), sum(part.power for part in parts))
