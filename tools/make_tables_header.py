"""Write the codebook tables of athena_gguf.format for the C code.

python tools/make_tables_header.py            # rewrites ggml_patch/src/ggml/src/ggml-athena-tables.h
"""

from pathlib import Path

from athena_gguf.format import TYPES

HEADER = Path(__file__).resolve().parents[1] / "ggml_patch/src/ggml/src/ggml-athena-tables.h"


def table_lines(name: str, entries: list[int]) -> str:
    return f"    .{name} = {{ {', '.join(f'{e:2d}' for e in entries)} }},\n"


def header_text() -> str:
    """The whole text of ggml-athena-tables.h."""
    parts = [
        "// Made by tools/make_tables_header.py from athena_gguf/format/tables.py: do not edit.\n\n#pragma once\n\n"
        "#include <stdint.h>\n\n"
        "typedef struct {\n    uint8_t t1[16];\n    uint8_t t2[16];\n} athena_tables;\n"
    ]
    for kind in TYPES.values():
        parts.append(f"\nstatic const athena_tables athena_tables_{kind.name.lower()} = {{\n")
        parts.append(table_lines("t1", kind.table1.tolist()) + table_lines("t2", kind.table2.tolist()) + "};\n")
    return "".join(parts)


if __name__ == "__main__":
    HEADER.write_text(header_text())
