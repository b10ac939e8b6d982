"""Rows in, symbols and scale bytes out: error feedback along the columns, a trellis search inside every lane."""

from athena_gguf.encode.matrix import Encoded, EncodeOptions, encode_matrix, encode_rows
from athena_gguf.encode.metric import Metric, layer_metric
from athena_gguf.encode.pool import EncodePool

__all__ = ["EncodeOptions", "EncodePool", "Encoded", "Metric", "encode_matrix", "encode_rows", "layer_metric"]
