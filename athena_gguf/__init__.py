"""athena-gguf: second-order quantization of language models to small GGUF files."""

__version__ = "0.1.0"
