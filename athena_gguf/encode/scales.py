"""Scales of 64-column groups: a first guess, and the refit in closed form under the curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba as nb
import numpy as np
import numpy.typing as npt

from athena_gguf.encode.metric import Metric
from athena_gguf.format import GROUP, LANES, AType, decode_scale, encode_scale

if TYPE_CHECKING:
    import torch

# The level at which a group's largest weight is put at first.
PEAK = {"A2": 62.0, "A3": 58.0, "A4": 54.0}
OFFSETS = (4, 2, 0, -2, -4, -6, -8, -10, -12)  # scale bytes tried around that: 1.19 down to 0.59 times
_SWEEPS = 2


def initial_scales(weight: torch.Tensor, metric: Metric, kind: AType) -> npt.NDArray[np.uint8]:
    """Scale bytes [rows, groups] for rows `weight` [rows, columns], columns lane by lane.

    Every group takes the byte, of a few around the one that fits its largest weight, with which a search without error
    feedback errs least, each column weighted as the feedback will weight it. Alternating between symbols and scales
    alone stops at whatever scale it starts from.
    """
    import torch

    from athena_gguf.encode.lane import lane_search

    rows, steps = len(weight), metric.steps
    lanes = weight.view(rows, LANES, steps)
    peaks = lanes.abs().view(rows, LANES, -1, GROUP // LANES).amax((1, 3))
    middle = encode_scale(peaks.div(PEAK[kind.name]).numpy()).astype(np.int16)
    unit = metric.upper.diagonal().view(LANES, steps).reciprocal()
    x = (lanes * unit).view(-1, steps).numpy()
    one = np.eye(steps, dtype=np.float32)
    symbols, cost = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    values, errors = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    losses, codes = [], []
    for offset in OFFSETS:
        codes.append(np.clip(middle + offset, 0, 255).astype(np.uint8))
        scale = torch.from_numpy(decode_scale(codes[-1])).repeat_interleave(GROUP // LANES, dim=1)
        scales = (scale[:, None, :] * unit).view(-1, steps).numpy()
        lane_search(kind)(x, one, scales, symbols, values, errors, cost)
        losses.append(np.square(errors).reshape(rows, LANES, -1, GROUP // LANES).sum((1, 3)))
    best = np.argmin(losses, axis=0)
    return np.take_along_axis(np.stack(codes), best[None], axis=0)[0]


class ScaleFit:
    """Least-squares scales of fixed rows `weight` [rows, columns] (natural order) under a metric."""

    def __init__(self, weight: torch.Tensor, metric: Metric) -> None:
        self.h = metric.plain
        self.target = weight @ self.h

    def refit(self, values: torch.Tensor, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Scale bytes [rows, groups] for fixed levels `values` [rows, columns], natural order.

        Solves the normal equations of every row's scales, rounds to bytes, then moves one scale at a time to its best
        byte given the others.  The result may be worse than `codes` for a row: the caller compares.
        """
        import torch

        rows, groups = codes.shape
        right = (self.target * values).view(rows, groups, GROUP).sum(2)
        normal = torch.empty(rows, groups, groups)
        for g in range(groups):
            a, b = g * GROUP, (g + 1) * GROUP
            products = (values[:, a:b] @ self.h[a:b, a:]).mul_(values[:, a:])
            normal[:, g, g:] = products.view(rows, groups - g, GROUP).sum(2)
            normal[:, g + 1 :, g] = normal[:, g, g + 1 :]
        old = torch.from_numpy(decode_scale(codes))
        ridge = normal.clone()
        ridge.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-30)
        solved, failed = torch.linalg.solve_ex(ridge, right)
        usable = (failed == 0)[:, None] & torch.isfinite(solved)
        found = encode_scale(torch.where(usable, solved, old).numpy())
        _descend(normal.numpy(), right.numpy(), _SCALES, _MIDDLES, found)
        return found


_SCALES = decode_scale(np.arange(256, dtype=np.uint8))
_MIDDLES = (_SCALES[1:] + _SCALES[:-1]) / 2


@nb.njit(nogil=True)
def _descend(normal, right, scales, middles, codes):  # type: ignore[no-untyped-def]
    """Every scale byte in turn to its best value given the row's others: cyclic coordinate descent, in place.

    `normal` [rows, groups, groups], `right` [rows, groups]; `codes` [rows, groups] uint8.
    """
    rows, groups = codes.shape
    for r in range(rows):
        for _ in range(_SWEEPS):
            for g in range(groups):
                diagonal = normal[r, g, g]
                if diagonal > 0:
                    rest = right[r, g]
                    for j in range(groups):
                        if j != g:
                            rest -= normal[r, g, j] * scales[codes[r, j]]
                    codes[r, g] = np.searchsorted(middles, rest / diagonal)
