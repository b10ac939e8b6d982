"""Write the tables and the worked examples into docs/format.md; with --check only say whether they are current.

python tools/update_format_doc.py
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
from make_golden import decode_plainly, symbol_at

from athena_gguf.format import TYPES, AType, decode_scale, levels, windows

DOC = Path(__file__).resolve().parent.parent / "docs" / "format.md"
SCALE_BYTES = {"A2": 0x8C, "A3": 0x85, "A4": 0x7E}
TRACED_LANES = (0, 21)
COLUMNS = {"A2": 128, "A3": 64, "A4": 64}  # A2 looks two steps back, so one tail block would not show its table 2


def example_row(kind: AType) -> bytes:
    """The row of the worked example: tail blocks that start with the scale byte."""
    row = bytearray((37 * i + 9) % 256 for i in range(COLUMNS[kind.name] // 64 * kind.group_bytes))
    row[:: kind.group_bytes] = bytes([SCALE_BYTES[kind.name]]) * (COLUMNS[kind.name] // 64)
    return bytes(row)


def tables() -> str:
    lines = []
    for kind in TYPES.values():
        lines += [f"{kind.name} T{n} = {t.tolist()}" for n, t in ((1, kind.table1), (2, kind.table2))]
    return "```\n" + "\n".join(lines) + "\n```"


def example(kind: AType) -> str:
    row, columns, name = example_row(kind), COLUMNS[kind.name], kind.name
    symbols = np.array([[symbol_at(kind, row, columns, c // 32, c % 32) for c in range(columns)]], np.uint8)
    s, w, level = (a[0].reshape(-1, 32) for a in (symbols, windows(kind, symbols), levels(kind, symbols)))
    values = decode_plainly(kind, row, columns).reshape(-1, 32)
    lines = [f"{name} bytes = {row.hex(' ')}", f"{name} scale = {float(decode_scale(np.array(row[0], np.uint8)))!r}"]
    for lane in TRACED_LANES:
        for t in range(columns // 32):
            delayed = w[t - kind.delay, lane] if t >= kind.delay else 0
            lines.append(
                f"{name} lane {lane}, step {t}, column {32 * t + lane}: symbol {s[t, lane]}, window {w[t, lane]}, "
                f"T1[{w[t, lane]}] + T2[{delayed}] - 64 = {level[t, lane]}, weight {float(values[t, lane])!r}"
            )
    lines += [f"{name} levels = {' '.join(map(str, line))}" for line in level.tolist()]
    return "\n".join(lines)


def examples() -> str:
    return "\n\n".join(f"```\n{example(kind)}\n```" for kind in TYPES.values())


def updated(text: str) -> str:
    """The text of the document with both generated parts as they should be."""
    for name, content in (("tables", tables()), ("examples", examples())):
        pattern = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)
        if count != 1:
            sys.exit(f"{DOC}: the markers of the {name} are gone")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = DOC.read_text(encoding="utf-8")
    new = updated(text)
    if args.check and new != text:
        sys.exit("docs/format.md does not hold the current tables; run python tools/update_format_doc.py")
    if not args.check:
        DOC.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
