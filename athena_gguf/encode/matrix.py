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
    columns / 64] scale bytes; `pull` [rows, columns] the error times the curvature, `loss` [rows]."""

    symbols: npt.NDArray[np.uint8]
    values: torch.Tensor
    codes: npt.NDArray[np.uint8]
    pull: torch.Tensor
    loss: torch.Tensor


class _Encoder:
    def __init__(self, weight: torch.Tensor, metric: Metric, kind: AType) -> None:
        self.metric, self.kind = metric, kind
        self.w = weight[:, metric.order].contiguous()
        self.fit = ScaleFit(weight, metric)

    def run(self, options: EncodeOptions) -> _Solution:
        codes = initial_scales(self.w, self.metric, self.kind)
        best = self.refit(self.feedback_pass(codes))
        for _ in range(options.passes - 1):
            best = _better(best, self.refit(self.feedback_pass(best.codes)))
        for _ in range(options.sweeps):
            best = self.refit(self.sweep(best))
        return best

    def solution(self, symbols: npt.NDArray[np.uint8], values: torch.Tensor, codes: npt.NDArray[np.uint8]) -> _Solution:
        error = self.w - values * self.expand(codes)
        pull = error @ self.metric.h
        return _Solution(symbols, values, codes, pull, (error * pull).sum(1))

    def expand(self, codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Scale bytes [rows, groups] to the scale of every column [rows, columns], lane by lane."""
        import torch

        steps = torch.from_numpy(decode_scale(codes)).repeat_interleave(GROUP // LANES, dim=1)
        return steps.repeat(1, LANES)

    def refit(self, found: _Solution) -> _Solution:
        """New scales where they lower a row's loss."""
        codes = self.fit.refit(found.values[:, self.metric.inverse], found.codes)
        return _better(found, self.solution(found.symbols, found.values, codes))

    def feedback_pass(self, codes: npt.NDArray[np.uint8]) -> _Solution:
        """All lanes once, every lane after the errors of those before it were fed back."""
        import torch

        from athena_gguf.encode.passes import feedback_pass

        x, scale = self.w.numpy().copy(), self.expand(codes).numpy()
        symbols, values = np.empty(x.shape, np.uint8), np.empty(x.shape, np.float32)
        feedback_pass(self.kind)(x, self.metric.upper.numpy(), scale, symbols, values)
        return self.solution(symbols, torch.from_numpy(values), codes)

    def sweep(self, found: _Solution) -> _Solution:
        """All lanes once, each with every other one fixed."""
        import torch

        from athena_gguf.encode.passes import sweep

        symbols, values, pull = found.symbols.copy(), found.values.numpy().copy(), found.pull.numpy().copy()
        scale, metric = self.expand(found.codes), self.metric
        lanes = (metric.lane_factors.numpy(), metric.lane_inverses.numpy())
        sweep(self.kind)(pull, metric.h.numpy(), *lanes, scale.numpy(), symbols, values)
        moved = torch.from_numpy(values)
        loss = ((self.w - moved * scale) * torch.from_numpy(pull)).sum(1)
        return _better(found, _Solution(symbols, moved, found.codes, torch.from_numpy(pull), loss))


def _better(one: _Solution, other: _Solution) -> _Solution:
    """Row by row the one with the lower loss, the first where they tie."""
    import torch

    take = other.loss < one.loss
    pick = take.numpy()[:, None]
    return _Solution(
        np.where(pick, other.symbols, one.symbols),
        torch.where(take[:, None], other.values, one.values),
        np.where(pick, other.codes, one.codes),
        torch.where(take[:, None], other.pull, one.pull),
        torch.where(take, other.loss, one.loss),
    )
