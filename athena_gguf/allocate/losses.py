"""The loss that every type would cost every tensor, in nats a token of KL divergence, from samples of its rows.

To second order, an error E of a weight with inputs x_t adds 1/2 mean_t (g_t . E x_t)^2 to the divergence, g_t the
gradient of the token loss at its output. With the direction of g_t taken as spread evenly over the outputs,

    1/2 mean_t |g_t|^2 / rows * tr(E H E^T)

with H the normalized curvature of the input; `Curvature.gradient_squares` says how the mean is taken. Errors of
different tensors are taken as independent, so losses add up.
Embeddings where they are looked up have the row's number for an input: with y_t the row and W all of them,

    1/2 mean_t |g_t|^2 |y_t|^2 / columns * |E|^2 / |W|^2

A weight whose gradients were not measured counts as the average one, an expert as often as it is used. Of a block's
experts some are looked at, each with its own H, drawn by their share of mean_t |g_t|^2.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
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

    from athena_gguf.calibration import Curvature, LayerInput, Lookup
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.encode import Encoded, EncodePool, Metric
    from athena_gguf.plan import Plan

METHOD = 6  # raised when the same inputs give other losses
STANDARD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # those that gguf-py can make
ROWS = 32  # encoded with each A type, at most
SHARE = 24  # and at most one in so many
FEWEST = 12  # but no fewer
STANDARD_ROWS = 128  # made in each standard type, at most
EXPERTS = 4  # of a block that are looked at, at most
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

        for curvature, names in _groups(plan, calibration):
            found: dict[str, list[tuple[float, Callable[[], dict[str, float]]]]] = {name: [] for name in names}
            for expert, share, of in _parts(curvature, np.random.default_rng([seed, len(losses) + len(waiting)])):
                metric, matrix = None, None if curvature is None else curvature.matrix[expert].to(device)
                if any(name in plan.fitting for name in names):
                    metric = layer_metric(matrix, plan.shapes[names[0]][-1], settings.damping, names[0], device)
                samples = []
                for place, name in enumerate(names):
                    number = [len(losses) + len(waiting) + place]
                    tensor, sensitivity = base.tensors[name].flat, sensitivities[name]
                    if isinstance(expert, int):
                        tensor, sensitivity = _of_expert(base.tensors[name], sensitivity, expert)
                        number.append(expert)
                    rng = np.random.default_rng([seed, *number])
                    samples.append(_sample(tensor, candidates(plan, name), sensitivity, rng, of))
                for name, started in zip(names, _start(samples, matrix, metric, pool), strict=True):
                    found[name].append((share, started))
            for name in names:
                waiting.append((name, partial(_sum, found[name])))
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


def _groups(plan: Plan, calibration: Calibration) -> Iterator[tuple[Curvature | None, list[str]]]:
    measured = set()
    for c in calibration.stream():
        names = [n for n in c.about.tensor_names if n in plan.shapes]
        measured.update(names)
        if names:
            yield c, names
    for name in plan.shapes:
        if name not in measured:
            yield None, [name]


def _parts(curvature: Curvature | None, rng: np.random.Generator) -> list[tuple[Any, float, int]]:
    """Which matrices of a curvature are looked at, the share of each, and how many there are; experts are drawn by
    their share, evenly, if there are many. All that there is, where there is one matrix or none."""
    if curvature is None or curvature.matrix.ndim == 2:
        return [(..., 1.0, 1)]
    shares = np.asarray(curvature.about.shares)
    if len(shares) > EXPERTS:
        drawn = np.searchsorted(np.cumsum(shares), (np.arange(EXPERTS) + rng.random()) / EXPERTS)
        shares = np.bincount(drawn.clip(0, len(shares) - 1), minlength=len(shares)) / EXPERTS
    those = np.flatnonzero(shares)
    return [(int(expert), float(shares[expert]), len(those)) for expert in those]


def _of_expert(tensor: Tensor, sensitivity: _Sensitivity, expert: int) -> tuple[Tensor, _Sensitivity]:
    """As if it were the only one."""
    experts, rows, columns = tensor.shape
    one = Tensor(tensor.name, (rows, columns), tensor.type_name, tensor.data[expert])
    powers = sensitivity.powers.reshape(experts, rows)[expert]
    return one, _Sensitivity(sensitivity.output * experts, 0.0, powers)


def _sum(parts: list[tuple[float, Callable[[], dict[str, float]]]]) -> dict[str, float]:
    """The losses of parts of a tensor, each times its share."""
    found = [(share, losses()) for share, losses in parts]
    return {kind: sum(share * of[kind] for share, of in found) for kind in found[0][1]}


def _sensitivities(base: GGUFFile, plan: Plan, inputs: list[LayerInput], lookup: Lookup) -> dict[str, _Sensitivity]:
    from athena_gguf.plan import EMBEDDINGS

    found: dict[str, _Sensitivity] = {}
    measured: list[float] = []
    weights = 0
    for c in inputs:
        for name, square in zip(c.tensor_names, c.gradient_squares, strict=True):
            if name not in plan.shapes:
                continue
            powers = _powers(base.tensors[name].flat)
            found[name] = _Sensitivity(square / 2 / len(powers), 0.0, powers)
            measured.append(found[name].output * powers.sum() * c.mean_diagonal)
            weights += plan.elements(name)
    # Inputs come in another order where they were measured before; the exact sum has none.
    average = math.fsum(measured) / weights if weights else 1.0
    for name, shape in plan.shapes.items():
        looked_up = name in EMBEDDINGS and name != "output.weight"
        if name in found and not looked_up:
            continue
        powers = found[name].powers if name in found else _powers(base.tensors[name].flat)
        whole = average * plan.elements(name)
        if len(shape) > 2 and plan.experts_used is not None and plan.experts_used < shape[0]:
            whole *= plan.experts_used / shape[0]
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


@dataclass(frozen=True)
class _Sample:
    """Of a tensor's rows, `few` that are encoded, and `some` that are made in the standard types of `kinds`."""

    tensor: Tensor
    kinds: tuple[str, ...]
    sensitivity: _Sensitivity
    few: npt.NDArray[np.intp]
    some: npt.NDArray[np.intp]


