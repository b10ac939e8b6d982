"""Tuning after encoding: scales and norms learn from the original model's predictions (docs/method.md, "Tuning")."""

from athena_gguf.tune.train import Quantized, Tuned, TuneOptions, tune

__all__ = ["Quantized", "TuneOptions", "Tuned", "tune"]
