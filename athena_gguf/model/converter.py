"""The process that runs llama.cpp's converter, as it is, in less time and without a model's own code:

    python -c "...; main()" [--trust-remote-code] SCRIPT ARGUMENT ...

It imports its libraries, which takes seconds, and begins when it reads a line: the model is checked meanwhile.

The converter loads some tokenizers with `trust_remote_code=True`, which is refused here unless the option is given. It
rounds to BF16 by a dozen NumPy operations on 64-bit integers, and makes a tensor only when the one before is in the
file. Here torch rounds, to the same bytes, and tensors are made in threads while others are written, those that are
BF16 already as they are (lazy_tensors). What of gguf-py this replaces is replaced only if it is as expected; otherwise
the converter runs as slowly as on its own.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from athena_gguf import processes
from athena_gguf.bfloat16 import to_bfloat16
from athena_gguf.model.lazy_tensors import make_ahead

BEGIN = b"begin\n"  # the line that it waits for
_TRUST = "--trust-remote-code"


def command(script: Path, trust: bool) -> list[str]:
    """How to start this process with the converter `script`; its arguments follow."""
    return [*processes.command(__name__), *([_TRUST] if trust else []), str(script)]


def main() -> None:
    from athena_gguf.model import no_code

    arguments = sys.argv[1:]
    if arguments[0] == _TRUST:
        arguments = arguments[1:]
    else:
        no_code.forbid()
    script = Path(arguments[0])
    sys.argv = arguments
    sys.path.insert(0, str(script.parent))
    hasten(script.parent / "gguf-py")
    with suppress(ImportError):  # the converter will say so
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401
    if not sys.stdin.readline():  # the model is not to be converted
        return
    runpy.run_path(str(script), run_name="__main__")


def hasten(gguf_py: Path) -> None:
    """Make the gguf-py in this folder, which the converter will import, faster where it is as expected."""
    if "gguf" in sys.modules or not (gguf_py / "gguf" / "__init__.py").is_file():
        return
    sys.path.insert(1, str(gguf_py))
    try:
        import gguf
        from gguf import quants

        round_faster(quants)
        make_ahead(gguf)
    except Exception:  # whatever comes of another version; the converter will find in it what it needs itself
        pass


def round_faster(quants: Any) -> None:
    """Have the module gguf.quants round to BF16 by `to_bfloat16`, if that gives the same bytes as it does itself."""
    by_rows, bfloat16 = quants._apply_over_grouped_rows, quants.BF16
    kind, used = bfloat16.qtype, []

    def grouped(func: Any, arr: Any, *args: Any, **kwargs: Any) -> Any:
        if func != bfloat16.quantize_rows:
            return by_rows(func, arr, *args, **kwargs)
        used.append(True)
        return to_bfloat16(arr.astype(np.float32, copy=False), bfloat16.quantize_blocks)

    samples = _float32_samples()
    expected = [quants.quantize(values, kind) for values in samples]
    quants._apply_over_grouped_rows = grouped
    try:
        found = [quants.quantize(values, kind) for values in samples]
        same = len(used) == len(samples) and all(map(np.array_equal, found, expected))
    except Exception:  # whatever another version's way of calling it leads to
        same = False
    if not same:
        quants._apply_over_grouped_rows = by_rows


def _float32_samples() -> list[npt.NDArray[np.float32]]:
    """Every upper half of a float32, with lower halves at, beside and between the points where rounding changes: those
    of positive numbers, of negative ones, and NaN, which are rounded in another way."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32)
    values = ((upper[:, None] << 16) | lower).view(np.float32)
    negative, nan = np.signbit(values), np.isnan(values)
    return [values[~negative & ~nan], values[negative & ~nan], values[nan]]


if __name__ == "__main__":
    main()
