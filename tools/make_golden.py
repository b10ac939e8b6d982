"""Write the golden vectors that the Python and the C tests read: rows of every type, their bytes and decoded floats.

A file is little-endian: the bytes "ATHG", uint32 ggml type, uint32 number of rows; then for every row uint32 columns,
its bytes (columns / 64 * group bytes) and its float32 values. Half of the rows are random bytes, half random symbols
under scales of ordinary size. The decoder here is the plain transcription of docs/format.md, one weight at a time, so
that it shares nothing with athena_gguf.format but the tables.

    python tools/make_golden.py tests/golden
"""

import argparse
import struct
from pathlib import Path

import numpy as np

from athena_gguf.format import TYPES, AType, encode_scale, pack_rows, row_bytes

WIDTHS = (64, 128, 192, 256, 320, 576, 896, 1536, 4096)


def bit(value: int, position: int) -> int:
    return value >> position & 1


def symbol_at(kind: AType, data: bytes, columns: int, step: int, lane: int) -> int:
    """The symbol of one lane at one step, straight from the text of the format."""
    full = columns // 256
    if step < full * 8:
        base, t, in_tail = step // 8 * 4 * kind.group_bytes + 4, step % 8, False
    else:
        base, t, in_tail = full * 4 * kind.group_bytes + (step - full * 8) // 2 * kind.group_bytes + 1, step % 2, True
    if kind.name == "A4":
        return data[base + t // 2 * 32 + lane] >> 4 * (t % 2) & 15
    if in_tail:
        two = data[base + lane % 16] >> (4 * (lane // 16) + 2 * t) & 3
        low = bit(data[base + 16 + lane % 8], 2 * (lane // 8) + t) if kind.name == "A3" else 0
    else:
        two = data[base + t // 4 * 32 + lane] >> 2 * (t % 4) & 3
        low = bit(data[base + 64 + lane], t) if kind.name == "A3" else 0
    return two << 1 | low if kind.name == "A3" else two


def decode_plainly(kind: AType, data: bytes, columns: int) -> np.ndarray:
    """One row, one weight at a time: [columns] float32."""
    out = np.zeros(columns, np.float32)
    for lane in range(32):
        symbols, windows = [0], [0] * kind.delay
        for step in range(columns // 32):
            s, before = symbol_at(kind, data, columns, step, lane), symbols[-1]
            symbols.append(s)
            w = {"A2": s << 2 | before, "A3": s >> 1 << 2 | (s & 1) << 1 | before & 1, "A4": s}[kind.name]
            windows.append(w)
            level = int(kind.table1[w]) + int(kind.table2[windows[-1 - kind.delay]]) - 64
            group, full = step // 2, columns // 256
            if group < full * 4:
                code = data[group // 4 * 4 * kind.group_bytes + group % 4]
            else:
                code = data[full * 4 * kind.group_bytes + (group - full * 4) * kind.group_bytes]
            scale = struct.unpack("<f", struct.pack("<I", (code << 19) + (108 << 23)))[0]
            out[step * 32 + lane] = np.float32(scale) * np.float32(level)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for kind in TYPES.values():
        rng = np.random.default_rng(kind.ggml_type)
        records = []
        for columns in WIDTHS:
            symbols = rng.integers(0, 1 << kind.bits, (1, columns)).astype(np.uint8)
            scales = encode_scale(rng.lognormal(-6.5, 0.5, (1, columns // 64)))
            for data in (
                rng.integers(0, 256, row_bytes(kind, columns)).astype(np.uint8).tobytes(),
                pack_rows(kind, symbols, scales).tobytes(),
            ):
                values = decode_plainly(kind, data, columns)
                records.append(struct.pack("<I", columns) + data + values.astype("<f4").tobytes())
        head = b"ATHG" + struct.pack("<II", kind.ggml_type, len(records))
        (directory / f"{kind.name.lower()}.bin").write_bytes(head + b"".join(records))


if __name__ == "__main__":
    main()
