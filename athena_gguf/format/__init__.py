"""The A2, A3 and A4 tensor types: tables, row layout, packing and the NumPy reference decoder.

`docs/format.md` is the normative text and this package is its one Python truth; the C code in `ggml_patch` is tested
against it through the golden vectors of `tests/golden`.
"""

from athena_gguf.format.rows import decode_rows, levels, pack_rows, row_bytes, unpack_rows, windows
from athena_gguf.format.scales import SCALE_MAX, SCALE_MIN, decode_scale, encode_scale
from athena_gguf.format.types import A2, A3, A4, FORMAT_VERSION, GROUP, LANES, SUPERBLOCK, TYPES, AType

__all__ = [
    "A2",
    "A3",
    "A4",
    "FORMAT_VERSION",
    "GROUP",
    "LANES",
    "SCALE_MAX",
    "SCALE_MIN",
    "SUPERBLOCK",
    "TYPES",
    "AType",
    "decode_rows",
    "decode_scale",
    "encode_scale",
    "levels",
    "pack_rows",
    "row_bytes",
    "unpack_rows",
    "windows",
]
