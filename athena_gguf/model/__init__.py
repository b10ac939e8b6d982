"""The Hugging Face side: loading a model directory, its linear layers, and which GGUF tensor each of them feeds."""

from athena_gguf.model.linear import LinearLayer, linear_layers
from athena_gguf.model.load import load_model, load_tokenizer

__all__ = ["LinearLayer", "linear_layers", "load_model", "load_tokenizer"]
