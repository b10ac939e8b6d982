"""The result file: everything as in the base file, except for the tensors that are replaced."""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import types
from athena_gguf.gguf_file.atomic import atomic_write, require_space
from athena_gguf.gguf_file.layout import MAGIC, VERSION, Value, pack_string, pack_value
from athena_gguf.gguf_file.reader import GGUFFile, Tensor

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h


@dataclass(frozen=True)
class Replacement:
    """New data for a tensor: its type, and a function that makes its bytes [..., rows, bytes of a row] when asked."""

    type_name: str
    data: Callable[[], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class _Planned:
    tensor: Tensor
    type_name: str
    size: int
    offset: int


def write_quantized(
    base_path: Path | str,
    out_path: Path | str,
    replace: Mapping[str, Replacement],
    metadata: Mapping[str, Value],
    *,
    file_type: int,
) -> None:
    """Write `out_path` with the metadata and tensors of `base_path`, those named in `replace` with new type and data.

    `metadata` is added (keys that exist are overwritten), `general.file_type` and `general.quantization_version` are
    set. Tensors are made and written one after the other, in the base file's order. The same arguments give the same
    bytes. `out_path` appears only when it is complete. Raises AthenaError if the base file cannot be read, a name is
    not in it, a shape or type does not fit, or the disk has no room.
    """
    out_path = Path(out_path)
    with GGUFFile(base_path) as base:
        unknown = sorted(set(replace) - set(base.tensors))
        if unknown:
            raise AthenaError(f"{base_path} has no tensor {unknown[0]}")
        changes = dict(metadata) | {
            "general.file_type": file_type,
            "general.quantization_version": QUANTIZATION_VERSION,
        }
        planned = _plan(base, replace)
        header = _header(base, planned, changes)
        total = len(header) + (planned[-1].offset + planned[-1].size + base.alignment if planned else 0)
        require_space(out_path.parent, total, str(out_path))
        with atomic_write(out_path) as out:
            out.write(header)
            for item in planned:
                _write_tensor(out, item, replace.get(item.tensor.name), base.alignment)


def _plan(base: GGUFFile, replace: Mapping[str, Replacement]) -> list[_Planned]:
    planned, offset = [], 0
    for tensor in base:
        change = replace.get(tensor.name)
        kind = change.type_name if change else tensor.type_name
        try:
            size = math.prod(tensor.shape[:-1]) * types.row_bytes(kind, tensor.columns)
        except KeyError:
            raise AthenaError(f"tensor {tensor.name}: unknown type {kind}") from None
        except ValueError as error:
            raise AthenaError(f"tensor {tensor.name}: {error}") from None
        planned.append(_Planned(tensor, kind, size, offset))
        offset += size + -size % base.alignment
    return planned


def _header(base: GGUFFile, planned: list[_Planned], changes: Mapping[str, Value]) -> bytes:
    fields = {key: field.packed for key, field in base.fields.items()}
    fields |= {key: pack_value(value) for key, value in changes.items()}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(planned), len(fields))]
    parts += [pack_string(key) + packed for key, packed in fields.items()]
    for item in planned:
        shape = item.tensor.shape[::-1]
        parts.append(pack_string(item.tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", types.type_id(item.type_name), item.offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % base.alignment)


def _write_tensor(out: BinaryIO, item: _Planned, change: Replacement | None, alignment: int) -> None:
    tensor = item.tensor
    data = tensor.data if change is None else change.data()
    shape = (*tensor.shape[:-1], types.row_bytes(item.type_name, tensor.columns))
    if data.dtype != np.uint8 or data.shape != shape:
        raise AthenaError(
            f"tensor {tensor.name}: {item.type_name} data must be bytes of shape {list(shape)}, not {data.dtype} of "
            f"shape {list(data.shape)}"
        )
    out.write(np.ascontiguousarray(data).data)
    out.write(bytes(-item.size % alignment))
