"""What is in a GGUF file."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from athena_gguf.gguf_file.layout import Value
from athena_gguf.gguf_file.reader import GGUFFile

_SHOWN_ITEMS, _SHOWN_CHARACTERS = 4, 100


def bits_per_weight(file: GGUFFile) -> float:
    """Bits of all tensors by the number of their weights."""
    weights = file.n_elements
    return sum(t.n_bytes for t in file) * 8 / weights if weights else 0.0


def inspect_file(path: Path) -> dict[str, Any]:
    """Metadata (arrays longer than 4 as count and first items), tensors, totals by type. Raises AthenaError."""
    with GGUFFile(path) as file:
        kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for tensor in file:
            total = kinds[tensor.type_name]
            for i, part in enumerate((1, tensor.n_elements, tensor.n_bytes)):
                total[i] += part
        return {
            "file": str(path),
            "bytes": file.n_bytes,
            "version": file.version,
            "weights": file.n_elements,
            "tensor_bytes": sum(t.n_bytes for t in file),
            "bpw": bits_per_weight(file),
            "types": {
                name: {"tensors": count, "weights": weights, "bytes": size, "bpw": size * 8 / weights}
                for name, (count, weights, size) in sorted(kinds.items())
            },
            "metadata": {key: _abbreviated(value) for key, value in file.metadata.items()},
            "tensors": [
                {
                    "name": t.name,
                    "type": t.type_name,
                    "shape": list(t.shape),
                    "bytes": t.n_bytes,
                    "bpw": t.bits_per_weight,
                }
                for t in file
            ],
        }


def print_inspection(path: Path, as_json: bool) -> None:
    """The result of `inspect_file` on stdout."""
    found = inspect_file(path)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    mib = 1024 * 1024
    print(f"{found['file']}: {found['bytes'] / mib:.2f} MiB, GGUF version {found['version']}")
    print("\nMetadata")
    for key, value in found["metadata"].items():
        print(f"  {key} = {_shown(value)}")
    print("\nTensors")
    width = max((len(t["name"]) for t in found["tensors"]), default=0)
    for t in found["tensors"]:
        shape = " x ".join(map(str, t["shape"]))
        print(f"  {t['name']:{width}}  {t['type']:6} {t['bpw']:7.3f} bpw  {shape:>20}  {t['bytes']:>12,} bytes")
    print("\nTypes")
    for name, total in found["types"].items():
        count, weights = total["tensors"], total["weights"]
        print(f"  {name:6} {count:5} tensors {weights:>16,} weights {total['bytes'] / mib:10.2f} MiB")
    print(f"\n{found['weights']:,} weights in {found['tensor_bytes'] / mib:.2f} MiB: {found['bpw']:.3f} bits a weight")


def _abbreviated(value: Value) -> Any:
    if isinstance(value, list) and len(value) > _SHOWN_ITEMS:
        return {"count": len(value), "first": value[:_SHOWN_ITEMS]}
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['count']} items: {_cut(', '.join(map(repr, value['first'])))}, ..."
    return _cut(repr(value) if isinstance(value, str) else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
