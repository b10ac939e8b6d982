"""The encoder's inner loops as CUDA kernels, written with Numba."""
