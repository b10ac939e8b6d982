"""llama.cpp with the A2/A3/A4 types: fetch the pinned source, patch it, build it, run its tools."""

from athena_gguf.runtime.make import build
from athena_gguf.runtime.places import binary, binary_dir, default_dir
from athena_gguf.runtime.tree import source_tree

__all__ = ["binary", "binary_dir", "build", "default_dir", "source_tree"]
