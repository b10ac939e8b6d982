"""Rows of symbols to bytes and back, and the reference decoder (`docs/format.md`, "Row" and "Value").

All of it works on NumPy arrays or on torch tensors of bytes, on any device; results are of the same kind.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from athena_gguf.format.scales import decode_scale
from athena_gguf.format.types import GROUP, LANES, SUPERBLOCK, AType

if TYPE_CHECKING:
    import torch

U8 = npt.NDArray[np.uint8]
Bytes = TypeVar("Bytes", U8, "torch.Tensor")
_SCALES = decode_scale(np.arange(256, dtype=np.uint8))


def row_bytes(kind: AType, columns: int) -> int:
    """Bytes of a row. Raises ValueError if `columns` is no positive multiple of 64."""
    if columns <= 0 or columns % GROUP:
        raise ValueError(f"{kind.name} rows need a multiple of {GROUP} columns, not {columns}")
    return columns // GROUP * kind.group_bytes


def windows(kind: AType, symbols: Bytes) -> Bytes:
    """The 4-bit window w_t of every weight; `symbols` and the result are [rows, columns] in column order."""
    if kind.bits == 4:
        return symbols
    before = _delayed(symbols, 1)
    if kind.bits == 2:
        return symbols << 2 | before
    return symbols >> 1 << 2 | (symbols & 1) << 1 | before & 1


def levels(kind: AType, symbols: Bytes) -> Any:
    """The unscaled integer value T1[w_t] + T2[w_{t-d}] - 64 of every weight, [rows, columns] int8."""
    w = windows(kind, symbols)
    # Sums lie between 0 and 127, and so in the bytes that the tables have.
    values = _entries(kind.table1.astype(np.int8) - np.int8(64), w)
    return values + _entries(kind.table2.astype(np.int8), _delayed(w, kind.delay))


def pack_rows(kind: AType, symbols: Bytes, scale_bytes: Bytes) -> Bytes:
    """Symbols [rows, columns] below 2^bits and scale bytes [rows, columns / 64] to rows of bytes [rows, row_bytes]."""
    rows, columns = symbols.shape
    size = row_bytes(kind, columns)
    if scale_bytes.shape != (rows, columns // GROUP):
        raise ValueError(f"scale bytes have shape {scale_bytes.shape}, not {(rows, columns // GROUP)}")
    if rows and int(symbols.max()) >> kind.bits:
        raise ValueError(f"a symbol is larger than {kind.bits} bits")
    full = columns // SUPERBLOCK
    cut = full * SUPERBLOCK
    head = _pack_superblocks(kind, symbols[:, :cut].reshape(rows, full, 8, LANES), scale_bytes[:, : full * 4])
    tail = _pack_tails(kind, symbols[:, cut:].reshape(rows, -1, 2, LANES), scale_bytes[:, full * 4 :])
    out = _concatenate([head, tail], 1)
    assert out.shape == (rows, size)
    return out


def unpack_rows(kind: AType, data: Bytes, columns: int) -> tuple[Bytes, Bytes]:
    """The inverse of `pack_rows`: symbols [rows, columns] and scale bytes [rows, columns / 64]."""
    size = row_bytes(kind, columns)
    if data.ndim != 2 or data.shape[1] != size:
        raise ValueError(f"{kind.name} rows of {columns} columns have {size} bytes, not {data.shape}")
    rows = data.shape[0]
    full = columns // SUPERBLOCK
    cut = full * 4 * kind.group_bytes
    s_head, b_head = _unpack_superblocks(kind, data[:, :cut].reshape(rows, full, 4 * kind.group_bytes))
    s_tail, b_tail = _unpack_tails(kind, data[:, cut:].reshape(rows, -1, kind.group_bytes))
    return _concatenate([s_head, s_tail], 1), _concatenate([b_head, b_tail], 1)


def decode_rows(kind: AType, data: Bytes, columns: int) -> Any:
    """Rows of bytes [rows, row_bytes] to float32 weights [rows, columns]; the reference for every other decoder."""
    symbols, scale_bytes = unpack_rows(kind, data, columns)
    steps = levels(kind, symbols).reshape(len(data), -1, GROUP)
    return (steps * _entries(_SCALES, scale_bytes)[:, :, None]).reshape(len(data), columns)


def _entries(table: npt.NDArray[Any], index: Any) -> Any:
    """Of a table, for every byte of `index`."""
    if isinstance(index, np.ndarray):
        return table[index]
    import torch

    return torch.from_numpy(table).to(index.device)[index.int()]


def _delayed(steps: Any, by: int) -> Any:
    """[rows, columns], every lane's steps moved on by so many; zeros come first."""
    cut = by * LANES
    return _concatenate([steps[:, :cut] * 0, steps[:, : steps.shape[1] - cut]], 1)


