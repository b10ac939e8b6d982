"""athena-gguf: second-order quantization of language models to small GGUF files.

The verbs of the command line are functions here: convert, base, inspect, eval, compare, batch, doctor (docs/python.md).
They are imported when they are first used, so that `import athena_gguf` stays cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from athena_gguf.api import base, batch, compare, convert, doctor, eval, inspect
    from athena_gguf.errors import AthenaError

__version__ = "0.1.0"
__all__ = ["AthenaError", "__version__", "base", "batch", "compare", "convert", "doctor", "eval", "inspect"]


def __getattr__(name: str) -> object:
    if name == "AthenaError":
        from athena_gguf.errors import AthenaError

        return AthenaError
    if name in __all__:
        from athena_gguf import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
