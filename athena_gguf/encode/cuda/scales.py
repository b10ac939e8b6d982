"""CUDA kernels around the scales: the choice of first ones, sums of the normal equations, descent over bytes."""

from __future__ import annotations

from numba import cuda, float32

from athena_gguf.encode.cuda.launch import kernel
from athena_gguf.format import GROUP, LANES

ROWS = 8  # of a block of the descent; neighbouring threads hold neighbouring rows
SHARE = 32  # threads of a row


PER_LANE = GROUP // LANES  # steps of a group


@kernel
def pick(x, values, scale, unit, tried, best, codes):  # type: ignore[no-untyped-def]
    """Keep the scale byte of a group if it errs less than the best before. A thread a group.

    `x` float32, `values` int8 [rows, columns], lane by lane; `scale` [rows, steps]; `unit` [32, steps], of an error;
    `tried`, `codes` uint8 and `best` float32 [rows, groups].
    """
    item = cuda.grid(1)
    rows, groups = codes.shape
    if item >= rows * groups:
        return
    row, group = item // groups, item % groups
    lanes, steps = unit.shape
    loss = float32(0)
    for lane in range(lanes):
        for t in range(PER_LANE * group, PER_LANE * group + PER_LANE):
            column = lane * steps + t
            error = (x[row, column] - values[row, column] * scale[row, t]) * unit[lane, t]
            loss += error * error
    if loss < best[row, group]:
        best[row, group] = loss
        codes[row, group] = tried[row, group]


@kernel
def reduce(products, values, first, normal):  # type: ignore[no-untyped-def]
    """Entries of the normal equations of some groups, for all rows. A thread a row and pair of groups.

    `products` [some, columns - 64 first, rows] float32: the curvature of group first + i times its values; `values`
    [columns, rows] int8; `normal` [groups, groups, rows] out, both halves. Grid: rows, groups from `first` on, `some`.
    """
    row = cuda.grid(1)
    group, other = first + cuda.blockIdx.z, first + cuda.blockIdx.y
    if row >= values.shape[1] or other < group:
        return
    total = float32(0)
    start, far = GROUP * cuda.blockIdx.y, GROUP * other
    for c in range(GROUP):
        total += products[cuda.blockIdx.z, start + c, row] * float32(values[far + c, row])
    normal[group, other, row] = total
    normal[other, group, row] = total


@kernel
def descend(normal, right, scales, middles, fits, sweeps, fitted, codes):  # type: ignore[no-untyped-def]
    """`athena_gguf.encode.cpu.descend` for rows that lie side by side. Blocks of (ROWS, SHARE) threads, with 4 ROWS
    groups bytes of shared memory.

    `normal` [groups, groups, rows], `right` [groups, rows] float32; `fitted` [groups, rows] float32, for the scales;
    `codes` [groups, rows] uint8, in place.
    """
    moved = cuda.shared.array(ROWS, float32)
    rest = cuda.shared.array(0, float32)  # what the equations leave, so that a step looks at its own group only
    mine, part = cuda.threadIdx.x, cuda.threadIdx.y
    groups, rows = codes.shape
    row = cuda.blockIdx.x * ROWS + mine
    there = row < rows
    row = min(row, rows - 1)
    for g in range(part, groups, SHARE):
        left = right[g, row]
        for j in range(groups):
            left -= normal[g, j, row] * scales[codes[j, row]]
        rest[g * ROWS + mine] = left
        if there:
            fitted[g, row] = scales[codes[g, row]]
    cuda.syncthreads()
    last = groups - 1
    for sweep in range(fits + sweeps):
        for g in range(groups):
            if part == g % SHARE:
                diagonal = normal[g, g, row]
                moved[mine] = float32(0)
                if diagonal > float32(0):
                    before = fitted[g, row]
                    wanted = before + rest[g * ROWS + mine] / diagonal
                    if sweep >= fits:
                        low, high = 0, 255
                        while low < high:
                            middle = (low + high) // 2
                            if middles[middle] < wanted:
                                low = middle + 1
                            else:
                                high = middle
                        wanted = scales[low]
                        if there:
                            codes[g, row] = low
                    moved[mine] = wanted - before
                    if there:
                        fitted[g, row] = wanted
            cuda.syncthreads()
            change = moved[mine]
            for j in range(part, groups, 4 * SHARE):
                # All are read before any is written: the compiler cannot know that they are different places.
                j1, j2, j3 = j + SHARE, j + 2 * SHARE, j + 3 * SHARE
                n0 = normal[g, j, row]
                n1 = normal[g, min(j1, last), row]
                n2 = normal[g, min(j2, last), row]
                n3 = normal[g, min(j3, last), row]
                rest[j * ROWS + mine] -= n0 * change
                if j1 < groups:
                    rest[j1 * ROWS + mine] -= n1 * change
                if j2 < groups:
                    rest[j2 * ROWS + mine] -= n2 * change
                if j3 < groups:
                    rest[j3 * ROWS + mine] -= n3 * change
            cuda.syncthreads()
