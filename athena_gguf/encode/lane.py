"""The search inside one lane: a Viterbi pass over the trellis with per-survivor error feedback, Numba on the CPU.

A survivor (one per trellis state) keeps its own last errors, so that the search sees every column as it would stand
after they were fed back (per-survivor processing, Raheli et al. 1995, applied to the error feedback of GPTQ, Frantar et
al. 2022); errors older than `athena_gguf.encode.horizon` says are those of the best survivor for all. The trellis is
that of `athena_gguf.format.trellis`, states renumbered so that the innermost loop runs over adjacent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba as nb
import numpy as np

from athena_gguf.encode.horizon import COMMIT, HORIZON
from athena_gguf.encode.simd import WIDTH, make_relax, subtract, subtract_product
from athena_gguf.format import AType
from athena_gguf.format.trellis import trellis

LaneSearch = Callable[..., None]


@cache
def lane_search(kind: AType) -> LaneSearch:
    """The compiled search of a type: `search(x, factor, scale, symbols, values, errors, cost)`.

    In: `x` [rows, steps] float32, the lane's target weights; `factor` [steps, steps] float32, upper triangular, with
    factor^T factor the inverse of the lane's curvature (given the lanes before it); `scale` [rows, steps] float32.
    Out: `symbols` [rows, steps] uint8; `values` [rows, steps] float32, the unscaled levels; `errors` [rows, steps]
    float32, (residual - value) / factor[t, t]; `cost` [rows] float32, the sum of the squared errors.
    """
    states, fan = kind.states, 1 << kind.bits
    graph = trellis(kind)
    # New states in an order in which each of their predecessors is one state, or a run of states, for a whole vector
    # of them: by the group that shares its predecessors, or (A2, whose groups are small) by symbol.
    order = np.lexsort((graph.symbol, graph.previous[:, 0])) if fan > 4 else np.arange(states)
    # Old states likewise: A2's four predecessors of a state are adjacent, so they are dealt to four runs.
    place = np.argsort(order) if fan > 4 else np.arange(states) % fan * (states // fan) + np.arange(states) // fan
    relax = make_relax(place[graph.previous[order].T].astype(np.int32))
    first = (kind.table1[graph.index1[order]] - np.float32(64)).astype(np.float32)
    second = np.empty(states, np.float32)
    second[place] = kind.table2[graph.index2]
    first_of, symbol_of = np.empty_like(first), np.empty(states, np.uint8)
    first_of[place], symbol_of[place] = first[np.argsort(order)], graph.symbol
    becomes = place[order].astype(np.int32)  # place as an old state of the n-th new one
    start = int(place[0])
    horizon = HORIZON[kind.name]
    kept = horizon // COMMIT  # blocks of steps whose errors are kept

    @nb.njit(nogil=True, fastmath=True, error_model="numpy")
    def search(x, factor, scale, symbols, values, errors, cost):  # type: ignore[no-untyped-def]
        rows, steps = x.shape
        blocks = (steps + COMMIT - 1) // COMMIT
        width = blocks * COMMIT
        ahead = np.zeros((width, width), np.float32)  # the factor above its diagonal, in whole blocks
        # What an error does to what a survivor carries: the residuals of its block's later columns, and the errors of
        # the block, where it is entered.
        carry = np.zeros((width, WIDTH), np.float32)
        feeds = False
        for t in range(steps):
            at = t // COMMIT * COMMIT
            for j in range(t + 1, steps):
                ahead[t, j] = factor[t, j]
                feeds |= factor[t, j] != 0
                if j < at + COMMIT:
                    carry[t, j - at] = factor[t, j]
            carry[t, COMMIT + t - at] = -1
        ahead, carry = ahead.ravel(), carry.ravel()
        carried, moved = np.zeros(states * WIDTH, np.float32), np.zeros(states * WIDTH, np.float32)
        rest = np.zeros(width, np.float32)  # the target less the errors that all survivors share
        shared = np.zeros(width, np.float32)  # these errors
        past = np.zeros((blocks, states, COMMIT), np.float32)  # a survivor's errors in a block
        origin = np.zeros((blocks, states), np.int32)  # the survivor that it was before the block
        a, paid = np.empty(states, np.float32), np.empty(states, np.float32)
        b, best = np.empty(states, np.float32), np.empty(states, np.float32)
        old, then = np.empty(states, np.int32), np.empty(states, np.int32)
        back = np.empty((steps, states), np.int32)
        history = np.empty((steps, states), np.float32)
        flat = past.ravel()
        for r in range(rows):
            for p in range(states):
                paid[p] = np.float32(1e30)
            paid[start] = np.float32(0)
            rest[:steps] = x[r]
            for t in range(steps):
                block, column = t // COMMIT, t % COMMIT
                if feeds and column == 0:
                    if block >= kept:
                        for n in range(states):
                            p = n
                            for i in range(1, kept):
                                p = origin[block - i, p]
                            then[n] = p
                        p, s = then[np.argmin(paid)], t - horizon
                        for j in range(COMMIT):
                            shared[s + j] = past[block - kept, p, j]
                        for n in range(states):
                            for j in range(COMMIT):
                                if past[block - kept, then[n], j] != shared[s + j]:
                                    paid[n] = np.float32(1e30)
                        for j in range(t, width, COMMIT):
                            subtract_product(rest, j, shared, s, ahead, s * width + j, width)
                    for n in range(states):
                        for j in range(COMMIT):
                            carried[n * WIDTH + j] = rest[t + j]
                            carried[n * WIDTH + COMMIT + j] = 0
                        p = n
                        for i in range(block - 1, max(block - kept, -1), -1):
                            e = (i * states + p) * COMMIT
                            subtract_product(carried, n * WIDTH, flat, e, ahead, i * COMMIT * width + t, width)
                            p = origin[i, p]
                inverse = np.float32(1) / factor[t, t]
                step = scale[r, t] * inverse
                if feeds:
                    for n in range(states):
                        a[n] = carried[n * WIDTH + column] * inverse - step * second[n]
                        b[n] = step * first[n]
                else:
                    for n in range(states):
                        a[n] = rest[t] * inverse - step * second[n]
                        b[n] = step * first[n]
                relax(a, paid, b, best, old)
                for n in range(states):
                    p, new = old[n], becomes[n]
                    e = a[p] - b[n]
                    back[t, new] = p
                    history[t, new] = e
                    paid[new] = best[n]
                    if feeds:
                        subtract(moved, new * WIDTH, carried, p * WIDTH, carry, t * WIDTH, e)
                if feeds:
                    carried, moved = moved, carried
                    if column == COMMIT - 1:
                        for n in range(states):
                            for j in range(COMMIT):
                                past[block, n, j] = carried[n * WIDTH + COMMIT + j]
                            p = n
                            for s in range(t, t - COMMIT, -1):
                                p = back[s, p]
                            origin[block, n] = p
            n = np.argmin(paid)
            cost[r] = paid[n]
            for t in range(steps - 1, -1, -1):
                p = back[t, n]
                symbols[r, t] = symbol_of[n]
                values[r, t] = first_of[n] + second[p]
                errors[r, t] = history[t, n]
                n = p

    return search
