"""Where the runtime lives: `DIR/llama.cpp` is the patched source, `DIR/build/bin` holds the binaries."""

import os
import sys
from pathlib import Path

import athena_gguf
from athena_gguf.errors import AthenaError
from athena_gguf.folders import cache_dir


def default_dir() -> Path:
    """`$ATHENA_GGUF_RUNTIME`, or `runtime` in `cache_dir()`."""
    chosen = os.environ.get("ATHENA_GGUF_RUNTIME")
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / "runtime"


def resolve(folder: Path | None) -> Path:
    return default_dir() if folder is None else folder.expanduser().absolute()


def patch_dir() -> Path:
    """The folder `ggml_patch`: inside the installed package, or beside it in a source checkout."""
    package = Path(athena_gguf.__file__).parent
    for candidate in (package / "ggml_patch", package.parent / "ggml_patch"):
        if (candidate / "llama.cpp.patch").is_file():
            return candidate
    raise AthenaError(f"{package} comes without ggml_patch/llama.cpp.patch; reinstall athena-gguf")


def binary_dir(folder: Path | None = None) -> Path:
    """The folder of the built binaries; `folder` is the runtime's, `default_dir()` if None."""
    return resolve(folder) / "build" / "bin"


def binary(name: str, folder: Path | None = None) -> Path:
    """A built tool such as `llama-completion`. Raises AthenaError if it is not built."""
    path = binary_dir(folder) / (name + (".exe" if sys.platform == "win32" else ""))
    if not path.is_file():
        where = f" --dir {folder}" if folder else ""
        raise AthenaError(f"{path} does not exist; run `athena-gguf runtime build{where}` first")
    return path
