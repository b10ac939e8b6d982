"""The result file: everything as in the base file, except for the tensors that are replaced."""

import math
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from athena_gguf.ahead import ahead
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import types
from athena_gguf.gguf_file.atomic import atomic_write, require_space
from athena_gguf.gguf_file.layout import MAGIC, VERSION, Value, pack_string, pack_value
from athena_gguf.gguf_file.reader import GGUFFile, Tensor
from athena_gguf.memory import cores

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
_BYTES = 4  # that a tensor takes while it is made, at most, for each of its own: float32 of what becomes BF16
_MOST_BYTES = 2 << 30  # of all tensors that are made ahead of their turn


@dataclass(frozen=True)
class Replacement:
    """New data for a tensor: its type, and a function that makes its bytes [..., rows, bytes of a row] when asked."""

    type_name: str
    data: Callable[[], npt.NDArray[np.uint8]]


def result_bytes(base: GGUFFile, kinds: Mapping[str, str], metadata: Mapping[str, Value], *, file_type: int) -> int:
    """The exact size of what `write_quantized` would write, with `kinds` for the types of the tensors that change.

    Needs no more than the header of `base`.
    """
    planned = _plan(base, kinds)
    size = len(_header(base, planned, _changes(metadata, file_type)))
    return size + sum(item.size + -item.size % base.alignment for item in planned)


def tensor_bytes(tensor: Tensor, kind: str) -> int:
    """Bytes of a tensor of the base file in another type. Raises AthenaError if its rows don't fit that type."""
    try:
        return math.prod(tensor.shape[:-1]) * types.row_bytes(kind, tensor.columns)
    except KeyError:
        raise AthenaError(f"tensor {tensor.name}: unknown type {kind}") from None
    except ValueError as error:
        raise AthenaError(f"tensor {tensor.name}: {error}") from None


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
    metadata: Mapping[str, Value | None],
    *,
    file_type: int,
) -> None:
    """Write `out_path` with the metadata and tensors of `base_path`, those named in `replace` with new type and data.

    `metadata` is added (keys that exist are overwritten, or left out for None), `general.file_type` and
    `general.quantization_version` are set. Tensors are written in the base file's order, and made ahead in threads.
    The same arguments give the same bytes. `out_path` appears only when it is complete. Raises AthenaError if the base
    file cannot be read, a name is not in it, a shape or type does not fit, or the disk has no room.
    """
    out_path = Path(out_path)
    with GGUFFile(base_path) as base:
        unknown = sorted(set(replace) - set(base.tensors))
        if unknown:
            raise AthenaError(f"{base_path} has no tensor {unknown[0]}")
        planned = _plan(base, {name: change.type_name for name, change in replace.items()})
        header = _header(base, planned, _changes(metadata, file_type))
        total = len(header) + (planned[-1].offset + planned[-1].size + base.alignment if planned else 0)
        require_space(out_path.parent, total, str(out_path))
        tasks = [(_BYTES * item.size, partial(_data, item, replace.get(item.tensor.name))) for item in planned]
        with atomic_write(out_path) as out, closing(ahead(tasks, cores(), _MOST_BYTES)) as made:
            out.write(header)
            for data in made:
                _write_tensor(out, data, base.alignment)


def _changes(metadata: Mapping[str, Value | None], file_type: int) -> dict[str, Value | None]:
    return dict(metadata) | {
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _plan(base: GGUFFile, kinds: Mapping[str, str]) -> list[_Planned]:
    planned, offset = [], 0
    for tensor in base:
        kind = kinds.get(tensor.name, tensor.type_name)
        size = tensor_bytes(tensor, kind)
        planned.append(_Planned(tensor, kind, size, offset))
        offset += size + -size % base.alignment
    return planned


def _header(base: GGUFFile, planned: list[_Planned], changes: Mapping[str, Value | None]) -> bytes:
    fields = {key: field.packed for key, field in base.fields.items() if changes.get(key, 0) is not None}
    fields |= {key: pack_value(value) for key, value in changes.items() if value is not None}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(planned), len(fields))]
    parts += [pack_string(key) + packed for key, packed in fields.items()]
    for item in planned:
        shape = item.tensor.shape[::-1]
        parts.append(pack_string(item.tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", types.type_id(item.type_name), item.offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % base.alignment)


def _write_tensor(out: BinaryIO, data: npt.NDArray[np.uint8], alignment: int) -> None:
    out.write(data.data)
    out.write(bytes(-data.nbytes % alignment))


def _data(item: _Planned, change: Replacement | None) -> npt.NDArray[np.uint8]:
    tensor = item.tensor
    data = tensor.data if change is None else change.data()
    shape = (*tensor.shape[:-1], types.row_bytes(item.type_name, tensor.columns))
    if data.dtype != np.uint8 or data.shape != shape:
        raise AthenaError(
            f"tensor {tensor.name}: {item.type_name} data must be bytes of shape {list(shape)}, not {data.dtype} of "
            f"shape {list(data.shape)}"
        )
    return np.ascontiguousarray(data)
