"""Fit the two 16-entry tables of A2, A3 and A4 to a unit Gaussian source, round them to bytes, print tables.py.

Alternates a Viterbi search over the type's trellis with the least-squares tables of its assignment; the best of several
starts on held-out samples is rounded to bytes (any T1 + T2 in 0..127, 64 stands for 0) and polished entry by entry.

    python tools/fit_tables.py > athena_gguf/format/tables.py
"""

import argparse
import sys

import numba as nb
import numpy as np

BITS = {"A2": 2, "A3": 3, "A4": 4}
# Starting tables of table 1, one symbol each; table 2 starts small and random.
SEEDS = (0.15, 0.25, 0.4, 0.6)


def transitions(bits):
    """[states, 2^bits] predecessors, table 1 index of a state, table 2 index of a predecessor (docs/format.md)."""
    if bits == 2:
        n, x = np.arange(64), np.arange(4)
        return ((n & 15) << 2)[:, None] | x, n >> 2, n & 15
    n, x = np.arange(16), np.arange(1 << bits)
    if bits == 3:
        return (x >> 1 << 2 | x & 1) | ((n & 1) << 1)[:, None], n, n
    return np.broadcast_to(x, (16, 16)).copy(), n, n


@nb.njit(fastmath=True)
def viterbi(x, t1, t2, previous, index1, index2, out1, out2):
    """The cheapest path for x [n]; its table entries go to out1, out2 [n]. Returns the summed squared error."""
    n, (states, fan) = x.shape[0], previous.shape
    cost, new = np.full(states, 1e30), np.empty(states)
    cost[0] = 0  # a row starts in state 0
    back = np.empty((n, states), np.int16)
    for t in range(n):
        for s in range(states):
            best, choice = np.inf, 0
            for f in range(fan):
                p = previous[s, f]
                d = x[t] - t1[index1[s]] - t2[index2[p]]
                c = cost[p] + d * d
                if c < best:
                    best, choice = c, p
            new[s], back[t, s] = best, choice
        cost[:] = new
    s = np.argmin(cost)
    total = cost[s]
    for t in range(n - 1, -1, -1):
        p = back[t, s]
        out1[t], out2[t] = index1[s], index2[p]
        s = p
    return total


def assign(x, t1, t2, graph):
    o1, o2 = np.empty(x.size, np.int64), np.empty(x.size, np.int64)
    return viterbi(x, t1, t2, *graph, o1, o2), o1, o2


