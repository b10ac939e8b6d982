"""The GGUF header as bytes: key-value pairs and tensor infos, parsed with every bound checked, and packed.

Source: the GGUF specification in ggml's docs (little-endian, versions 2 and 3).
"""

import struct
from dataclasses import dataclass

from athena_gguf.errors import AthenaError

MAGIC = b"GGUF"
VERSION = 3
STRING, ARRAY, BOOL = 8, 9, 7
UINT32, INT32, FLOAT32, UINT64, INT64 = 4, 5, 6, 10, 11
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LIMITS = {UINT32: (0, 2**32), INT32: (-(2**31), 2**31), UINT64: (0, 2**64), INT64: (-(2**63), 2**63)}
_NESTING = 8  # arrays of arrays: none is known deeper than two

Value = bool | int | float | str | list["Value"]


@dataclass(frozen=True)
class Field:
    """A key-value pair: its Python value, and the bytes after the key exactly as the file has them."""

    value: Value
    packed: bytes


class Cursor:
    """Reads forward through a buffer and raises AthenaError instead of passing its end."""

    def __init__(self, buffer: memoryview, path: object) -> None:
        self.buffer, self.path, self.at = buffer, path, 0

    def fail(self, what: str) -> AthenaError:
        return AthenaError(f"{self.path}: {what} at byte {self.at}; the file is corrupt, make or download it again")

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.buffer) - self.at:
            raise AthenaError(
                f"{self.path} ends inside {what} ({size} bytes wanted at byte {self.at}, the file has "
                f"{len(self.buffer)}); it is truncated or corrupt, make or download it again"
            )
        self.at += size
        return self.buffer[self.at - size : self.at]

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0])

    def string(self, what: str) -> str:
        size = self.number("Q", what)
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Value:
        if kind == STRING:
            # tokens may be raw bytes; as Python they need to be no more than shown
            return str(self.take(self.number("Q", what), what), "utf-8", "replace")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            scalar: Value = struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]
            return scalar
        if kind != ARRAY:
            raise self.fail(f"{what} has the unknown value type {kind}")
        if depth == _NESTING:
            raise self.fail(f"{what} is nested too deeply")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(count * size, what)))
        # each element takes at least its length field, so a huge count cannot make a huge list
        if count * 8 > len(self.buffer) - self.at:
            raise self.fail(f"{what} claims {count} elements")
        if inner == STRING:
            return self._strings(count, what)
        return [self.value(inner, what, depth + 1) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[Value]:
        """As `value` for each, but fast: a vocabulary has hundreds of thousands."""
        strings: list[Value] = []
        buffer, at, end = self.buffer, self.at, len(self.buffer)
        length = struct.Struct("<Q")
        for _ in range(count):
            stop = at + 8 + length.unpack_from(buffer, at)[0] if at + 8 <= end else end + 1
            if stop > end:
                self.at = at
                self.take(end - at + 1, what)
            strings.append(str(buffer[at + 8 : stop], "utf-8", "replace"))
            at = stop
        self.at = at
        return strings


def read_field(cursor: Cursor, key: str) -> Field:
    start = cursor.at
    what = f"the value of {key}"
    value = cursor.value(cursor.number("I", what), what)
    return Field(value, bytes(cursor.buffer[start : cursor.at]))


def pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_value(value: Value) -> bytes:
    """Type and bytes of a value: bool, int (32 bits if they do), float (32 bits), str, or a list of one of them."""
    if isinstance(value, list):
        if not value or isinstance(value[0], list):
            raise ValueError("a metadata list must be flat and not empty")
        items = [_pack(item, value) for item in value]
        return struct.pack("<IIQ", ARRAY, items[0][0], len(items)) + b"".join(data for _, data in items)
    kind, data = _pack(value, [value])
    return struct.pack("<I", kind) + data


def _pack(value: Value, together: list[Value]) -> tuple[int, bytes]:
    """`together`: the values that must share a type."""
    if isinstance(value, str):
        return STRING, pack_string(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int) and all(isinstance(v, int) for v in together):
        numbers = [int(v) for v in together if isinstance(v, int)]
        for kind, (low, end) in _LIMITS.items():
            if low <= min(numbers) and max(numbers) < end:
                return kind, struct.pack("<" + _SCALARS[kind], value)
        raise ValueError(f"{value} does not fit 64 bits")
    if isinstance(value, (int, float)):
        return FLOAT32, struct.pack("<f", value)
    raise ValueError(f"GGUF metadata cannot hold a {type(value).__name__}")
