"""The damped curvature of a layer input in the forms that encoding needs, computed once for all weights it is for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from athena_gguf.errors import AthenaError
from athena_gguf.format import LANES

if TYPE_CHECKING:
    import torch


_WIDE = 4096  # columns from which a factorization is worth all cores, whatever else they do


class Metric:
    """Columns are ordered lane by lane except where said.

    `order`, `inverse` [columns]: to that order and back. `plain` [columns, columns]: damped curvature, natural order;
    `h`: the same, lane by lane. `upper`: triangular, with upper^T upper = h^-1. For every lane, given all others:
    `lane_factors` [lanes, steps, steps] the same of its own block of h, `lane_inverses` the inverse of that block.
    """

    def __init__(self, curvature: torch.Tensor, damping: float) -> None:
        """`curvature` [columns, columns], symmetric, columns a multiple of 64; `damping`: of its mean diagonal.

        Raises ValueError if it is not positive semidefinite.
        """
        import torch

        self.columns = len(curvature)
        self.steps = self.columns // LANES
        self.order = torch.arange(self.columns).reshape(-1, LANES).T.flatten()
        self.inverse = torch.argsort(self.order)
        damp = damping * (float(curvature.diagonal().mean(dtype=torch.float64)) or 1.0)
        self.plain = curvature.float().clone()
        self.plain.diagonal().add_(damp)
        self.h = self.plain[self.order][:, self.order].contiguous()
        self.upper = _inverse_factor(self.h)
        lanes = self.h.view(LANES, self.steps, LANES, self.steps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.lane_factors = _inverse_factor(lanes)
        self.lane_inverses = (self.lane_factors.mT @ self.lane_factors).contiguous()

    @classmethod
    def identity(cls, columns: int) -> Metric:
        """For weights without a curvature: plain squared error."""
        import torch

        return cls(torch.eye(columns), 0.0)


def layer_metric(curvature: torch.Tensor | None, columns: int, damping: float, tensor_name: str) -> Metric:
    """Of the curvature of a tensor's input, plain squared error if there is none. Raises AthenaError naming the tensor
    if the curvature is not positive semidefinite."""
    try:
        return Metric.identity(columns) if curvature is None else Metric(curvature, damping)
    except ValueError as error:
        raise AthenaError(f"tensor {tensor_name}: {error}; give more or other calibration text") from error


def _inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = h^-1, of one matrix or a batch; float32, computed in float64."""
    import torch

    threads = torch.get_num_threads()
    if h.shape[-1] >= _WIDE:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        lower, failed = torch.linalg.cholesky_ex(h.double())
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    finally:
        torch.set_num_threads(threads)
    if failed.any():
        raise ValueError("the curvature is not positive definite, even damped")
    return upper.float().contiguous()
