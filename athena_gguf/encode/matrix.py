"""Encodes weights under the curvature of their input: the loop of docs/method.md, "Encoding a matrix".

Columns are taken lane by lane. The first pass searches a lane after the errors of the lanes before it were fed back
(GPTQ's order of things, with a trellis search in place of rounding). Then scales are refitted and every lane is
searched again with all others fixed, in sweeps (cyclic coordinate descent on the same loss, as CDQuant, Nair and
Suggala 2024, does for single columns), none of which makes a row worse.

The steps themselves are those of `athena_gguf.encode.cpu` or, for a metric on a GPU, `athena_gguf.encode.cuda`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.encode.metric import Metric
from athena_gguf.encode.scales import expand
from athena_gguf.format import LANES, AType, pack_rows

if TYPE_CHECKING:
    import torch

    from athena_gguf.encode.cpu import CpuSteps
    from athena_gguf.encode.cuda.engine import CudaSteps


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


def encode_rows(
    weight: torch.Tensor, metric: Metric, kind: AType, options: EncodeOptions, gpu: bool | None = None
) -> Encoded:
    """Encode rows `weight` [rows, columns] on the device of the metric; rows do not influence each other.

    `gpu`: with the CUDA kernels; None for where the device is one.
    """
    return encode_each(weight, metric, kind, options, gpu).total()


@dataclass
class EncodedRows:
    """As `Encoded`, with the `loss` and `power` of every row, float64."""

    data: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]

    def total(self, first: int = 0, last: int | None = None) -> Encoded:
        """Of the rows from `first` to before `last`."""
        of = slice(first, last)
        return Encoded(self.data[of], float(self.loss[of].sum()), float(self.power[of].sum()))


def encode_each(
    weight: torch.Tensor, metric: Metric, kind: AType, options: EncodeOptions, gpu: bool | None = None
) -> EncodedRows:
    """As `encode_rows`."""
    gpu = metric.device.type == "cuda" if gpu is None else gpu
    encoder = _Encoder(weight.to(metric.device).float(), metric, kind, gpu)
    best = encoder.run(options)
    data = pack_rows(kind, best.symbols[:, metric.inverse], best.codes)
    power = (encoder.steps.product(encoder.w) * encoder.w).sum(1)
    return EncodedRows(_on_host(data), best.loss.double().cpu().numpy(), power.double().cpu().numpy())


def _on_host(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    """By way of pinned memory, which a GPU writes to ten times as fast."""
    import torch

    if x.is_cuda:
        x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x).clone()
    return x.numpy()


@dataclass
class _Solution:
    """Columns lane by lane. `symbols` [rows, columns] uint8, `values` [rows, columns] int8 their levels, `codes` [rows,
    columns / 64] uint8 scale bytes; `pull` [rows, columns] the error times the curvature, `loss` [rows]."""

    symbols: torch.Tensor
    values: torch.Tensor
    codes: torch.Tensor
    pull: torch.Tensor
    loss: torch.Tensor


class _Encoder:
    def __init__(self, weight: torch.Tensor, metric: Metric, kind: AType, gpu: bool) -> None:
        self.metric = metric
        self.w = weight[:, metric.order]
        self.steps: CpuSteps | CudaSteps
        if gpu:
            from athena_gguf.encode.cuda.engine import CudaSteps

            self.steps = CudaSteps(self.w, metric, kind)
        else:
            from athena_gguf.encode.cpu import CpuSteps

            self.steps = CpuSteps(self.w, metric, kind)

    def run(self, options: EncodeOptions) -> _Solution:
        best = self.refit(self.feedback_pass(self.steps.initial_scales()))
        for _ in range(options.passes - 1):
            best = _better(best, self.refit(self.feedback_pass(best.codes)))
        for _ in range(options.sweeps):
            best = self.refit(self.sweep(best))
        return best

    def solution(self, symbols: torch.Tensor, values: torch.Tensor, codes: torch.Tensor) -> _Solution:
        error = self.w - values * expand(codes).repeat(1, LANES)
        pull = self.steps.product(error)
        return _Solution(symbols, values, codes, pull, (error * pull).sum(1))

    def refit(self, found: _Solution) -> _Solution:
        """New scales where they lower a row's loss."""
        codes = self.steps.refit(found.values, found.codes)
        return _better(found, self.solution(found.symbols, found.values, codes))

    def feedback_pass(self, codes: torch.Tensor) -> _Solution:
        symbols, values = self.steps.feedback_pass(expand(codes))
        return self.solution(symbols, values, codes)

    def sweep(self, found: _Solution) -> _Solution:
        symbols, values, pull = found.symbols.clone(), found.values.clone(), found.pull.clone()
        scale = expand(found.codes)
        self.steps.sweep(pull, scale, symbols, values)
        loss = ((self.w - values * scale.repeat(1, LANES)) * pull).sum(1)
        return _better(found, _Solution(symbols, values, found.codes, pull, loss))


def _better(one: _Solution, other: _Solution) -> _Solution:
    """Row by row the one with the lower loss, the first where they tie."""
    import torch

    take = other.loss < one.loss
    row = take[:, None]
    return _Solution(
        torch.where(row, other.symbols, one.symbols),
        torch.where(row, other.values, one.values),
        torch.where(row, other.codes, one.codes),
        torch.where(row, other.pull, one.pull),
        torch.where(take, other.loss, one.loss),
    )
