"""What more survivors a state are worth in the search of a lane (list Viterbi): loss and CPU time on some rows.

Takes the base file and the curvature that `athena-gguf convert ... --work-dir DIR` left in DIR:

    python tools/bench_survivors.py DIR [--type A3] [--blocks 2 15 28] [--rows 48] [--survivors 1 2 4]

With errors fed back, the path that is best up to a state need not be the beginning of the best whole path. Here every
state keeps several paths, each with all its own errors. Losses are tr(E H E^T), geometric mean over tensors, against
the encoder's after the same rounds: one pass with feedback, and that with four sweeps, the searches of both with so
many survivors. "time": CPU seconds a million weights for a pass and four sweeps, in scalar code, without compilation;
against the line of one survivor, not against the encoder's vector code.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numba as nb
import numpy as np
import torch
from bench_ideas import Case, cases, mean_ratio

from athena_gguf.encode import EncodeOptions, encode_rows, passes
from athena_gguf.format import TYPES, AType
from athena_gguf.format.trellis import trellis

ROUNDS = (EncodeOptions(sweeps=0), EncodeOptions())


@cache
def list_search(kind: AType, count: int) -> Callable[..., None]:
    """As `athena_gguf.encode.lane.lane_search`, with `count` survivors a state that remember all their errors."""
    graph = trellis(kind)
    states, previous, symbol_of = kind.states, graph.previous.astype(np.int64), graph.symbol.astype(np.uint8)
    first = (kind.table1[graph.index1] - np.float32(64)).astype(np.float32)
    second = kind.table2[graph.index2].astype(np.float32)
    fan, paths = previous.shape[1], states * count

    @nb.njit(nogil=True, fastmath=True, error_model="numpy")
    def search(x, factor, scale, symbols, values, errors, cost):  # type: ignore[no-untyped-def]
        rows, steps = x.shape
        rest, moved = np.empty((paths, steps), np.float32), np.empty((paths, steps), np.float32)
        paid, best = np.empty(paths, np.float32), np.empty(paths, np.float32)
        a = np.empty(paths, np.float32)
        back, history = np.empty((steps, paths), np.int64), np.empty((steps, paths), np.float32)
        for r in range(rows):
            paid[:] = 1e30
            paid[0] = 0
            rest[0] = x[r]
            for t in range(steps):
                inverse = np.float32(1) / factor[t, t]
                step = scale[r, t] * inverse
                for p in range(paths):
                    if paid[p] < 1e30:
                        a[p] = rest[p, t] * inverse - step * second[p // count]
                for n in range(states):
                    at = n * count
                    best[at : at + count] = 1e30
                    for f in range(fan):
                        for p in range(previous[n, f] * count, previous[n, f] * count + count):
                            if paid[p] >= 1e30:
                                break
                            e = a[p] - step * first[n]
                            total = paid[p] + e * e
                            k = at + count - 1
                            if total >= best[k]:
                                continue
                            while k > at and best[k - 1] > total:  # kept in order, the best first
                                best[k], back[t, k], history[t, k] = best[k - 1], back[t, k - 1], history[t, k - 1]
                                k -= 1
                            best[k], back[t, k], history[t, k] = total, p, e
                for q in range(paths):
                    if best[q] < 1e30:
                        p, e = back[t, q], history[t, q]
                        for j in range(t + 1, steps):
                            moved[q, j] = rest[p, j] - e * factor[t, j]
                rest, moved = moved, rest
                paid, best = best, paid
            n = np.argmin(paid)
            cost[r] = paid[n]
            for t in range(steps - 1, -1, -1):
                p = back[t, n]
                symbols[r, t] = symbol_of[n // count]
                values[r, t] = first[n // count] + second[p // count]
                errors[r, t] = history[t, n]
                n = p

    return search


@contextmanager
def survivors(count: int) -> Iterator[None]:
    """The encoder on the CPU searches with so many of them."""
    plain = passes.lane_search

    def compiled_anew() -> None:
        for made in (passes.feedback_pass, passes.sweep):
            made.cache_clear()

    passes.lane_search = lambda kind: list_search(kind, count)  # type: ignore[assignment]
    compiled_anew()
    try:
        yield
    finally:
        passes.lane_search = plain
        compiled_anew()


def losses(chosen: Sequence[Case], options: EncodeOptions) -> tuple[list[float], float]:
    """Of every tensor, and CPU seconds a million weights."""
    first = chosen[0]
    encode_rows(first.weight[:4], first.metric, first.kind, EncodeOptions(sweeps=1))  # compiles
    start = time.thread_time()
    found = [encode_rows(case.weight, case.metric, case.kind, options).loss for case in chosen]
    return found, 1e6 * (time.thread_time() - start) / sum(case.weight.numel() for case in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--type", default="A3", choices=list(TYPES))
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 28])
    parser.add_argument("--rows", type=int, default=48, help="of every tensor, at most")
    parser.add_argument("--survivors", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(cases(args.work_dir, TYPES[args.type], args.blocks, args.rows))
    own = [losses(chosen, options)[0] for options in ROUNDS]
    print(
        f"{args.type}, {len(chosen)} tensors of {args.rows} rows; four sweeps make the encoder's loss "
        f"{mean_ratio(own[1], own[0]):.4f} times that after a pass\n"
    )
    print("| survivors | loss, one pass | loss, pass and four sweeps | time, s |\n|---|---|---|---|", flush=True)
    for count in args.survivors:
        with survivors(count):
            found = [losses(chosen, options) for options in ROUNDS]
        ratios = [f"{mean_ratio(these[0], those):.4f}" for these, those in zip(found, own, strict=True)]
        print(f"| {count} | {' | '.join(ratios)} | {found[1][1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
