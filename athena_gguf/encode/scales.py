"""Scales of 64-column groups: a first guess, and the refit in closed form under the curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.format import LANES, AType, decode_scale, encode_scale

if TYPE_CHECKING:
    import torch

# Levels that stand for one standard deviation of a Gaussian group: where the tables fit best (tools/fit_tables.py).
UNIT = {"A2": 24.35, "A3": 21.12, "A4": 19.72}
_ROW_CHUNK_BYTES = 256 << 20  # of normal equations at a time


def initial_scales(w: torch.Tensor, groups: torch.Tensor, kind: AType) -> npt.NDArray[np.uint8]:
    """Scale bytes [rows, groups] that fit the root mean square of every group. `groups` [columns]: a column's group."""
    import torch

    count = int(groups.max()) + 1
    squares = torch.zeros(len(w), count).index_add_(1, groups, w.square())
    size = torch.bincount(groups, minlength=count)
    return encode_scale((squares / size).sqrt().div(UNIT[kind.name]).numpy())


def refit_scales(
    w: torch.Tensor, values: torch.Tensor, codes: npt.NDArray[np.uint8], h: torch.Tensor, groups: torch.Tensor
) -> npt.NDArray[np.uint8]:
    """Scale bytes [rows, groups] that lower tr((w - s v) h (w - s v)^T) for fixed levels `values` [rows, columns].

    The normal equations of a row's scales, solved, rounded to bytes, then moved byte by byte while that helps
    (Gauss-Seidel on the rounded scales); a row keeps `codes` where they were better.
    """
    import torch

    count = codes.shape[1]
    out = np.empty_like(codes)
    chunk = max(1, _ROW_CHUNK_BYTES // (4 * count * count))
    onehot = torch.nn.functional.one_hot(groups, count).float()
    wh = w @ h
    for a in range(0, len(w), chunk):
        v = values[a : a + chunk]
        right = (wh[a : a + chunk] * v) @ onehot
        normal = torch.empty(len(v), count, count)
        for g in range(count):
            columns = (groups == g).nonzero()[:, 0]
            normal[:, g] = ((v[:, columns] @ h[columns]) * v) @ onehot
        normal = (normal + normal.mT) / 2
        out[a : a + chunk] = _round_to_bytes(normal, right, codes[a : a + chunk])
    return out


def _round_to_bytes(normal: torch.Tensor, right: torch.Tensor, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Minimize s normal s - 2 right s over scale bytes, row by row."""
    import torch

    def loss(s: torch.Tensor) -> torch.Tensor:
        return ((normal @ s[:, :, None])[:, :, 0] * s - 2 * right * s).sum(1)

    old = torch.from_numpy(decode_scale(codes))
    ridge = normal.clone()
    ridge.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-30)
    solved, failed = torch.linalg.solve_ex(ridge, right)
    s = torch.where((failed == 0)[:, None] & torch.isfinite(solved), solved, old)
    s = torch.from_numpy(decode_scale(encode_scale(s.numpy())))
    diagonal = normal.diagonal(dim1=1, dim2=2)
    for _ in range(2):
        for g in range(s.shape[1]):
            rest = right[:, g] - (normal[:, g] * s).sum(1) + diagonal[:, g] * s[:, g]
            best = torch.where(diagonal[:, g] > 0, rest / diagonal[:, g], s[:, g])
            s[:, g] = torch.from_numpy(decode_scale(encode_scale(best.numpy())))
    better = (loss(s) < loss(old)).numpy()[:, None]
    return np.where(better, encode_scale(s.numpy()), codes)


assert LANES * 2 == 64  # a group is two steps: what `groups` of the encoder rests on
