"""What distinguishes the three types: symbol width, the step distance of the second table, the tables, the ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from athena_gguf.format.tables import TABLES

FORMAT_VERSION = 1
LANES = 32  # columns of one step; column c is lane c % 32 of step c // 32
GROUP = 64  # columns that share a scale
SUPERBLOCK = 256  # columns of a full block: four groups, eight steps


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: there are three
class AType:
    """One tensor type. `table1`, `table2`: 16 unsigned bytes, any sum of two at most 127."""

    name: str
    ggml_type: int  # id in ggml and GGUF
    file_type: int  # general.file_type (llama_ftype) of a file made mostly of this type
    bits: int  # of a symbol
    delay: int  # steps from the window that indexes table1 to the one that indexes table2
    state_bits: int  # of the trellis: what later values can still see
    table1: npt.NDArray[np.uint8]
    table2: npt.NDArray[np.uint8]

    @property
    def group_bytes(self) -> int:
        """Bytes of 64 columns: the scale byte and 64 symbols."""
        return 1 + self.bits * GROUP // 8

    @property
    def bits_per_weight(self) -> float:
        return self.group_bytes * 8 / GROUP

    @property
    def states(self) -> int:
        return 1 << self.state_bits


def _make(name: str, ggml_type: int, bits: int, delay: int, state_bits: int) -> AType:
    t1, t2 = (np.array(t, np.uint8) for t in TABLES[name])
    assert t1.shape == t2.shape == (16,) and int(t1.max()) + int(t2.max()) <= 127
    t1.setflags(write=False)
    t2.setflags(write=False)
    return AType(name, ggml_type, ggml_type, bits, delay, state_bits, t1, t2)


A2 = _make("A2", 120, bits=2, delay=2, state_bits=6)
A3 = _make("A3", 121, bits=3, delay=1, state_bits=4)
A4 = _make("A4", 122, bits=4, delay=1, state_bits=4)
TYPES = {t.name: t for t in (A2, A3, A4)}
