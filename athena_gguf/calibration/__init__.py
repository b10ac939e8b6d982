"""Calibration: tokens in, curvature matrices out."""

from athena_gguf.calibration.curvature import Curvature, LayerInput, Lookup, measure_curvature
from athena_gguf.calibration.tokens import self_generated_windows, text_windows

__all__ = ["Curvature", "LayerInput", "Lookup", "measure_curvature", "self_generated_windows", "text_windows"]
