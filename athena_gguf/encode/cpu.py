"""The steps of encoding some rows on the CPU: searches and reductions compiled by Numba, dense algebra by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba as nb
import numpy as np

from athena_gguf.encode.metric import Metric
from athena_gguf.encode.scales import BYTE_SWEEPS, FIT_SWEEPS, MIDDLES, OFFSETS, SCALES, expand, first_codes
from athena_gguf.format import GROUP, LANES, AType

if TYPE_CHECKING:
    import torch


class CpuSteps:
    """The steps for rows `weight` [rows, columns], columns lane by lane.

    Scales are scale bytes [rows, groups] uint8, or expanded [rows, steps] float32; `symbols` uint8 and `values` int8,
    the unscaled levels, are [rows, columns], columns lane by lane.
    """

    def __init__(self, weight: torch.Tensor, metric: Metric, kind: AType) -> None:
        self.w, self.metric, self.kind = weight, metric, kind
        self.target = weight[:, metric.inverse] @ metric.plain  # natural order

    def initial_scales(self) -> torch.Tensor:
        """Every group takes the byte, of a few around the one that fits its largest weight, with which a search without
        error feedback errs least, each column weighted as the feedback will weight it. Alternating between symbols and
        scales alone stops at whatever scale it starts from."""
        import torch

        from athena_gguf.encode.lane import lane_search

        rows, steps = len(self.w), self.metric.steps
        middle = first_codes(self.w, self.kind).short()
        unit = self.metric.passing.unit
        x = (self.w.view(rows, LANES, steps) * unit).view(-1, steps)
        one = torch.eye(steps)
        symbols, cost = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
        values, errors = torch.empty(x.shape), torch.empty(x.shape)
        losses, codes = [], []
        for offset in OFFSETS:
            codes.append((middle + offset).clamp_(0, 255).byte())
            scales = (expand(codes[-1])[:, None, :] * unit).view(-1, steps)
            lane_search(self.kind)(*(v.numpy() for v in (x, one, scales, symbols, values, errors, cost)))
            losses.append(errors.square().view(rows, LANES, -1, GROUP // LANES).sum((1, 3)))
        best = torch.stack(losses).argmin(0)
        return torch.stack(codes).gather(0, best[None])[0]

    def feedback_pass(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Symbols and values: all lanes once, every lane after the errors of those before it were fed back."""
        import torch

        from athena_gguf.encode.passes import feedback_pass

        x, symbols = self.w.clone(), torch.empty(self.w.shape, dtype=torch.uint8)
        values = torch.empty(x.shape, dtype=torch.int8)
        run = feedback_pass(self.kind)
        run(*(v.numpy() for v in (x, self.metric.upper, scale, symbols, values)))
        return symbols, values

    def sweep(self, pull: torch.Tensor, scale: torch.Tensor, symbols: torch.Tensor, values: torch.Tensor) -> None:
        """All lanes once, each with every other one fixed. `pull` [rows, columns], the error times h, `symbols` and
        `values` are brought up to date."""
        from athena_gguf.encode.passes import sweep

        metric = self.metric
        arguments = (pull, metric.h, metric.sweeping.factor, metric.lane_inverses, scale, symbols, values)
        sweep(self.kind)(*(v.numpy() for v in arguments))

    def product(self, error: torch.Tensor) -> torch.Tensor:
        """`error` [rows, columns] times the curvature."""
        return error @ self.metric.h

    def refit(self, values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Scale bytes [rows, groups] for fixed values, by `descend` on the normal equations of every row's scales."""
        import torch

        h, natural = self.metric.plain, values[:, self.metric.inverse].float()
        rows, groups = codes.shape
        right = (self.target * natural).view(rows, groups, GROUP).sum(2)
        normal = torch.empty(rows, groups, groups)
        for g in range(groups):
            a, b = g * GROUP, (g + 1) * GROUP
            products = (natural[:, a:b] @ h[a:b, a:]).mul_(natural[:, a:])
            normal[:, g, g:] = products.view(rows, groups - g, GROUP).sum(2)
            normal[:, g + 1 :, g] = normal[:, g, g + 1 :]
        found = codes.clone()
        descend(normal.numpy(), right.numpy(), SCALES, MIDDLES, FIT_SWEEPS, BYTE_SWEEPS, found.numpy())
        return found


@nb.njit(nogil=True, fastmath=True)
def descend(normal, right, scales, middles, fits, sweeps, codes):  # type: ignore[no-untyped-def]
    """Every scale in turn to its best value given the row's others: cyclic coordinate descent from `codes`, in place.

    `normal` [rows, groups, groups], `right` [rows, groups]; `codes` [rows, groups] uint8. Scales are real numbers for
    `fits` sweeps, which come near the solution of the equations, then bytes for `sweeps`.
    """
    rows, groups = codes.shape
    fitted, rest = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for r in range(rows):
        for g in range(groups):
            fitted[g] = scales[codes[r, g]]
        for g in range(groups):
            rest[g] = right[r, g] - (normal[r, g] * fitted).sum()
        for sweep in range(fits + sweeps):
            for g in range(groups):
                diagonal = normal[r, g, g]
                if diagonal > 0:
                    wanted = fitted[g] + rest[g] / diagonal
                    if sweep >= fits:
                        codes[r, g] = np.searchsorted(middles, wanted)
                        wanted = scales[codes[r, g]]
                    change = wanted - fitted[g]
                    fitted[g] = wanted
                    for j in range(groups):
                        rest[j] -= normal[r, g, j] * change
