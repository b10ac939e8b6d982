"""How far back a survivor of the lane search remembers its own errors; one definition for the CPU and for CUDA.

A survivor's residual depends on all its earlier errors in the lane. Survivors almost always agree on old ones, so only
the last ones are kept for each survivor; older ones are taken from the best survivor, and off the target of all. That
happens for `COMMIT` steps at a time: before step t, a multiple of it, the errors of steps t - HORIZON to
t - HORIZON + COMMIT - 1 are taken off, and survivors that had others end. Lanes of up to `HORIZON` steps are searched
with all errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# By type. The 64 states of A2 agree later.
HORIZON = {"A2": 64, "A3": 32, "A4": 32}
COMMIT = 8


def band(factor: torch.Tensor, horizon: int) -> torch.Tensor:
    """What a survivor's last errors do to a step: [..., steps, horizon] of `factor` [..., steps, steps].

    Entry t, k is that of the error of step t - 1 - k: factor[t - 1 - k, t], or 0 where that error was taken off.
    """
    import torch

    steps = factor.shape[-1]
    now = torch.arange(steps, device=factor.device)[:, None]
    source = now - 1 - torch.arange(horizon, device=factor.device)
    block = now // COMMIT * COMMIT
    live = source >= torch.where(block >= horizon, block - horizon + COMMIT, 0)
    return (factor[..., source.clamp(min=0), now] * live).contiguous()
