"""Which row of a file's tensor each row of a module's weight is: llama.cpp's converter permutes those of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LINES = 64
_PIECE = 1 << 24  # weights looked at in one go


def rows_in_file(file_rows: torch.Tensor, module_rows: torch.Tensor) -> torch.Tensor | None:
    """For every row of a module its place in the file, each place once; both in float32 [rows, columns]. None if the
    file has others. Either side may be rounded to another type of 16 bits."""
    import torch

    if file_rows.shape != module_rows.shape:
        return None
    if same(file_rows, module_rows):
        return torch.arange(len(module_rows), device=module_rows.device)
    # The nearest, as seen from some directions.
    lines = torch.randn(_LINES, file_rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    file, module = (rows.double() @ lines.T.to(rows.device) for rows in (file_rows, module_rows))
    order = (2 * module @ file.T - file.square().sum(1)).argmax(1)
    if not same(file_rows[order], module_rows):
        return None
    # Rows that are equal may have found the same place: the others take those that are left.
    first = torch.full_like(order, len(order)).scatter_reduce(0, order, torch.arange(len(order)).to(order), "amin")
    left = (first == len(order)).nonzero()[:, 0].tolist()
    for row in (first[order] != torch.arange(len(order)).to(order)).nonzero()[:, 0].tolist():
        place = next((place for place in left if same(file_rows[place][None], module_rows[row][None])), None)
        if place is None:
            return None
        order[row] = place
        left.remove(place)
    return order


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """But for rounding to another type of 16 bits."""
    import torch

    step = max(1, _PIECE // ours.shape[1])
    pieces = zip(ours.split(step), theirs.split(step), strict=True)
    return all(torch.allclose(a, b, rtol=2**-7, atol=2**-24) for a, b in pieces)