def _fields(bytes_: Any, width: int) -> Any:
    """Split every byte into its 8 / width fields, lowest first, as a new axis before the last one."""
    return _stacked([bytes_ >> shift & (1 << width) - 1 for shift in range(0, 8, width)])


def _join(fields: Any, width: int) -> Any:
    """The inverse of `_fields`: [..., 8 / width, n] to [..., n]."""
    joined = fields[..., 0, :]
    for i in range(1, 8 // width):
        joined = joined | fields[..., i, :] << i * width
    return joined


def _concatenate(parts: list[Any], axis: int) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=axis)
    import torch

    return torch.cat(parts, axis)


def _stacked(parts: list[Any]) -> Any:
    """Side by side in a new axis before the last one."""
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts, axis=-2)
    import torch

    return torch.stack(parts, -2)


def _pack_superblocks(kind: AType, s: Any, scales: Any) -> Any:
    """`s` [rows, blocks, 8 steps, 32 lanes]."""
    rows, blocks = s.shape[:2]
    parts = [scales.reshape(rows, blocks, 4)]
    if kind.bits == 4:
        parts.append(_join(s.reshape(rows, blocks, 4, 2, LANES), 4))
    else:
        high = s if kind.bits == 2 else s >> 1
        parts.append(_join(high.reshape(rows, blocks, 2, 4, LANES), 2))
        if kind.bits == 3:
            parts.append(_join(s & 1, 1))
    flat = [p.reshape(rows, blocks, math.prod(p.shape[2:])) for p in parts]
    return _concatenate(flat, 2).reshape(rows, blocks * 4 * kind.group_bytes)


def _unpack_superblocks(kind: AType, data: Any) -> tuple[Any, Any]:
    rows, blocks = data.shape[:2]
    scales, planes = data[..., :4], data[..., 4:]
    if kind.bits == 4:
        s = _fields(planes.reshape(rows, blocks, 4, LANES), 4)
    else:
        s = _fields(planes[..., :64].reshape(rows, blocks, 2, LANES), 2)
        if kind.bits == 3:
            low = _fields(planes[..., 64:].reshape(rows, blocks, 1, LANES), 1)
            s = s << 1 | low.reshape(s.shape)
    return s.reshape(rows, blocks * SUPERBLOCK), scales.reshape(rows, blocks * 4)


def _pack_tails(kind: AType, s: Any, scales: Any) -> Any:
    """`s` [rows, blocks, 2 steps, 32 lanes]. A byte holds both steps of lanes j, j + n, ...: n bytes a plane."""
    rows, blocks = s.shape[:2]
    parts = [scales.reshape(rows, blocks, 1)]
    if kind.bits == 4:
        parts.append(_join(s, 4))
    else:
        parts.append(_tail_plane(s if kind.bits == 2 else s >> 1, 2))
        if kind.bits == 3:
            parts.append(_tail_plane(s & 1, 1))
    return _concatenate(parts, 2).reshape(rows, blocks * kind.group_bytes)


def _tail_plane(s: Any, width: int) -> Any:
    rows, blocks = s.shape[:2]
    share = 8 // (2 * width)  # lanes that share a byte
    lanes = s.reshape(rows, blocks, 2, share, LANES // share).swapaxes(2, 3)
    return _join(lanes.reshape(rows, blocks, 2 * share, LANES // share), width)


def _tail_fields(data: Any, width: int) -> Any:
    rows, blocks = data.shape[:2]
    share = 8 // (2 * width)
    lanes = _fields(data, width).reshape(rows, blocks, share, 2, LANES // share).swapaxes(2, 3)
    return lanes.reshape(rows, blocks, 2, LANES)


def _unpack_tails(kind: AType, data: Any) -> tuple[Any, Any]:
    rows, blocks = data.shape[:2]
    scales, planes = data[..., :1], data[..., 1:]
    if kind.bits == 4:
        s = _fields(planes, 4)  # [rows, blocks, 2, 32]
    else:
        s = _tail_fields(planes[..., :16], 2)
        if kind.bits == 3:
            s = s << 1 | _tail_fields(planes[..., 16:], 1)
    return s.reshape(rows, blocks * GROUP), scales.reshape(rows, blocks)
