"""Where CUDA kernels run: arrays, streams and grids for Numba, on the GPU or in Numba's simulator."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError

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
    except ImportError as error:
        raise AthenaError(
            "--device cuda: encoding needs the package numba-cuda; pip install 'athena-gguf[cuda]', or use --device cpu"
        ) from error
    warnings.filterwarnings("ignore", ".*Grid size")  # small tensors cannot fill the device
    if not cuda.is_available():
        raise AthenaError("--device cuda: Numba finds no CUDA driver or compiler; use --device cpu")


def array(tensor: torch.Tensor) -> Any:
    """A tensor's memory as a kernel's argument."""
    if simulated():
        return tensor.numpy()
    from numba import cuda

    return cuda.as_cuda_array(tensor, sync=False)


def configure(kernel: Any, blocks: int | tuple[int, ...], threads: int | tuple[int, ...]) -> Any:
    """A kernel with its grid, on torch's current stream."""
    if simulated():
        return kernel[blocks, threads]
    import torch
    from numba import cuda

    return kernel[blocks, threads, cuda.external_stream(torch.cuda.current_stream().cuda_stream)]
