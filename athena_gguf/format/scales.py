"""The scale byte: an unsigned float of four exponent and four mantissa bits, log-spaced in spirit.

Byte b stands for the float32 whose bits are `(b << 19) + (108 << 23)`: 2^-19 for b = 0, 0.12109375 for b = 255.
"""

import numpy as np
import numpy.typing as npt

SCALE_SHIFT = 19
SCALE_BIAS = 108 << 23


def decode_scale(code: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale bytes (any shape) to float32 scales."""
    bits = (np.asarray(code, np.uint32) << SCALE_SHIFT) + np.uint32(SCALE_BIAS)
    return bits.view(np.float32)


SCALE_MIN = float(decode_scale(np.zeros(1, np.uint8))[0])
SCALE_MAX = float(decode_scale(np.full(1, 255, np.uint8))[0])


def encode_scale(scale: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """The nearest scale byte of every scale (any shape); negative and tiny ones give 0, huge ones 255.

    Raises ValueError for NaN.
    """
    s = np.asarray(scale, np.float32)
    if np.isnan(s).any():
        raise ValueError("a scale is NaN")
    s = np.clip(s, SCALE_MIN, SCALE_MAX)
    # Within a binade the float's bits are linear in its value, so rounding the bits rounds the value.
    bits = s.view(np.uint32).astype(np.int64) - SCALE_BIAS
    return np.clip((bits + (1 << (SCALE_SHIFT - 1))) >> SCALE_SHIFT, 0, 255).astype(np.uint8)
