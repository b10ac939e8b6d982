"""A GGUF file as metadata and memory-mapped tensors. Needs NumPy and gguf-py only, so that it opens fast."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from athena_gguf.errors import AthenaError
from athena_gguf.format import FORMAT_VERSION, TYPES, decode_rows
from athena_gguf.gguf_file import types
from athena_gguf.gguf_file.layout import MAGIC, Cursor, Field, Value, read_field

if TYPE_CHECKING:
    import torch

DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_DECODED = 1 << 24  # weights decoded on a GPU in one go: each takes some 17 bytes meanwhile


@dataclass(frozen=True)
class Tensor:
    """One tensor. `shape` is NumPy's order: [rows, columns], or [experts, rows, columns]."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    data: npt.NDArray[np.uint8]  # [*shape[:-1], bytes of a row], read-only, mapped from the file

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def bits_per_weight(self) -> float:
        return self.n_bytes * 8 / self.n_elements if self.n_elements else 0.0

    @property
    def flat(self) -> Tensor:
        """The same rows as one matrix."""
        return Tensor(
            self.name,
            (math.prod(self.shape[:-1]), self.columns),
            self.type_name,
            self.data.reshape(-1, self.data.shape[-1]),
        )

    def to_float32(self, rows: slice | npt.NDArray[np.intp] = slice(None)) -> npt.NDArray[np.float32]:
        """The weights as float32; `rows`: of the first axis. Raises AthenaError if the type cannot be decoded."""
        data = self.data[rows]
        shape = (*data.shape[:-1], self.columns)
        if self.type_name in TYPES:
            flat = decode_rows(TYPES[self.type_name], data.reshape(-1, data.shape[-1]), self.columns)
            return flat.reshape(shape)
        import gguf

        kind = gguf.GGMLQuantizationType(types.type_id(self.type_name))
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(self.type_name)
        if plain is not None:
            return np.ascontiguousarray(data).view(plain).astype(np.float32).reshape(shape)
        try:
            return gguf.quants.dequantize(np.ascontiguousarray(data), kind).astype(np.float32).reshape(shape)
        except NotImplementedError as error:
            raise AthenaError(f"tensor {self.name}: {self.type_name} cannot be decoded here") from error

    def to_torch(self, device: torch.device | str) -> torch.Tensor:
        """The weights as float32 on a device; BF16 and A types go there as they are."""
        import torch

        if self.type_name == "BF16":
            bits = torch.from_numpy(self.data.view(np.int16).copy())
            return bits.to(device).view(torch.bfloat16).float()
        if self.type_name in TYPES and torch.device(device).type != "cpu":
            rows = self.flat.data
            found = torch.empty(len(rows), self.columns, device=device)
            step = max(1, _DECODED // self.columns)
            for a in range(0, len(rows), step):
                piece = torch.from_numpy(rows[a : a + step].copy()).to(device)
                found[a : a + step] = decode_rows(TYPES[self.type_name], piece, self.columns)
            return found.reshape(self.shape)
        return torch.from_numpy(self.to_float32()).to(device)


class GGUFFile:
    """A GGUF file, mapped into memory; close it, or use it in a `with`, to release the mapping.

    `fields`: key -> Field in file order; `tensors`: name -> Tensor in file order. Raises AthenaError naming the file
    and what is wrong with it if it is absent, no GGUF, truncated, of a newer format version, or if anything in it
    points outside of it. `unfinished`: one whose header is there, while its tensors are still written; their data are
    zeros.
    """

    def __init__(self, path: Path | str, unfinished: bool = False) -> None:
        self.path, self.unfinished = Path(path), unfinished
        try:
            with open(self.path, "rb") as handle:
                start = handle.read(4)
                self.n_bytes = handle.seek(0, 2)
                if start != MAGIC:
                    raise AthenaError(f"{self.path} is no GGUF file (it does not start with GGUF)")
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise AthenaError(f"{self.path}: {error.strerror or error}") from error
        self.fields: dict[str, Field] = {}
        self.tensors: dict[str, Tensor] = {}
        self._parse(Cursor(memoryview(self._map), self.path))
        if unfinished:  # nothing points into it, and where files are locked it could not be renamed
            del self._map

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the tensors; the mapping goes when the last array that points into it does."""
        self.tensors = {}

    @property
    def metadata(self) -> dict[str, Value]:
        return {key: field.value for key, field in self.fields.items()}

    @property
    def n_elements(self) -> int:
        return sum(t.n_elements for t in self.tensors.values())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors.values())

    def _parse(self, cursor: Cursor) -> None:
        cursor.take(4, "the magic")
        self.version = cursor.number("I", "the version")
        if self.version not in (2, 3):
            swapped = self.version & 0xFFFF == 0
            raise AthenaError(
                f"{self.path} is "
                + ("a big-endian GGUF file" if swapped else f"a GGUF file of version {self.version}")
                + ", which cannot be read here; convert the model again with a current llama.cpp"
            )
        n_tensors, n_fields = cursor.number("Q", "the header"), cursor.number("Q", "the header")
        for _ in range(n_fields):  # a huge count ends at the end of the file
            key = cursor.string("a metadata key")
            if key in self.fields:
                raise cursor.fail(f"the metadata key {key} occurs twice")
            self.fields[key] = read_field(cursor, key)
        self._check_format_version()
        alignment = self.fields["general.alignment"].value if "general.alignment" in self.fields else DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise AthenaError(f"{self.path}: general.alignment is {alignment!r}, which is no power of two")
        self.alignment = alignment
        infos: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(n_tensors):
            name = cursor.string("a tensor name")
            if name in infos:
                raise cursor.fail(f"the tensor {name} occurs twice")
            infos[name] = self._info(cursor, name)
        start = cursor.at + -cursor.at % self.alignment
        for name, (shape, kind, offset) in infos.items():
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)
        places = sorted((offset, name) for name, (_, _, offset) in infos.items())
        for (offset, name), (following, other) in pairwise(places):
            if offset + self.tensors[name].n_bytes > following:
                raise AthenaError(f"{self.path}: tensors {name} and {other} overlap; the file is corrupt")

    def _check_format_version(self) -> None:
        field = self.fields.get("athena.format_version")
        if field is not None and (not isinstance(field.value, int) or field.value > FORMAT_VERSION):
            raise AthenaError(
                f"{self.path}: its A types have format version {field.value}, and only {FORMAT_VERSION} is known "
                "here; use a newer athena-gguf"
            )

    def _info(self, cursor: Cursor, name: str) -> tuple[tuple[int, ...], str, int]:
        what = f"the description of tensor {name}"
        n_dims = cursor.number("I", what)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(cursor.number("Q", what) for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise cursor.fail(f"tensor {name} has the shape {list(shape)}")
        number, offset = cursor.number("I", what), cursor.number("Q", what)
        kind = types.type_name(number)
        if kind is None:
            raise AthenaError(f"{self.path}: tensor {name} has the type {number}, which is unknown here")
        if offset % self.alignment:
            raise cursor.fail(f"tensor {name} is not aligned")
        return shape, kind, offset

    def _tensor(self, name: str, shape: tuple[int, ...], kind: str, offset: int) -> Tensor:
        try:
            width = types.row_bytes(kind, shape[-1])
        except ValueError as error:
            raise AthenaError(
                f"{self.path}: tensor {name} of shape {list(shape)}: {error}; the file is corrupt"
            ) from None
        if self.unfinished:
            return Tensor(name, shape, kind, np.broadcast_to(np.uint8(0), (*shape[:-1], width)))
        size = math.prod(shape[:-1]) * width
        if offset + size > self.n_bytes:
            raise AthenaError(
                f"{self.path} is truncated: tensor {name} needs bytes {offset} to {offset + size}, the file has "
                f"{self.n_bytes}; make or download it again"
            )
        data = np.frombuffer(self._map, np.uint8, size, offset)
        return Tensor(name, shape, kind, data.reshape(*shape[:-1], width))
