"""Reads the golden vectors of tests/golden (layout: tools/make_golden.py)."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from athena_gguf.format import AType, row_bytes

DIRECTORY = Path(__file__).parent / "golden"


def read(kind: AType) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(columns, row bytes [n] uint8, values [columns] float32) of every golden row of a type."""
    raw = (DIRECTORY / f"{kind.name.lower()}.bin").read_bytes()
    magic, ggml_type, count = struct.unpack_from("<4sII", raw)
    assert magic == b"ATHG" and ggml_type == kind.ggml_type
    at = 12
    for _ in range(count):
        (columns,) = struct.unpack_from("<I", raw, at)
        size = row_bytes(kind, columns)
        data = np.frombuffer(raw, np.uint8, size, at + 4)
        values = np.frombuffer(raw, "<f4", columns, at + 4 + size)
        at += 4 + size + 4 * columns
        yield columns, data, values
    assert at == len(raw)
