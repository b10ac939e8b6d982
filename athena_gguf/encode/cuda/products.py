"""Products with the curvature on tensor cores, with almost the precision of float32.

A float32 number is the sum of two of bfloat16 to 16 bits. Of the four products of such sums the smallest is left out;
the three others, added up in float32, are one product over three times the length (as in Henry, Tang and Heinecke
2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations").
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from athena_gguf.encode.metric import Metric
from athena_gguf.format import LANES
from athena_gguf.gpu import mixed

if TYPE_CHECKING:
    import torch


def halve(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two bfloat16 numbers that float32 numbers are the sums of."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


class Halves:
    """The curvature h of a metric, lane by lane, for products from the left with float32 numbers."""

    def __init__(self, metric: Metric) -> None:
        import torch

        self.h, self.lanes = metric.h, None
        if mixed(metric.device):
            columns, steps = metric.columns, metric.steps
            # [lanes, 3 * steps, columns]: whole lanes are whole products.
            self.lanes = torch.empty(LANES, 3, steps, columns, dtype=torch.bfloat16, device=metric.device)
            for lane, rows in enumerate(metric.h.view(LANES, steps, columns)):
                self.lanes[lane, 0], self.lanes[lane, 2] = halve(rows)
                self.lanes[lane, 1] = self.lanes[lane, 0]

    @classmethod
    def of(cls, metric: Metric) -> Halves:
        """Those of a metric, made once."""
        if metric not in _made:
            _made[metric] = cls(metric)
        return _made[metric]

    def buffer(self, rows: int, steps: int) -> torch.Tensor:
        """For `add_product`."""
        import torch

        return torch.empty(rows, 3, steps, dtype=torch.bfloat16, device=self.h.device)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, columns] times h."""
        import torch

        if self.lanes is None:
            return x @ self.h
        high, low = (part.view(len(x), LANES, 1, -1) for part in halve(x.contiguous()))
        parts = torch.cat((high, low, high), 2).view(len(x), -1)
        return torch.mm(parts, self.lanes.view(-1, self.h.shape[1]), out_dtype=torch.float32)

    def add_product(self, out: torch.Tensor, x: torch.Tensor, lane: int, parts: torch.Tensor) -> None:
        """To `out` [rows, columns], `x` [rows, steps] times the rows of h of a lane."""
        import torch

        steps = x.shape[1]
        if self.lanes is None:
            out.addmm_(x, self.h[lane * steps : lane * steps + steps])
            return
        parts[:, 0] = x
        torch.sub(x, parts[:, 0], out=parts[:, 1])
        parts[:, 2] = parts[:, 0]
        block = self.lanes[lane].view(3 * steps, -1)
        torch.addmm(out, parts.view(len(x), -1), block, out_dtype=torch.float32, out=out)


_made: WeakKeyDictionary[Metric, Halves] = WeakKeyDictionary()
