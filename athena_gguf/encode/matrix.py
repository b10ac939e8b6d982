"""Encodes weights under the curvature of their input: the loop of docs/method.md, "Encoding a matrix".

Columns are taken lane by lane. The first pass searches a lane after the errors of the lanes before it were fed back
(GPTQ's order of things, with a trellis search in place of rounding). Then scales are refitted and every lane is
searched again with all others fixed, in sweeps (cyclic coordinate descent on the same loss, as CDQuant, Nair and
Suggala 2024, does for single columns), none of which makes a row worse.

The dense algebra is torch's; the search inside a lane is `athena_gguf.encode.lane`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.encode.metric import Metric
from athena_gguf.encode.scales import ScaleFit, initial_scales
from athena_gguf.format import GROUP, LANES, AType, decode_scale, pack_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EncodeOptions:
    """`damping`: added to the curvature's diagonal, times its mean. `passes`: with error feedback from scratch.
    `sweeps`: of coordinate descent after them. Scales are refitted after every pass and every sweep."""

    damping: float = 0.01
    passes: int = 1
    sweeps: int = 4


@dataclass
class Encoded:
    """`data` [rows, row bytes]. `loss`, `power`: tr(E H E^T) and tr(W H W^T), H the damped curvature, E the error of
    the weights W."""

    data: npt.NDArray[np.uint8]
    loss: float
    power: float


def encode_matrix(weight: torch.Tensor, curvature: torch.Tensor | None, kind: AType, options: EncodeOptions) -> Encoded:
    """Encode `weight` [rows, columns] under `curvature` [columns, columns] (None: the identity), in this thread.

    Columns must be a multiple of 64 and all numbers finite. Raises ValueError if the curvature is not positive
    semidefinite.
    """
    metric = Metric.identity(weight.shape[1]) if curvature is None else Metric(curvature, options.damping)
    return encode_rows(weight, metric, kind, options)


def encode_rows(weight: torch.Tensor, metric: Metric, kind: AType, options: EncodeOptions) -> Encoded:
    """Encode rows `weight` [rows, columns]; rows do not influence each other."""
    encoder = _Encoder(weight.float(), metric, kind)
    best = encoder.run(options)
    symbols = best.symbols[:, metric.inverse.numpy()]
    power = ((encoder.w @ metric.h) * encoder.w).sum(dtype=best.loss.dtype)
    return Encoded(pack_rows(kind, symbols, best.codes), float(best.loss.double().sum()), float(power))


@dataclass
class _Solution:
    """Columns lane by lane. `symbols` [rows, columns] uint8, `values` [rows, columns] their levels, `codes` [rows,
    columns / 64] scale bytes, `loss` [rows]."""

    symbols: npt.NDArray[np.uint8]
    values: torch.Tensor
    codes: npt.NDArray[np.uint8]
    loss: torch.Tensor


class _Encoder:
    def __init__(self, weight: torch.Tensor, metric: Metric, kind: AType) -> None:
        from athena_gguf.encode.lane import lane_search

        self.metric, self.kind = metric, kind
        self.w = weight[:, metric.order].contiguous()
        self.search = lane_search(kind)
        self.fit = ScaleFit(weight, metric)
        self.lanes = [slice(a, a + metric.steps) for a in range(0, metric.columns, metric.steps)]

    def run(self, options: EncodeOptions) -> _Solution:
        codes = initial_scales(self.w, self.metric, self.kind)
        best = self.refit(self.feedback_pass(codes))
        for _ in range(options.passes - 1):
            best = _better(best, self.refit(self.feedback_pass(best.codes)))
        for _ in range(options.sweeps):
            best = self.refit(self.sweep(best))
        return best

    def expand(self, codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Scale bytes [rows, groups] to the scale of every column [rows, columns], lane by lane."""
        import torch

        steps = torch.from_numpy(decode_scale(codes)).repeat_interleave(GROUP // LANES, dim=1)
        return steps.repeat(1, LANES)

    def loss(self, values: torch.Tensor, codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        error = self.w - values * self.expand(codes)
        return ((error @ self.metric.h) * error).sum(1)

    def refit(self, found: _Solution) -> _Solution:
        """New scales where they lower a row's loss."""
        codes = self.fit.refit(found.values[:, self.metric.inverse], found.codes)
        return _better(found, _Solution(found.symbols, found.values, codes, self.loss(found.values, codes)))

    def feedback_pass(self, codes: npt.NDArray[np.uint8]) -> _Solution:
        """All lanes once, every lane after the errors of those before it were fed back."""
        import torch

        scale, x = self.expand(codes), self.w.clone()
        symbols, values = np.empty(x.shape, np.uint8), torch.empty_like(x)
        for lane in self.lanes:
            upper = self.metric.upper[lane]
            symbols[:, lane], values[:, lane], errors, _ = self.search_lane(x[:, lane], upper[:, lane], scale[:, lane])
            x[:, lane.stop :] -= errors @ upper[:, lane.stop :]
        return _Solution(symbols, values, codes, self.loss(values, codes))

    def sweep(self, found: _Solution) -> _Solution:
        """All lanes once, each with every other one fixed; a row's lane changes only if that lowers the row's loss."""
        import torch

        h, scale = self.metric.h, self.expand(found.codes)
        symbols, values = found.symbols.copy(), found.values.clone()
        pull = (self.w - values * scale) @ h  # half the gradient of the loss
        for number, lane in enumerate(self.lanes):
            old = values[:, lane] * scale[:, lane]
            # Completing the square: with the other lanes fixed, the loss is the distance to this target under the
            # lane's own block of h, and a constant.
            shift = pull[:, lane] @ self.metric.lane_inverses[number]
            new_symbols, new_values, _, cost = self.search_lane(
                old + shift, self.metric.lane_factors[number], scale[:, lane]
            )
            better = cost < (pull[:, lane] * shift).sum(1)
            symbols[:, lane] = np.where(better.numpy()[:, None], new_symbols, symbols[:, lane])
            values[:, lane] = torch.where(better[:, None], new_values, values[:, lane])
            pull.addmm_(old - values[:, lane] * scale[:, lane], h[lane])
        return _better(found, _Solution(symbols, values, found.codes, self.loss(values, found.codes)))

    def search_lane(
        self, x: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor
    ) -> tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Symbols, levels, errors (over the factor's diagonal) [rows, steps] and cost [rows] of one lane."""
        import torch

        symbols, cost = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
        values, errors = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
        inputs = (np.ascontiguousarray(m.numpy()) for m in (x, factor, scale))
        self.search(*inputs, symbols, values, errors, cost)
        return symbols, torch.from_numpy(values), torch.from_numpy(errors), torch.from_numpy(cost)


def _better(one: _Solution, other: _Solution) -> _Solution:
    """Row by row the one with the lower loss, the first where they tie."""
    import torch

    take = other.loss < one.loss
    pick = take.numpy()[:, None]
    return _Solution(
        np.where(pick, other.symbols, one.symbols),
        torch.where(take[:, None], other.values, one.values),
        np.where(pick, other.codes, one.codes),
        torch.where(take, other.loss, one.loss),
    )
