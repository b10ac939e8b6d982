"""The trellis search of one lane as a CUDA kernel: a state or two a thread, half a warp or a warp a row.

The algorithm is that of `athena_gguf.encode.lane`. A thread holds the cost and the last errors of the survivors of its
states in registers; survivors are handed on by shuffles, choices are kept as ballots. Registers must be named one by
one and Numba cannot be told to unroll a loop, so the kernel's source is written out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from athena_gguf.encode.cuda.launch import made_kernel
from athena_gguf.format import AType
from athena_gguf.format.trellis import trellis

WARP = 32
_MASK = "0xFFFFFFFF"


@dataclass(frozen=True)
class SearchShape:
    """How a search runs. `horizon`: errors that a survivor keeps, 0 for none; `commit`: how many of them are taken off
    at once; `rows`: of a thread; `warps`: of a block; `exchange`: "shuffle", or "shared" for the simulator, which has
    no shuffles (blocks of one warp there)."""

    horizon: int
    commit: int
    rows: int = 1
    warps: int = 4
    exchange: str = "shuffle"


def rows_of_block(kind: AType, shape: SearchShape) -> int:
    return shape.warps * WARP // _width(kind) * shape.rows


def words_of_step(kind: AType, shape: SearchShape) -> int:
    """Words a warp keeps for a step: every bit of every choice, for 32 threads at once."""
    return kind.bits * _slots(kind) * shape.rows


def _slots(kind: AType) -> int:
    return max(1, kind.states // WARP)


def _width(kind: AType) -> int:
    return kind.states // _slots(kind)


def thread_of(kind: AType, state: int) -> tuple[int, int]:
    """Thread (within those of a row) and slot of a state.

    A2 has two states a thread, n and n ^ 10, the slot being bit 3. The predecessors of n lie in the slot that is bit 1
    of n, so that one of a thread's states comes out of either slot, and one shuffle a value serves every state.
    """
    if _slots(kind) == 1:
        return state, 0
    low = state ^ 10 if state & 8 else state
    return low >> 4 << 3 | low & 7, state >> 3 & 1


def _sources(kind: AType) -> np.ndarray:
    """[states, fan]: threads of a state's predecessors."""
    thread = np.array([thread_of(kind, n)[0] for n in range(kind.states)], np.int32)
    return thread[trellis(kind).previous]


class _Writer:
    """Lines of source under a running indent."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, text: str) -> None:
        self.lines += ["    " * self.depth + line for line in text.splitlines()]

    def block(self, head: str) -> _Writer:
        self(head)
        return self

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1


class _Source:
    """Writes the kernel. Variables carry their row `r` of the thread and slot `s` (or the slot `q` that a new state's
    predecessors lie in) in their names."""

    def __init__(self, kind: AType, shape: SearchShape) -> None:
        self.kind, self.shape, self.out = kind, shape, _Writer()
        self.slots, self.width, self.fan = _slots(kind), _width(kind), 1 << kind.bits
        self.words = words_of_step(kind, shape)
        self.pairs = [(r, s) for r in range(shape.rows) for s in range(self.slots)]

    def text(self) -> str:
        w = self.out
        with w.block("def search(x, scale, inverse, band, factor, lane, lanes, back, symbols, values, costs):"):
            self.start()
            with w.block("for t in range(steps):"):
                if self.shape.horizon:
                    with w.block(f"if t & {self.shape.commit - 1} == 0 and t >= {self.shape.horizon}:"):
                        self.commit()
                self.residuals()
                self.relax()
                self.keep_choices()
                self.hand_on()
            self.trace()
        return "\n".join(w.lines)

    def start(self) -> None:
        w, shape = self.out, self.shape
        w(f"""\
