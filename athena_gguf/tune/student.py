"""The quantized model as torch runs it: fixed levels, learnable scales that are rounded to scale bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from athena_gguf.format import GROUP, AType, decode_scale, encode_scale, levels, pack_rows, unpack_rows


@cache
def _scales(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of scale bytes, and the middles between them."""
    table = torch.from_numpy(decode_scale(np.arange(256, dtype=np.uint8))).to(device)
    return table, (table[1:] + table[:-1]) / 2


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest values of scale bytes, as `format.encode_scale` rounds; the gradient passes unchanged."""
    table, middles = _scales(scale.device)
    with torch.no_grad():
        rounded = table[torch.bucketize(scale, middles)]
    return scale + (rounded - scale).detach()


class _ScaledProduct(torch.autograd.Function):
    """`x @ (levels * scale)^T`, in the numbers of `x` or of torch's autocast; keeps the levels in their bytes for the
    backward pass instead of decoded weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, levels, scale)
        return F.linear(x, _weight(levels, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x, levels, scale = ctx.saved_tensors
        (g,) = gradients
        to_weight = g.flatten(0, -2).T @ x.flatten(0, -2)
        to_scale = (to_weight.view(levels.shape) * levels).sum(-1, dtype=scale.dtype)
        return g @ _weight(levels, scale, g.dtype), None, to_scale


def _weight(levels: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (levels * scale[:, :, None]).flatten(1).to(dtype)


class ScaledLinear(torch.nn.Module):
    """A linear layer whose weight is an A-type tensor with learnable scales.

    `log_scale` [rows, groups] is the natural logarithm of what each scale was multiplied by. `order` [rows]: the row
    of the file that each row of the module is.
    """

    def __init__(self, kind: AType, data: npt.NDArray[np.uint8], order: npt.NDArray[np.int64], bias: Any) -> None:
        super().__init__()
        columns = data.shape[1] // kind.group_bytes * GROUP
        self.kind, self.order = kind, order
        self.symbols, codes = unpack_rows(kind, data, columns)
        steps = torch.from_numpy(levels(kind, self.symbols)[order]).view(len(order), -1, GROUP)
        self.register_buffer("levels", steps)
        self.register_buffer("start", torch.from_numpy(decode_scale(codes)[order]))
        self.log_scale = torch.nn.Parameter(torch.zeros_like(self.get_buffer("start")))
        self.bias = bias

    def scale(self) -> torch.Tensor:
        """[rows, groups], rounded."""
        return round_scale(self.get_buffer("start") * self.log_scale.exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _ScaledProduct.apply(x, self.get_buffer("levels"), self.scale())
        return out if self.bias is None else out + self.bias

    def data(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [rows, row bytes] with the scales as they are now, rows in the file's order."""
        codes = np.empty(self.log_scale.shape, np.uint8)
        codes[self.order] = encode_scale(self.scale().detach().cpu().numpy())
        return pack_rows(self.kind, self.symbols, codes)