def fit(bits, n, rounds, starts):
    """Float tables with the lowest held-out error: (mean squared error, table 1, table 2)."""
    graph = transitions(bits)
    rng = np.random.default_rng(0)
    x, held = rng.standard_normal(n), rng.standard_normal(2 * n)
    best = (np.inf, np.zeros(16), np.zeros(16))
    for start in range(starts):
        r = np.random.default_rng(start)
        t1 = np.sort(r.standard_normal(16))
        if bits < 4 and start % 2:
            t1 = np.roll(t1.reshape(-1, 4), 1, axis=1).T.ravel().copy()  # spread the windows that share a symbol
        t2 = r.standard_normal(16) * SEEDS[start // 2 % 4]
        for _ in range(rounds):
            _, o1, o2 = assign(x, t1, t2, graph)
            count, total = np.zeros((16, 16)), np.zeros((16, 16))
            np.add.at(count, (o1, o2), 1)
            np.add.at(total, (o1, o2), x)
            for _ in range(20):
                t1 = (total.sum(1) - count @ t2) / np.maximum(count.sum(1), 1e-9)
                t2 = (total.sum(0) - count.T @ t1) / np.maximum(count.sum(0), 1e-9)
        mse = assign(held, t1, t2, graph)[0] / held.size
        if mse < best[0]:
            best = (mse, t1, t2)
    return best


def to_bytes(t1, t2):
    """Scale and round so that every sum of two entries, 64 added, fits into 0..127."""
    t1, t2 = t1 + t2.mean(), t2 - t2.mean()  # entries may trade a constant
    unit = min(63 / (t1.max() + t2.max()), -64 / (t1.min() + t2.min())) * 0.995
    b2 = np.rint(t2 * unit)
    b2 -= b2.min()
    b1 = np.rint(t1 * unit + 64 - (b2 - t2 * unit).mean())
    if b1.min() < 0 or b1.max() + b2.max() > 127:
        raise ValueError("the tables do not fit into seven bits")
    return b1.astype(int), b2.astype(int), unit


def error_of_bytes(b1, b2, graph, x):
    """Mean squared error of byte tables at their best scale (two passes find it)."""
    t1, t2 = b1 - 64.0, b2.astype(float)
    scale, total = 1 / 20, 0.0
    for _ in range(6):
        total, o1, o2 = assign(x, t1 * scale, t2 * scale, graph)
        v = t1[o1] + t2[o2]
        scale = (x @ v) / (v @ v)
    return total / x.size


def polish(b1, b2, graph, x):
    """Move single entries by one while that lowers the error."""
    best = error_of_bytes(b1, b2, graph, x)
    improved = True
    while improved:
        improved = False
        for table in (b1, b2):
            for i in range(16):
                for step in (-1, 1):
                    table[i] += step
                    if b1.min() >= 0 and b2.min() >= 0 and b1.max() + b2.max() <= 127:
                        e = error_of_bytes(b1, b2, graph, x)
                        if e < best * (1 - 1e-5):
                            best, improved = e, True
                            continue
                    table[i] -= step
    return best


def relabelings(bits):
    """The index permutations of the tables that only rename symbols and put another one in the place of symbol 0."""
    if bits == 3:  # any of four high parts first, low bits complemented or not
        w = np.arange(16)
        return [((w >> 2) ^ high) << 2 | (w & 3) ^ low for high in range(4) for low in (0, 3)]
    s = np.arange(1 << bits)
    names = [np.r_[first, np.delete(s, first)] for first in s]  # `first` becomes symbol 0, the others keep their order
    return [(n[:, None] << 2 | n).ravel() for n in names] if bits == 2 else names


def relabel(b1, b2, bits, graph, steps=18, rows=20_000):
    """The renaming with which short rows lose least: before a row starts every symbol is 0, so symbol 0 decides which
    values its first step can take. Costs nothing anywhere else. `steps`: 18 is a row of 576 columns."""
    x = np.random.default_rng(2).standard_normal((rows, steps))
    scale, long = 1 / 20, x.ravel()
    for _ in range(6):
        _, o1, o2 = assign(long, (b1 - 64.0) * scale, b2 * scale, graph)
        v = b1[o1] - 64.0 + b2[o2]
        scale = (long @ v) / (v @ v)

    def error(names):
        t1, t2 = (b1[names] - 64.0) * scale, b2[names] * scale
        return sum(assign(row, t1, t2, graph)[0] for row in x) / x.size

    errors = [error(names) for names in relabelings(bits)]
    best = relabelings(bits)[int(np.argmin(errors))]
    return b1[best], b2[best], -10 * np.log10([errors[0], min(errors)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--polish", action="store_true", help="also move single bytes; slow, worth under 0.01 dB")
    args = parser.parse_args()
    print('"""The frozen tables of A2, A3 and A4: unsigned bytes, 64 stands for 0. Made by tools/fit_tables.py."""\n')
    print("# fmt: off\nTABLES = {")
    for name, bits in BITS.items():
        mse, t1, t2 = fit(bits, args.samples, args.rounds, args.starts)
        b1, b2, unit = to_bytes(t1, t2)
        graph = transitions(bits)
        x = np.random.default_rng(1).standard_normal(4 * args.samples)
        e = polish(b1, b2, graph, x) if args.polish else error_of_bytes(b1, b2, graph, x)
        b1, b2, short = relabel(b1, b2, bits, graph)
        print(f"{name}: rows of 576 columns {short[0]:.3f} dB, symbols renamed {short[1]:.3f} dB", file=sys.stderr)
        db = -10 * np.log10([mse, e])
        print(f"{name}: floats {db[0]:.3f} dB, bytes {db[1]:.3f} dB, unit {unit:.2f}", file=sys.stderr)
        print(f'    "{name}": (\n        {b1.tolist()},\n        {b2.tolist()},\n    ),')
    print("}")


if __name__ == "__main__":
    main()
