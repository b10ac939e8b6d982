"""Rows in, symbols and scale bytes out: error feedback along the columns, a trellis search inside every lane."""

from athena_gguf.encode.matrix import Encoded, EncodeOptions, encode_matrix

__all__ = ["EncodeOptions", "Encoded", "encode_matrix"]
