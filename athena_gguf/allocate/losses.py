"""The loss that every type would cost every tensor, in nats a token of KL divergence, from samples of its rows.

To second order, an error E of a weight with inputs x_t adds 1/2 mean_t (g_t . E x_t)^2 to the divergence, g_t the
gradient of the token loss at its output. With the direction of g_t taken as spread evenly over the outputs,

    1/2 mean_t |g_t|^2 / rows * tr(E H E^T)

with H the normalized curvature of the input; `Curvature.gradient_squares` says how the mean is taken. Errors of
different tensors are taken as independent, so losses add up.
Embeddings where they are looked up have the row's number for an input: with y_t the row and W all of them,

    1/2 mean_t |g_t|^2 |y_t|^2 / columns * |E|^2 / |W|^2

A weight whose gradients were not measured counts as the average one, an expert as often as it is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from athena_gguf import progress
from athena_gguf.format import TYPES, decode_rows
from athena_gguf.gguf_file import GGUFFile, Tensor, quantize
from athena_gguf.gguf_file.types import row_bytes
from athena_gguf.memory import cores

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration import LayerInput, Lookup
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.encode import EncodePool, Metric
    from athena_gguf.plan import Plan

METHOD = 5  # raised when the same inputs give other losses
STANDARD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # those that gguf-py can make
ROWS = 32  # encoded with each A type, at most
SHARE = 24  # and at most one in so many
FEWEST = 12  # but no fewer
STANDARD_ROWS = 128  # made in each standard type, at most
_CHUNK = 1 << 24  # weights looked at in one go

Losses = dict[str, dict[str, float]]  # of a tensor's candidate types


def candidates(plan: Plan, name: str) -> tuple[str, ...]:
    """The types that a tensor can become; the last is that of the base file."""
    found = tuple(TYPES) if name in plan.fitting else ()
    for kind in STANDARD:
        try:
            row_bytes(kind, plan.shapes[name][-1])
        except ValueError:
            continue
        found += (kind,)
    return (*found, plan.stored[name])


def measure_losses(
    base_path: Path, plan: Plan, calibration: Calibration, settings: Any, device: Any, seed: int
) -> Losses:
    """Losses of the candidate types of every matrix, all 0 for the type that it has already.

    `calibration`: one that was streamed before. `settings`: the `EncodeOptions` of the conversion. Raises AthenaError
    naming the tensor if its curvature is none.
    """
    from athena_gguf.encode import EncodePool, layer_metric

    losses: Losses = {}
    threads = cores()
    with (
        GGUFFile(base_path) as base,
        EncodePool(settings, threads, device) as pool,
        progress.bar("losses of the types, from samples", sum(map(plan.elements, plan.shapes))) as advance,
    ):
        sensitivities = _sensitivities(base, plan, calibration.inputs, calibration.lookup)
        waiting: deque[tuple[str, Callable[[], dict[str, float]]]] = deque()

        def collect(tensors: int) -> None:
            """Wait until at most so many are in flight."""
            while len(waiting) > tensors:
                name, result = waiting.popleft()
                losses[name] = result() | {plan.stored[name]: 0.0}
                advance(plan.elements(name))

        for matrix, names in _groups(plan, calibration):
            metric = None
            matrix = None if matrix is None else matrix.to(device)
            if any(name in plan.fitting for name in names):
                metric = layer_metric(matrix, plan.shapes[names[0]][-1], settings.damping, names[0], device)
            for name in names:
                rng = np.random.default_rng([seed, len(losses) + len(waiting)])
                tensor = base.tensors[name].flat
                waiting.append(
                    (name, _start(tensor, candidates(plan, name), sensitivities[name], matrix, metric, pool, rng))
                )
                # Three encodings a tensor: enough that no thread waits, and few curvatures are held in five forms.
                collect(max(2, threads // 2))
        collect(0)
    return losses


@dataclass(frozen=True)
class _Sensitivity:
    """Loss of an error E: `output` * tr(E H E^T) + `plain` * |E|^2. `powers` [rows]: squared norms of the rows of
    weights. Errors are about in proportion to them, so a sample is scaled up by them."""

    output: float
    plain: float
    powers: npt.NDArray[np.float64]


def _groups(plan: Plan, calibration: Calibration) -> Iterator[tuple[torch.Tensor | None, list[str]]]:
    measured = set()
    for c in calibration.stream():
        names = [n for n in c.about.tensor_names if n in plan.shapes]
        measured.update(names)
        if names:
            yield c.matrix if c.matrix.ndim == 2 else c.matrix.mean(0), names  # of all experts
    for name in plan.shapes:
        if name not in measured:
            yield None, [name]


def _sensitivities(base: GGUFFile, plan: Plan, inputs: list[LayerInput], lookup: Lookup) -> dict[str, _Sensitivity]:
    from athena_gguf.plan import EMBEDDINGS

    found: dict[str, _Sensitivity] = {}
    loss = weights = 0.0
    for c in inputs:
        for name, square in zip(c.tensor_names, c.gradient_squares, strict=True):
            if name not in plan.shapes:
                continue
            powers = _powers(base.tensors[name].flat)
            found[name] = _Sensitivity(square / 2 / len(powers), 0.0, powers)
            loss += found[name].output * powers.sum() * c.mean_diagonal
            weights += plan.elements(name)
    average = loss / weights if weights else 1.0
    used = base.metadata.get(f"{plan.architecture}.expert_used_count")
    for name, shape in plan.shapes.items():
        looked_up = name in EMBEDDINGS and name != "output.weight"
        if name in found and not looked_up:
            continue
        powers = found[name].powers if name in found else _powers(base.tensors[name].flat)
        whole = average * plan.elements(name)
        if len(shape) > 2 and isinstance(used, int) and 0 < used < shape[0]:
            whole *= used / shape[0]
        if looked_up and lookup.power is not None:
            whole = lookup.power / 2 / shape[-1]
        plain = whole / (powers.sum() or 1.0)
        if name in found:  # embeddings that are the output matrix too
            found[name] = _Sensitivity(found[name].output, plain, found[name].powers)
        else:
            found[name] = _Sensitivity(0.0, plain, powers)
    return found


def _powers(tensor: Tensor) -> npt.NDArray[np.float64]:
    step = max(1, _CHUNK // tensor.columns)
    parts = []
    for a in range(0, tensor.shape[0], step):
        weights = tensor.to_float32(slice(a, a + step))
        parts.append(np.einsum("rc,rc->r", weights, weights, dtype=np.float64))
    return np.concatenate(parts)


def _start(
    tensor: Tensor,
    kinds: tuple[str, ...],
    sensitivity: _Sensitivity,
    matrix: torch.Tensor | None,
    metric: Metric | None,
    pool: EncodePool,
    rng: np.random.Generator,
) -> Callable[[], dict[str, float]]:
    """Begin with a tensor; what this returns waits for the losses of its types, without that of the stored one."""
    import torch

    count = tensor.shape[0]
    few = _spread(count, min(ROWS, max(FEWEST, count // SHARE)), rng)
    encodings = {}
    if metric is not None:
        weight = torch.from_numpy(tensor.to_float32(few))
        encodings = {kind: pool.submit(weight, metric, TYPES[kind]) for kind in kinds if kind in TYPES}

    some = _spread(count, STANDARD_ROWS, rng)

    def finish() -> dict[str, float]:
        found = {}
        for kind, encoding in encodings.items():
            decoded = decode_rows(TYPES[kind], encoding().data, tensor.columns)
            found[kind] = _loss(decoded - weight.numpy(), few, sensitivity, matrix)
        values = tensor.to_float32(some)
        for kind in kinds[:-1]:
            if kind not in TYPES:
                error = Tensor("", tensor.shape, kind, quantize(values, kind)).to_float32() - values
                found[kind] = _loss(error, some, sensitivity, matrix)
        return found

    # A worker that waits here holds nobody up: the encodings were submitted before, so they are running or done.
    return pool.executor.submit(finish).result


def _spread(rows: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """`count` rows, one of each of as many equal stretches; all if there are no more."""
    count = min(count, rows)
    return np.asarray((np.arange(count) + rng.random(count)) * rows / count, np.intp).clip(0, rows - 1)


def _loss(
    error: npt.NDArray[np.float32],
    rows: npt.NDArray[np.intp],
    sensitivity: _Sensitivity,
    matrix: torch.Tensor | None,
) -> float:
    import torch

    e = torch.from_numpy(error)
    if matrix is not None:
        e = e.to(matrix.device)
    loss = sensitivity.plain * float(e.square().sum(dtype=torch.float64))
    if matrix is not None and sensitivity.output:
        loss += sensitivity.output * float(((e @ matrix) * e).sum(dtype=torch.float64))
    sampled = sensitivity.powers[rows].sum()
    return loss * float(sensitivity.powers.sum() / sampled) if sampled else 0.0
