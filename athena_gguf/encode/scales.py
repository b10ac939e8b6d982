"""Scales of 64-column groups: a first guess, and the refit in closed form under the curvature."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from athena_gguf.format import GROUP, LANES, AType, decode_scale

if TYPE_CHECKING:
    import torch

# The level at which a group's largest weight is put at first.
PEAK = {"A2": 62.0, "A3": 58.0, "A4": 54.0}
OFFSETS = (4, 2, 0, -2, -4, -6, -8, -10, -12)  # scale bytes tried around that: 1.19 down to 0.59 times
FIT_SWEEPS = 8  # of a refit, with scales as real numbers
BYTE_SWEEPS = 3  # after them, with scale bytes

SCALES = decode_scale(np.arange(256, dtype=np.uint8))
MIDDLES = (SCALES[1:] + SCALES[:-1]) / 2


@cache
def scale_table(device: torch.device) -> torch.Tensor:
    """The scales of the 256 bytes."""
    import torch

    return torch.from_numpy(SCALES).to(device)


@cache
def middles_table(device: torch.device) -> torch.Tensor:
    """Between the scales of neighbouring bytes, 255 of them."""
    import torch

    return torch.from_numpy(MIDDLES).to(device)


def expand(codes: torch.Tensor) -> torch.Tensor:
    """Scale bytes [rows, groups] to the scale of every step [rows, steps], the same for all lanes."""
    return scale_table(codes.device)[codes.int()].repeat_interleave(GROUP // LANES, dim=1)


def first_codes(weight: torch.Tensor, kind: AType) -> torch.Tensor:
    """The scale bytes [rows, groups] with which the largest weight of every group of `weight` [rows, columns], columns
    lane by lane, is the largest level."""
    import torch

    peaks = weight.abs().view(len(weight), LANES, -1, GROUP // LANES).amax((1, 3))
    return torch.bucketize(peaks / PEAK[kind.name], middles_table(weight.device)).byte()
