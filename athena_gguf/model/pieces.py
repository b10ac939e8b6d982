"""Which tensors of a checkpoint a model's parameters are made of.

Mostly a parameter is the tensor of its name. transformers (from version 5) renames some while it loads them, and makes
one parameter of the weights of a block's experts; its own table of such conversions is asked. Of the operations there,
stacking experts and joining their rows are known here: a piece then goes straight to its place, and no second copy of
the experts is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint. `expert`, `row`: where it begins in a parameter [experts, rows, columns]; `expert` is
    None where it is all of the parameter."""

    name: str
    expert: int | None = None
    row: int = 0


def parameter_pieces(model: Any, stored: Shapes) -> dict[str, list[Piece]] | None:
    """Of every parameter and buffer that the checkpoint has; None if one of them cannot be put together, or has another
    shape than the checkpoint's. `stored`: the checkpoint's tensors."""
    shapes = {name: tuple(x.shape) for name, x in chain(model.named_parameters(), model.named_buffers())}
    found: dict[str, list[Piece]] = {}
    parts: dict[str, dict[int, list[str]]] = {}
    for name, target, part in _renamed(model, sorted(stored, key=_by_number), shapes):
        if part is None:
            found[target] = [Piece(name)]
            if target in shapes and shapes[target] != stored[name]:
                return None
        elif part < 0:
            return None
        else:
            parts.setdefault(target, {}).setdefault(part, []).append(name)
    for target, of in parts.items():
        if target in shapes:
            pieces = _stacked(of, stored, shapes[target])
            if pieces is None:
                return None
            found[target] = pieces
    return {name: pieces for name, pieces in found.items() if name in shapes}


def _stacked(parts: Mapping[int, list[str]], stored: Shapes, shape: tuple[int, ...]) -> list[Piece] | None:
    """Experts' names in order, by the part of the rows that they hold; None if that does not make `shape`."""
    pieces, row = [], 0
    for part in sorted(parts):
        names = parts[part]
        rows = stored[names[0]][0]
        if len(shape) != 3 or len(names) != shape[0] or any(stored[name] != (rows, shape[2]) for name in names):
            return None
        pieces += [Piece(name, expert, row) for expert, name in enumerate(names)]
        row += rows
    return pieces if row == shape[1] else None


def _renamed(model: Any, names: Iterable[str], shapes: Shapes) -> Iterator[tuple[str, str, int | None]]:
    """Every name in the checkpoint, that of its parameter, and which part of a stack's rows it is: None of no stack, -1
    of something that is put together in another way."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before version 5 both names are the same
        yield from ((name, name, None) for name in names)
        return
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    places = {
        pattern: place if _stacks(converter) else -1
        for converter in converters
        for place, pattern in enumerate(converter.source_patterns)
    }
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(shapes))
        if target not in shapes and name in shapes:
            yield name, name, None
        else:
            yield name, target, None if pattern is None else places[pattern]


def _stacks(converter: Any) -> bool:
    """Whether it stacks experts [rows, columns] and, where there are several patterns, joins the stacks' rows."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    several = len(converter.source_patterns) > 1
    return operations == [("MergeModulelist", 0)] + [("Concatenate", 1)] * several


def _by_number(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