def _sample(
    tensor: Tensor, kinds: tuple[str, ...], sensitivity: _Sensitivity, rng: np.random.Generator, of: int
) -> _Sample:
    """Of a tensor, or of one of as many experts as `of` says."""
    count = tensor.shape[0]
    few = _spread(count, -(-min(ROWS, max(FEWEST, of * count // SHARE)) // of), rng)
    return _Sample(tensor, kinds, sensitivity, few, _spread(count, -(-STANDARD_ROWS // of), rng))


def _start(
    samples: Sequence[_Sample], matrix: torch.Tensor | None, metric: Metric | None, pool: EncodePool
) -> list[Callable[[], dict[str, float]]]:
    """Begin with samples of tensors that read one input; what this returns waits for the losses of the types of each,
    without that of the stored one."""
    import torch

    encodings: list[dict[str, Callable[[], Encoded]]] = [{} for _ in samples]
    if metric is not None:
        weights = [torch.from_numpy(sample.tensor.to_float32(sample.few)) for sample in samples]
        for kind in TYPES:
            those = [n for n, sample in enumerate(samples) if kind in sample.kinds]
            # One of them alone leaves most of a GPU idle; on the CPU threads take one each.
            for batch in [those] if pool.gpu and those else [[n] for n in those]:
                # The first to ask puts the batch's results together.
                together = cache(pool.submit_together([weights[n] for n in batch], metric, TYPES[kind]))
                for place, n in enumerate(batch):
                    encodings[n][kind] = partial(_nth, together, place)

    def finish(n: int) -> dict[str, float]:
        sample, found = samples[n], {}
        for kind, encoding in encodings[n].items():
            decoded = decode_rows(TYPES[kind], encoding().data, sample.tensor.columns)
            found[kind] = _loss(decoded - weights[n].numpy(), sample.few, sample.sensitivity, matrix)
        values = sample.tensor.to_float32(sample.some)
        for kind in sample.kinds[:-1]:
            if kind not in TYPES:
                error = Tensor("", sample.tensor.shape, kind, quantize(values, kind)).to_float32() - values
                found[kind] = _loss(error, sample.some, sample.sensitivity, matrix)
        return found

    # A worker that waits here holds nobody up: the encodings were submitted before, so they are running or done.
    return [pool.executor.submit(finish, n).result for n in range(len(samples))]


def _nth(together: Callable[[], list[Encoded]], place: int) -> Encoded:
    return together()[place]


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
