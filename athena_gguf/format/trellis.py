"""The trellis behind a type: which states follow which, and which table entries a transition uses.

A state holds the earlier symbols that later values can still see. States fall into groups that share their
predecessors: inside a group every predecessor reaches every state, and the value of a transition is a sum of a term of
the new state (table 1) and a term of the old one (table 2). Encoders rest on that.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from athena_gguf.format.types import AType

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Trellis:
    """`previous` [states, 2^bits]: predecessors of a state. The others [states]: the symbol whose step ends in the
    state, the table 1 entry of that step, and the table 2 entry of any step that starts in the state."""

    previous: I32
    symbol: I32
    index1: I32
    index2: I32


def trellis(kind: AType) -> Trellis:
    """The trellis of a type.

    A2: state `s_t << 4 | s_{t-1} << 2 | s_{t-2}`; A3: the window w_t; A4: the symbol s_t. State 0 precedes every row.
    """
    n = np.arange(kind.states, dtype=np.int32)
    x = np.arange(1 << kind.bits, dtype=np.int32)
    if kind.bits == 2:
        return Trellis(((n & 15) << 2)[:, None] | x, n >> 4, n >> 2, n & 15)
    if kind.bits == 3:
        return Trellis((x >> 1 << 2 | x & 1) | ((n & 1) << 1)[:, None], n >> 1, n, n)
    return Trellis(np.broadcast_to(x, (16, 16)).copy(), n, n, n)
