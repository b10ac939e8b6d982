"""Which row of a file's tensor each row of a module's weight is: llama.cpp's converter permutes those of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LINES = 64
PIECE = 1 << 24  # weights looked at in one go


def rows_in_file(file_rows: torch.Tensor, module_rows: torch.Tensor) -> torch.Tensor | None:
    """For every row of a module its place in the file, each place once; both in float32 [rows, columns]. None if the
    file has others. Either side may be rounded to another type of 16 bits."""
    import torch

    if file_rows.shape != module_rows.shape:
        return None
    if same_rows(file_rows, module_rows):
        return torch.arange(len(module_rows), device=module_rows.device)
    # The nearest, as seen from some directions.
    lines = torch.randn(_LINES, file_rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    file, module = (rows.double() @ lines.T.to(rows.device) for rows in (file_rows, module_rows))
    squares = file.square().sum(1)
    pieces = module.split(max(1, PIECE // len(file)))
    order = torch.cat([(2 * piece @ file.T - squares).argmax(1) for piece in pieces])
    if not same_rows(file_rows[order], module_rows):
        return None
    # Rows that are equal may have found the same place: the others take those that are left.
    numbers = torch.arange(len(order), device=order.device)
    first = torch.full_like(order, len(order)).scatter_reduce(0, order, numbers, "amin")
    left, lost = (first == len(order)).nonzero()[:, 0], (first[order] != numbers).nonzero()[:, 0]
    places: dict[bytes, list[int]] = {}
    for place, row in zip(left.tolist(), _bytes(file_rows[left]), strict=True):
        places.setdefault(row, []).append(place)
    taken = [of.pop() if (of := places.get(row)) else None for row in _bytes(file_rows[order[lost]])]
    if None in taken:
        return None
    order[lost] = torch.tensor(taken, dtype=order.dtype, device=order.device)
    return order


def _bytes(rows: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in (rows + 0.0).cpu().numpy()]  # -0 becomes 0


def same_rows(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """But for rounding to another type of 16 bits."""
    import torch

    step = max(1, PIECE // ours.shape[1])
    pieces = zip(ours.split(step), theirs.split(step), strict=True)
    return all(torch.allclose(a, b, rtol=2**-7, atol=2**-24) for a, b in pieces)
