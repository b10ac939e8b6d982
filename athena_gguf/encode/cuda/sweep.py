"""The CUDA kernel around the search of a sweep."""

from __future__ import annotations

from numba import cuda, float32

from athena_gguf.encode.cuda.launch import kernel

_LANES = 32  # threads of a row
_ROWS = 4  # of a block


@kernel
def settle(pull, shift, scale, cost, found_symbols, found_values, symbols, values, moved, first):  # type: ignore[no-untyped-def]
    """Takes over what the search found for the rows whose loss it lowers. Blocks of (32, 4) threads, 32 a row.

    `pull` [rows, columns]; `shift`, `scale` [rows, steps]; `cost` [rows, 1], the loss found; `found_symbols`,
    `found_values` [rows, steps]; `symbols`, `values` [rows, columns], the lane's from column `first` on. Out: `moved`
    [rows, steps] float32, what the error changes by.
    """
    sums = cuda.shared.array((_ROWS, _LANES), float32)
    me, part = cuda.threadIdx.x, cuda.threadIdx.y
    rows, steps = shift.shape
    row = cuda.blockIdx.x * _ROWS + part
    there = row < rows
    row = min(row, rows - 1)
    before = float32(0)
    for t in range(me, steps, _LANES):
        before += pull[row, first + t] * shift[row, t]
    sums[part, me] = before
    cuda.syncthreads()
    before = float32(0)
    for i in range(_LANES):
        before += sums[part, i]
    better = cost[row, 0] < before
    if there:
        for t in range(me, steps, _LANES):
            change = float32(0)
            if better:
                change = float32(values[row, first + t] - found_values[row, t]) * scale[row, t]
                values[row, first + t] = found_values[row, t]
                symbols[row, first + t] = found_symbols[row, t]
            moved[row, t] = change
