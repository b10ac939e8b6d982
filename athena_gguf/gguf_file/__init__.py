"""GGUF files: reading with every bound checked, writing atomically, the standard tensor types."""

from athena_gguf.gguf_file.base import write_base, writing_base
from athena_gguf.gguf_file.reader import GGUFFile, Tensor
from athena_gguf.gguf_file.standard import quantize
from athena_gguf.gguf_file.writer import Replacement, result_bytes, tensor_bytes, write_quantized

__all__ = [
    "GGUFFile",
    "Replacement",
    "Tensor",
    "quantize",
    "result_bytes",
    "tensor_bytes",
    "write_base",
    "write_quantized",
    "writing_base",
]
