"""Float matrices to ggml's standard types, through gguf-py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.bfloat16 import to_bfloat16
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import types

if TYPE_CHECKING:
    from athena_gguf.gguf_file.reader import Tensor

_CHUNK = 1 << 24  # weights
STANDARD_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def quantize(values: npt.NDArray[np.float32], type_name: str) -> npt.NDArray[np.uint8]:
    """Float32 weights [..., columns] to bytes [..., bytes of a row] of a type of `STANDARD_TYPES`.

    Raises AthenaError for another type, or if the columns are no multiple of the type's block.
    """
    if type_name not in STANDARD_TYPES:
        raise AthenaError(f"{type_name} is not one of the standard types {', '.join(STANDARD_TYPES)}")
    try:
        width = types.row_bytes(type_name, values.shape[-1])
    except ValueError as error:
        raise AthenaError(str(error)) from None
    values = np.ascontiguousarray(values, np.float32)
    if type_name in ("F32", "F16"):
        plain: npt.NDArray[np.uint8] = values.astype(np.float16 if type_name == "F16" else np.float32).view(np.uint8)
        return plain.reshape(*values.shape[:-1], width)
    import gguf

    if type_name == "BF16":
        return to_bfloat16(values, gguf.quants.BF16.quantize_blocks)
    kind = gguf.GGMLQuantizationType[type_name]
    out = gguf.quants.quantize(values, kind).view(np.uint8)
    return out.reshape(*values.shape[:-1], width)


def quantize_tensor(tensor: Tensor, type_name: str) -> npt.NDArray[np.uint8]:
    """A tensor in a type of `STANDARD_TYPES`, made in pieces of rows that take little memory."""
    flat = tensor.flat
    rows = max(1, _CHUNK // tensor.columns)
    pieces = [quantize(flat.to_float32(slice(a, a + rows)), type_name) for a in range(0, flat.shape[0], rows)]
    data = np.concatenate(pieces)
    return data.reshape(*tensor.shape[:-1], data.shape[-1])
