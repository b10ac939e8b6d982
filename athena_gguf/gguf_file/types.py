"""Tensor types by name: the sizes of ggml's own (from gguf-py) and of A2, A3, A4, which gguf-py is taught here."""

import gguf

from athena_gguf.format import GROUP, TYPES

BlockSize = tuple[int, int]  # columns of a block, bytes of a block


def register() -> None:
    """Make A2, A3, A4 members of gguf-py's `GGMLQuantizationType`, with their sizes; again is harmless.

    `GGUFReader` and `GGUFWriter` of gguf-py then accept files with these types.
    """
    enum = gguf.GGMLQuantizationType
    for kind in TYPES.values():
        if kind.ggml_type in enum._value2member_map_:
            continue
        member = int.__new__(enum, kind.ggml_type)
        member._name_ = kind.name
        member._value_ = kind.ggml_type
        enum._value2member_map_[kind.ggml_type] = member
        enum._member_map_[kind.name] = member
        gguf.GGML_QUANT_SIZES[member] = (GROUP, kind.group_bytes)


def type_id(name: str) -> int:
    """The number of a tensor type in ggml and GGUF. Raises KeyError for an unknown name."""
    register()
    return int(gguf.GGMLQuantizationType._member_map_[name].value)


def type_name(number: int) -> str | None:
    """The name of a tensor type, None if the number is unknown."""
    register()
    member = gguf.GGMLQuantizationType._value2member_map_.get(number)
    return None if member is None else str(member.name)


def block_size(name: str) -> BlockSize:
    """Columns and bytes of a block of the type. Raises KeyError for an unknown name."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id(name))]


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of the type. Raises ValueError if `columns` is no multiple of the type's block."""
    block, size = block_size(name)
    if columns % block:
        raise ValueError(f"{name} needs a multiple of {block} columns, not {columns}")
    return columns // block * size