thread = cuda.threadIdx.x
me = thread % {WARP}
at = me % {self.width}
base = me - at
home = thread - at
warp = cuda.blockIdx.x * {shape.warps} + thread // {WARP}
steps = int32(inverse.shape[1])
count = int32(x.shape[0] * lanes)""")
        if shape.exchange == "shared":
            w(f"board = cuda.shared.array(({max(2, shape.horizon) * len(self.pairs)}, {WARP * shape.warps}), float32)")
            w(f"ballot = cuda.shared.array(({len(self.pairs)}, {WARP * shape.warps}), int32)")
            w(f"chosen = cuda.shared.array(({2 * shape.rows}, {WARP * shape.warps}), float32)")
        for r in range(shape.rows):
            # Rows that are not there read the last one's and write nothing.
            w(f"""\
item{r} = (warp * {WARP // self.width} + me // {self.width}) * {shape.rows} + {r}
there{r} = item{r} < count
item{r} = min(item{r}, count - 1)
row{r} = item{r} // lanes
part{r} = item{r} % lanes
first{r} = part{r} * steps
part{r} += lane""")
        for s in range(self.slots):
            self.look_up(f"state{s}", f"STATE[{s}, at]")
            self.look_up(f"second{s}", f"SECOND[{s}, at]")
        w("turned = at >> 1 & 1" if self.slots == 2 else "turned = 0")
        for q in range(self.slots):
            w(f"new{q} = STATE[turned ^ {q}, at]")
            self.look_up(f"level{q}", f"FIRST[turned ^ {q}, at]")
            apart = _sources(self.kind) - _sources(self.kind)[:, :1]
            for f in range(self.fan):
                if f and (apart[:, f] == apart[0, f]).all():  # as far from the first for every state
                    w(f"source{q}_{f} = source{q}_0 + int32({apart[0, f]})")
                else:
                    self.look_up(f"source{q}_{f}", f"SOURCE[new{q}, {f}]")
        for r, s in self.pairs:
            w(f"paid{r}_{s} = float32(0) if state{s} == 0 else float32(1e30)")
            for k in range(shape.horizon):
                w(f"h{r}_{s}_{k} = float32(0)")
        for i in range(self.words):
            w(f"kept{i} = int32(0)")

    def look_up(self, name: str, entry: str) -> None:
        """A thread's own entry of a table, once. Without the shuffle the compiler may read it again in every step, a
        turn for every thread, since constant memory gives one address at a time."""
        self.out(f"{name} = {entry}")
        if self.shape.exchange != "shared":
            self.out(f"{name} = cuda.shfl_sync({_MASK}, {name}, me)")

    def sync(self) -> None:
        self.out("cuda.syncthreads()" if self.shape.exchange == "shared" else "cuda.syncwarp()")

    def publish(self, names: list[str]) -> None:
        """Put registers where `fetch` finds them; nothing to do for shuffles."""
        if self.shape.exchange == "shared":
            for i, name in enumerate(names):
                self.out(f"board[{i}, thread] = {name}")
            self.sync()

    def fetch(self, index: int, name: str, source: str) -> str:
        """A register of the thread `source` of the same row."""
        if self.shape.exchange == "shared":
            return f"board[{index}, home + {source}]"
        return f"cuda.shfl_sync({_MASK}, {name}, base + {source})"

    def commit(self) -> None:
        """Take the oldest errors of the best survivor off what all of them still have before them."""
        w, shape = self.out, self.shape
        oldest = [shape.horizon - 1 - j for j in range(shape.commit)]
        for r in range(shape.rows):
            w(f"low{r} = paid{r}_0\nwho{r} = state0")
            for s in range(1, self.slots):
                with w.block(f"if paid{r}_{s} < low{r} or (paid{r}_{s} == low{r} and state{s} < who{r}):"):
                    w(f"low{r} = paid{r}_{s}\nwho{r} = state{s}")
        self.lowest()
        names = [f"h{r}_{s}_{k}" for r, s in self.pairs for k in oldest]
        self.publish(names)
        for r in range(shape.rows):
            w(f"thread{r} = THREAD[who{r}]\nslot{r} = SLOT[who{r}]")
            for j, k in enumerate(oldest):
                name = f"h{r}_0_{k}"
                w(f"old{r}_{j} = {self.fetch(names.index(name), name, f'thread{r}')}")
                if self.slots == 2:
                    name = f"h{r}_1_{k}"
                    w(f"other = {self.fetch(names.index(name), name, f'thread{r}')}")
                    w(f"old{r}_{j} = other if slot{r} else old{r}_{j}")
        # Survivors with other errors cannot be the row's path any more.
        for r, s in self.pairs:
            others = " | ".join(f"(h{r}_{s}_{k} != old{r}_{j})" for j, k in enumerate(oldest))
            w(f"paid{r}_{s} = float32(1e30) if {others} else paid{r}_{s}")
        with w.block(f"for column in range(t + at, steps, {self.width}):"):
            for r in range(shape.rows):
                w(f"rest{r} = x[row{r}, first{r} + column]")
                for j in range(shape.commit):
                    w(f"rest{r} -= old{r}_{j} * factor[part{r}, t - {shape.horizon - j}, column]")
                with w.block(f"if there{r}:"):
                    w(f"x[row{r}, first{r} + column] = rest{r}")
        self.sync()

    def lowest(self) -> None:
        """`low`, `who` of every thread become those of the row's best survivor."""
        w, rows = self.out, range(self.shape.rows)
        far = self.width // 2
        while far:
            if self.shape.exchange == "shared":
                for r in rows:
                    w(f"chosen[{2 * r}, thread] = low{r}\nchosen[{2 * r + 1}, thread] = who{r}")
                self.sync()
            for r in rows:
                if self.shape.exchange == "shared":
                    w(f"there_low = chosen[{2 * r}, thread ^ {far}]")
                    w(f"there_who = int32(chosen[{2 * r + 1}, thread ^ {far}])")
                else:
                    w(f"there_low = cuda.shfl_sync({_MASK}, low{r}, me ^ {far})")
                    w(f"there_who = cuda.shfl_sync({_MASK}, who{r}, me ^ {far})")
                with w.block(f"if there_low < low{r} or (there_low == low{r} and there_who < who{r}):"):
                    w(f"low{r} = there_low\nwho{r} = there_who")
            if self.shape.exchange == "shared":
                self.sync()
            far //= 2

    def residuals(self) -> None:
        """`a`: what the step has left of the target in a survivor, less its table 2 term, in units of the error."""
        w = self.out
        for r in range(self.shape.rows):
            w(f"unit{r} = inverse[part{r}, t]\nsize{r} = scale[row{r}, t] * unit{r}")
            w(f"target{r} = x[row{r}, first{r} + t]")
        for k in range(self.shape.horizon):
            for r in range(self.shape.rows):
                # All rows of a search with errors are of one lane.
                if r == 0:
                    w(f"c{k} = band[part0, t, {k}]")
        for r, s in self.pairs:
            sums = [f"h{r}_{s}_{k} * c{k}" for k in range(self.shape.horizon)]
            quarters = [sums[i::4] for i in range(4) if sums[i::4]]
            terms = " - ".join(["", *(f"({' + '.join(q)})" for q in quarters)]).removeprefix(" - ")
            w(f"left{r}_{s} = target{r}" + (f" - {terms}" if terms else ""))
            w(f"a{r}_{s} = left{r}_{s} * unit{r} - size{r} * second{s}")

    def relax(self) -> None:
        """The best predecessor of every new state: `low`, its error `e`, thread `from` and number `choice`."""
        w = self.out
        names = [f"{n}{r}_{s}" for n in ("paid", "a") for r, s in self.pairs]
        self.publish(names)
        for r, q in self.pairs:
            w(f"b = size{r} * level{q}")
            for f in range(self.fan):
                paid, a = f"paid{r}_{q}", f"a{r}_{q}"
                w(f"p = {self.fetch(names.index(paid), paid, f'source{q}_{f}')}")
                w(f"d = {self.fetch(names.index(a), a, f'source{q}_{f}')} - b")
                if f == 0:
                    w(f"low{r}_{q} = p + d * d\ne{r}_{q} = d\nfrom{r}_{q} = source{q}_0\nchoice{r}_{q} = int32(0)")
                    continue
                # One variable a line: selections, where a common condition would make branches of the warp.
                w(f"cost = p + d * d\nless = cost < low{r}_{q}")
                for name, value in (("low", "cost"), ("e", "d"), ("from", f"source{q}_{f}"), ("choice", f"int32({f})")):
                    w(f"{name}{r}_{q} = {value} if less else {name}{r}_{q}")
        if self.shape.exchange == "shared":
            self.sync()

    def keep_choices(self) -> None:
        """Thread t % 32 of a warp keeps the ballots of step t; every 32 steps they are stored."""
        w = self.out
        mine = f"me == t & {WARP - 1}"
        if self.shape.exchange == "shared":
            for i, (r, q) in enumerate(self.pairs):
                w(f"ballot[{i}, thread] = choice{r}_{q}")
            self.sync()
            with w.block(f"if {mine}:"):
                w("\n".join(f"kept{i} = int32(0)" for i in range(self.words)))
                with w.block(f"for other in range({WARP}):"):
                    for i in range(self.words):
                        w(
                            f"kept{i} = int32(kept{i} | ((ballot[{i // self.kind.bits}, thread - me + other] "
                            f">> {i % self.kind.bits} & 1) << other))"
                        )
            self.sync()
        else:
            for i in range(self.words):
                r, q = self.pairs[i // self.kind.bits]
                w(f"word = cuda.ballot_sync({_MASK}, choice{r}_{q} & {1 << i % self.kind.bits})")
                w(f"kept{i} = word if {mine} else kept{i}")
        w(f"mine = (t & {-WARP}) + me")
        with w.block(f"if (t & {WARP - 1} == {WARP - 1} or t == steps - 1) and mine < steps:"):
            for i in range(self.words):
                w(f"back[warp, {i}, mine] = kept{i}")

    def hand_on(self) -> None:
        """Every new state takes over its predecessor's errors and appends its own."""
        w, horizon = self.out, self.shape.horizon
        names = [f"h{r}_{q}_{k}" for r, q in self.pairs for k in range(horizon - 1)]
        if names:
            self.publish(names)
        for r in range(self.shape.rows):
            for k in range(horizon - 1, 0, -1):
                for q in range(self.slots):
                    name = f"h{r}_{q}_{k - 1}"
                    w(f"g{q} = {self.fetch(names.index(name), name, f'from{r}_{q}')}")
                self.settle(r, f"h{{r}}_{{s}}_{k}", "g{q}")
            if horizon:
                self.settle(r, "h{r}_{s}_0", "e{r}_{q}")
            self.settle(r, "paid{r}_{s}", "low{r}_{q}")
        if names and self.shape.exchange == "shared":
            self.sync()

    def settle(self, r: int, slot: str, position: str) -> None:
        """From the order of the old slots to the slots of the new states."""
        if self.slots == 1:
            self.out(f"{slot.format(r=r, s=0)} = {position.format(r=r, q=0)}")
        else:
            one, two = position.format(r=r, q=0), position.format(r=r, q=1)
            self.out(f"{slot.format(r=r, s=0)} = {two} if turned else {one}")
            self.out(f"{slot.format(r=r, s=1)} = {one} if turned else {two}")

    def trace(self) -> None:
        """Walk the best path back. All threads of a row do; each keeps the steps that it will write."""
        w, kind, rows = self.out, self.kind, range(self.shape.rows)
        self.sync()
        for r in rows:
            w(f"low{r} = paid{r}_0\nwho{r} = state0")
            for s in range(1, self.slots):
                with w.block(f"if paid{r}_{s} < low{r} or (paid{r}_{s} == low{r} and state{s} < who{r}):"):
                    w(f"low{r} = paid{r}_{s}\nwho{r} = state{s}")
        self.lowest()
        for r in rows:
            with w.block(f"if there{r} and at == 0:"):
                w(f"costs[row{r}, part{r} - lane] = low{r}")
            w(f"symbol{r} = int32(0)\nlevel_of{r} = int32(0)")
        with w.block(f"for start in range((steps - 1) & {-WARP}, -1, -{WARP}):"):
            with w.block("if start + me < steps:"):
                for i in range(self.words):
                    w(f"kept{i} = back[warp, {i}, start + me]")
            if self.shape.exchange == "shared":
                for i in range(self.words):
                    w(f"ballot[0, thread] = kept{i}\ncuda.syncthreads()")
                    with w.block(f"for j in range({WARP}):"):
                        w(f"path[{i}, j] = ballot[0, thread - me + j]")
                    w("cuda.syncthreads()")
            with w.block(f"for j in range(min({WARP}, steps - start) - 1, -1, -1):"):
                for i in range(self.words):
                    word = (
                        f"path[{i}, j]" if self.shape.exchange == "shared" else f"cuda.shfl_sync({_MASK}, kept{i}, j)"
                    )
                    w(f"word{i} = {word}")
                for r in rows:
                    w(f"holder = base + THREAD[who{r}]")
                    first = r * self.slots * kind.bits
                    if self.slots == 2:
                        # The position in which a state is found: its slot, turned where its thread's are.
                        w(f"second_word = (SLOT[who{r}] ^ (THREAD[who{r}] >> 1)) & 1")
                        names = [
                            f"(word{first + kind.bits + b} if second_word else word{first + b})"
                            for b in range(kind.bits)
                        ]
                    else:
                        names = [f"word{first + b}" for b in range(kind.bits)]
                    bits = " | ".join(f"({n} >> holder & 1) << {b}" for b, n in enumerate(names))
                    w(f"earlier = PREVIOUS[who{r}, {bits}]")
                    with w.block(f"if at == j & {self.width - 1}:"):
                        w(f"symbol{r} = SYMBOL[who{r}]\nlevel_of{r} = LEVEL1[who{r}] + LEVEL2[earlier]")
                    w(f"who{r} = earlier")
                with w.block(f"if j & {self.width - 1} == 0:"):
                    for r in rows:
                        with w.block(f"if there{r} and start + j + at < steps:"):
                            w(f"symbols[row{r}, first{r} + start + j + at] = symbol{r}")
                            w(f"values[row{r}, first{r} + start + j + at] = level_of{r}")


def search_source(kind: AType, shape: SearchShape) -> str:
    source = _Source(kind, shape)
    text = source.text()
    if shape.exchange == "shared":  # every thread's copy of a chunk's ballots
        head, body = text.split("\n", 1)
        text = f"{head}\n    path = cuda.local.array(({source.words}, {WARP}), int32)\n{body}"
    return text


@cache
def search_kernel(kind: AType, shape: SearchShape) -> Any:
    """The kernel `search(x, scale, inverse, band, factor, lane, lanes, back, symbols, values, costs)`.

    In: `x` [rows, lanes * steps] float32, the targets of `lanes` lanes from `lane` on, of which errors older than the
    horizon are taken off; `scale` [rows, steps] float32; of all 32 lanes `inverse` [32, steps], one over the factor's
    diagonal, `band` [32, steps, horizon] (`athena_gguf.encode.horizon`) and `factor` [32, steps, steps] float32.
    `back` [warps, words, steps] int32: for the choices. Out: `symbols` uint8 and `values` int8, both as x;
    `costs` [rows, lanes] float32, the sums of the squared errors.
    """
    graph = trellis(kind)
    slots, width = _slots(kind), _width(kind)
    places = np.array([thread_of(kind, n) for n in range(kind.states)], np.int32)
    state = np.empty((slots, width), np.int32)
    state[places[:, 1], places[:, 0]] = np.arange(kind.states)
    level1 = kind.table1.astype(np.int32)[graph.index1] - 64
    level2 = kind.table2.astype(np.int32)[graph.index2]
    tables = {
        "STATE": state,
        "FIRST": level1.astype(np.float32)[state],
        "SECOND": level2.astype(np.float32)[state],
        "SOURCE": _sources(kind),
        "THREAD": places[:, 0].copy(),
        "SLOT": places[:, 1].copy(),
        "PREVIOUS": graph.previous.astype(np.int32),
        "SYMBOL": graph.symbol.astype(np.int32),
        "LEVEL1": level1,
        "LEVEL2": level2,
    }
    return made_kernel("search", search_source(kind, shape), tables)
