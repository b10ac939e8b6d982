"""Encodes one weight matrix under the curvature of its input: the loop of docs/method.md, "Encoding a matrix".

Columns are taken lane by lane. The first passes search a lane after the errors of the lanes before it were fed back
(GPTQ's order of things, with a trellis search in place of rounding), and refit the scales between passes. The last
sweeps revisit every lane with all others fixed (cyclic coordinate descent on the same loss, as CDQuant, Nair and
Suggala 2024, does for single columns), which never makes a row worse.

The dense algebra is torch's; the search inside a lane is `athena_gguf.encode.lane`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.encode.lane import LaneSearch, lane_search
from athena_gguf.encode.scales import initial_scales, refit_scales
from athena_gguf.format import GROUP, LANES, AType, decode_scale
from athena_gguf.format.rows import pack_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EncodeOptions:
    """`damping`: added to the curvature's diagonal, times its mean. `passes`: with error feedback from scratch, scales
    refitted between. `sweeps`: of coordinate descent after them, each after a refit."""

    damping: float = 0.01
    passes: int = 3
    sweeps: int = 3


@dataclass
class Encoded:
    """`data` [rows, row bytes]; `loss` and `power` are tr(E H E^T) and tr(W H W^T) of the undamped curvature H, with E
    the error of the weights W."""

    data: npt.NDArray[np.uint8]
    loss: float
    power: float


def encode_matrix(weight: torch.Tensor, curvature: torch.Tensor | None, kind: AType, options: EncodeOptions) -> Encoded:
    """Encode `weight` [rows, columns] under `curvature` [columns, columns] (None: the identity).

    Columns must be a multiple of 64 and both finite. Raises ValueError if the curvature is not positive semidefinite.
    """
    import torch

    rows, columns = weight.shape
    order = torch.arange(columns).reshape(-1, LANES).T.flatten()  # lane by lane
    w = weight.float()[:, order].contiguous()
    h = torch.eye(columns) if curvature is None else curvature.float()[order][:, order].contiguous()
    state = _Encoder(w, h, kind, options)
    state.run()
    inverse = torch.argsort(order)
    symbols = torch.from_numpy(state.best.symbols)[:, inverse].numpy()
    error = w - state.best.values * state.expand(state.best.codes)
    return Encoded(
        pack_rows(kind, symbols, state.best.codes),
        float(((error @ h) * error).sum(dtype=torch.float64)),
        float(((w @ h) * w).sum(dtype=torch.float64)),
    )


@dataclass
class _Solution:
    """Columns lane by lane. `symbols` [rows, columns] uint8, `values` [rows, columns] the levels, `codes` [rows,
    columns / 64] the scale bytes, `loss` [rows] under the damped curvature."""

    symbols: npt.NDArray[np.uint8]
    values: torch.Tensor
    codes: npt.NDArray[np.uint8]
    loss: torch.Tensor


class _Encoder:
    def __init__(self, w: torch.Tensor, h: torch.Tensor, kind: AType, options: EncodeOptions) -> None:
        import torch

        self.w, self.kind, self.options = w, kind, options
        self.rows, self.columns = w.shape
        self.steps = self.columns // LANES
        damp = options.damping * float(h.diagonal().mean(dtype=torch.float64))
        self.h = h.clone()
        self.h.diagonal().add_(damp if damp > 0 else 1.0)
        self.search: LaneSearch = lane_search(kind)
        # Group of a column, columns lane by lane: step t belongs to group t / 2.
        self.groups = torch.arange(self.steps).div(GROUP // LANES, rounding_mode="floor").repeat(LANES)
        self.best: _Solution

    def expand(self, codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Scale bytes [rows, groups] to the scale of every column [rows, columns]."""
        import torch

        return torch.from_numpy(decode_scale(codes))[:, self.groups]

    def run(self) -> None:
        upper = _inverse_factor(self.h)
        codes = initial_scales(self.w, self.groups, self.kind)
        for number in range(max(1, self.options.passes)):
            found = self.feedback_pass(codes, upper)
            self.keep(found, first=number == 0)
            codes = self.refit(found)
        if self.options.sweeps:
            blocks = [self.h[a : a + self.steps, a : a + self.steps] for a in range(0, self.columns, self.steps)]
            factors = [_inverse_factor(b) for b in blocks]
            for _ in range(self.options.sweeps):
                codes = self.refit(self.best)
                moved = _Solution(self.best.symbols, self.best.values, codes, self.loss(self.best.values, codes))
                self.keep(moved)
                self.keep(self.sweep(self.best, blocks, factors))
            codes = self.refit(self.best)
            self.keep(_Solution(self.best.symbols, self.best.values, codes, self.loss(self.best.values, codes)))

    def keep(self, found: _Solution, first: bool = False) -> None:
        """Take over the rows that got better."""
        import torch

        if first:
            self.best = found
            return
        better = found.loss < self.best.loss
        pick = better.numpy()[:, None]
        self.best = _Solution(
            np.where(pick, found.symbols, self.best.symbols),
            torch.where(better[:, None], found.values, self.best.values),
            np.where(pick, found.codes, self.best.codes),
            torch.where(better, found.loss, self.best.loss),
        )

    def loss(self, values: torch.Tensor, codes: npt.NDArray[np.uint8]) -> torch.Tensor:
        error = self.w - values * self.expand(codes)
        return ((error @ self.h) * error).sum(1)

    def refit(self, found: _Solution) -> npt.NDArray[np.uint8]:
        return refit_scales(self.w, found.values, found.codes, self.h, self.groups)

    def feedback_pass(self, codes: npt.NDArray[np.uint8], upper: torch.Tensor) -> _Solution:
        """All lanes once, every lane after the errors of those before it were fed back."""
        import torch

        scale = self.expand(codes)
        x = self.w.clone()
        symbols = np.empty((self.rows, self.columns), np.uint8)
        values = torch.empty_like(x)
        loss = torch.zeros(self.rows)
        for a in range(0, self.columns, self.steps):
            lane = slice(a, a + self.steps)
            symbols[:, lane], values[:, lane], errors, cost = self.lane(x[:, lane], upper[lane, lane], scale[:, lane])
            loss += cost
            x[:, lane.stop :] -= errors @ upper[lane, lane.stop :]
        return _Solution(symbols, values, codes, loss)

    def sweep(self, found: _Solution, blocks: list[torch.Tensor], factors: list[torch.Tensor]) -> _Solution:
        """All lanes once, each with every other one fixed; a row's lane changes only if that lowers the row's loss."""
        import torch

        scale = self.expand(found.codes)
        symbols, values = found.symbols.copy(), found.values.clone()
        error = self.w - values * scale
        pull = error @ self.h  # half the gradient of the loss
        for number, a in enumerate(range(0, self.columns, self.steps)):
            lane = slice(a, a + self.steps)
            # Completing the square: with the other lanes fixed the loss is that of the distance to this target.
            old = values[:, lane] * scale[:, lane]
            shift = pull[:, lane] @ (factors[number].T @ factors[number])
            target = old + shift
            new_symbols, new_values, _, cost = self.lane(target, factors[number], scale[:, lane])
            better = cost < ((shift @ blocks[number]) * shift).sum(1)
            symbols[:, lane] = np.where(better.numpy()[:, None], new_symbols, symbols[:, lane])
            values[:, lane] = torch.where(better[:, None], new_values, values[:, lane])
            pull += (old - values[:, lane] * scale[:, lane]) @ self.h[lane]
        return _Solution(symbols, values, found.codes, self.loss(values, found.codes))

    def lane(
        self, x: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor
    ) -> tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        symbols = np.empty(x.shape, np.uint8)
        values, errors = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
        cost = np.empty(len(x), np.float32)
        arrays = (np.ascontiguousarray(m.numpy()) for m in (x, factor, scale))
        self.search(*arrays, symbols, values, errors, cost)
        return symbols, torch.from_numpy(values), torch.from_numpy(errors), torch.from_numpy(cost)


def _inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = inv(h)."""
    import torch

    try:
        lower = torch.linalg.cholesky(h.double())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    except torch.linalg.LinAlgError as e:
        raise ValueError("the curvature is not positive definite, even damped") from e
    return upper.float()
