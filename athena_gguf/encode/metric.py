"""The damped curvature of a layer input in the forms that encoding needs, computed once for all weights it is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from athena_gguf.encode.horizon import band
from athena_gguf.errors import AthenaError
from athena_gguf.format import LANES
from athena_gguf.memory import cores

if TYPE_CHECKING:
    import torch


_WIDE = 4096  # columns from which a factorization is worth all threads, whatever else they do
_SMALL = 512  # columns up to which a triangular matrix is inverted by LAPACK's substitution


class Lanes:
    """What the searches of all lanes need: `factor` [lanes, steps, steps], upper triangular; `inverse`, of it; `unit`
    [lanes, steps], one over its diagonal."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor.contiguous()
        self.unit = self.factor.diagonal(dim1=1, dim2=2).reciprocal().contiguous()
        self.bands: dict[int, torch.Tensor] = {}

    def band(self, horizon: int) -> torch.Tensor:
        """[lanes, steps, horizon], of `athena_gguf.encode.horizon`."""
        if horizon not in self.bands:
            self.bands[horizon] = band(self.factor, horizon)
        return self.bands[horizon]

    @cached_property
    def inverse(self) -> torch.Tensor:
        return _invert_upper(self.factor.double()).float()


class Metric:
    """Columns are ordered lane by lane except where said.

    `order`, `inverse` [columns]: to that order and back. `plain` [columns, columns]: damped curvature, natural order;
    `h`: the same, lane by lane. `upper`: triangular, with upper^T upper = h^-1; `passing`: its diagonal blocks. For
    every lane, given all others: `sweeping` has the same factors of its own block of h, `lane_inverses` [lanes, steps,
    steps] the inverse of that block. All on the device of the curvature.
    """

    def __init__(self, curvature: torch.Tensor, damping: float, threads: int | None = None) -> None:
        """`curvature` [columns, columns], symmetric, columns a multiple of 64; `damping`: of its mean diagonal;
        `threads`: for wide ones on the CPU, None for all processors that this process may use.

        Raises ValueError if it is not positive semidefinite.
        """
        import torch

        self.columns = len(curvature)
        self.steps = self.columns // LANES
        self.device = curvature.device
        self.order = torch.arange(self.columns, device=self.device).reshape(-1, LANES).T.flatten()
        self.inverse = torch.argsort(self.order)
        damp = damping * (float(curvature.diagonal().mean(dtype=torch.float64)) or 1.0)
        self.plain = curvature.float().clone()
        self.plain.diagonal().add_(damp)
        self.h = self.plain[self.order][:, self.order]
        self.upper = _inverse_factor(self.h, threads)
        blocks = (LANES, self.steps, LANES, self.steps)
        self.passing = Lanes(self.upper.view(blocks).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        self.sweeping = Lanes(_inverse_factor(self.h.view(blocks).diagonal(dim1=0, dim2=2).permute(2, 0, 1), threads))
        self.lane_inverses = self.sweeping.factor.mT @ self.sweeping.factor

    @classmethod
    def identity(cls, columns: int, device: torch.device | str = "cpu", threads: int | None = None) -> Metric:
        """For weights without a curvature: plain squared error."""
        import torch

        return cls(torch.eye(columns, device=device), 0.0, threads)


def layer_metric(
    curvature: torch.Tensor | None,
    columns: int,
    damping: float,
    tensor_name: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Metric:
    """Of the curvature of a tensor's input on `device`, plain squared error if there is none. `threads`: as of Metric.
    Raises AthenaError naming the tensor if the curvature is not positive semidefinite."""
    try:
        if curvature is None:
            return Metric.identity(columns, device, threads)
        return Metric(curvature.to(device), damping, threads)
    except ValueError as error:
        raise AthenaError(f"tensor {tensor_name}: {error}; give more or other calibration text") from error


def _inverse_factor(h: torch.Tensor, wide_threads: int | None) -> torch.Tensor:
    """Upper triangular U with U^T U = h^-1, of one matrix or a batch; float32, computed in float64.

    The factor of h with rows and columns reversed is, reversed again, an upper triangular M with M M^T = h; U is its
    inverse.
    """
    import torch

    with threads_for(h, wide_threads):
        lower, failed = torch.linalg.cholesky_ex(h.flip(-2, -1).double())
        if failed.any():
            raise ValueError("the curvature is not positive definite, even damped")
        return _invert_upper(lower.flip(-2, -1)).float().contiguous()


@contextmanager
def threads_for(h: torch.Tensor, wide_threads: int | None = None) -> Iterator[None]:
    """Dense algebra of a matrix as wide as `h`: on the CPU in `wide_threads` (None: all) if it is wide."""
    import torch

    threads = torch.get_num_threads()
    if h.shape[-1] >= _WIDE and h.device.type == "cpu":
        torch.set_num_threads(wide_threads or cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _invert_upper(m: torch.Tensor) -> torch.Tensor:
    """The inverse of upper triangular matrices [..., n, n], in place: by halves, so that products do the work."""
    import torch

    n = m.shape[-1]
    if n <= _SMALL:
        unit = torch.eye(n, dtype=m.dtype, device=m.device)
        m.copy_(torch.linalg.solve_triangular(m, unit.expand_as(m), upper=True))
        return m
    k = n // 2
    first, second = _invert_upper(m[..., :k, :k]), _invert_upper(m[..., k:, k:])
    m[..., :k, k:] = first @ m[..., :k, k:] @ second
    m[..., :k, k:].neg_()
    return m
