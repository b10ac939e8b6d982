"""Where CUDA kernels run: arrays, streams and grids for Numba, on the GPU or in Numba's simulator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import PickleError
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from athena_gguf.errors import AthenaError
from athena_gguf.folders import cache_dir
from athena_gguf.gguf_file.atomic import atomic_write

if TYPE_CHECKING:
    import torch


@cache
def simulated() -> bool:
    """Whether kernels run in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), on arrays of the CPU."""
    from numba import config

    return bool(vars(config)["ENABLE_CUDASIM"])


def require_cuda() -> None:
    """Raises AthenaError if Numba cannot run kernels."""
    try:
        import numba_cuda  # noqa: F401
        from numba import cuda
        from numba.cuda import dispatcher
    except ImportError as error:
        raise AthenaError(
            "--device cuda: encoding needs the package numba-cuda; pip install 'athena-gguf[cuda]', or use --device cpu"
        ) from error
    except AttributeError as error:  # as of numba-cuda 0.30.4 beside NumPy 2.5
        raise AthenaError(
            f"--device cuda: the installed numba-cuda and NumPy do not go together ({error}); "
            "pip install 'athena-gguf[cuda]' takes versions that do, or use --device cpu"
        ) from error
    vars(dispatcher.config)["CUDA_LOW_OCCUPANCY_WARNINGS"] = 0  # small tensors cannot fill the device
    if not cuda.is_available():
        raise AthenaError("--device cuda: Numba finds no CUDA driver or compiler; use --device cpu")


def array(tensor: torch.Tensor) -> Any:
    """A tensor's memory as a kernel's argument."""
    if simulated():
        return tensor.numpy()
    from numba import cuda

    return cuda.as_cuda_array(tensor, sync=False)


def configure(kernel: Any, blocks: int | tuple[int, ...], threads: int | tuple[int, ...], shared: int = 0) -> Any:
    """A kernel with its grid and bytes of dynamic shared memory, on torch's current stream."""
    if simulated():
        return kernel[blocks, threads, 0, shared]
    import torch
    from numba import cuda

    return kernel[blocks, threads, cuda.external_stream(torch.cuda.current_stream().cuda_stream), shared]


def kernel(function: Callable[..., None]) -> Any:
    """Decorates a kernel, which Numba compiles once and keeps, if it can, for other processes."""
    from numba import cuda

    try:
        return cuda.jit(fastmath=True, cache=True)(function)
    except (OSError, RuntimeError):  # no folder that it could keep anything in
        return cuda.jit(fastmath=True)(function)


@contextmanager
def cache_explained() -> Iterator[None]:
    """Turn what Numba raises where it cannot read or write what it keeps into an AthenaError."""
    try:
        yield
    except (OSError, EOFError, PickleError) as error:
        raise AthenaError(
            f"Numba cannot keep or read compiled kernels: {str(error) or type(error).__name__}; make room, and delete "
            f"{cache_dir() / 'kernels'} and {Path(__file__).parent / '__pycache__'}"
        ) from error


def made_kernel(name: str, source: str, constants: dict[str, npt.NDArray[Any]]) -> Any:
    """The kernel `name` that `source` defines, with these arrays in it.

    The text is put into the user's cache directory, since Numba keeps what it makes of a kernel beside its file; where
    that cannot be written, every process compiles.
    """
    from numba import cuda, float32, int32

    namespace: dict[str, Any] = {"cuda": cuda, "float32": float32, "int32": int32, **constants}

    def made(file: str, cache: bool) -> Any:
        exec(compile(source, file, "exec"), namespace)
        return cuda.jit(fastmath=True, cache=cache)(namespace[name])

    if simulated():
        return made(f"<{name}>", cache=False)
    digest = hashlib.sha256(source.encode())
    for key, values in constants.items():
        digest.update(f"{key} {values.dtype} {values.shape}".encode() + values.tobytes())
    try:
        path = cache_dir() / "kernels" / f"{name}_{digest.hexdigest()[:16]}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # an older time would make Numba compile again
            with atomic_write(path) as file:
                file.write(source.encode())
        return made(str(path), cache=True)
    except (OSError, AthenaError, RuntimeError):  # Numba raises the last one where it cannot keep anything
        return made(f"<{name}>", cache=False)
