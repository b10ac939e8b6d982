"""The share of a GPU that a process of its own works on (`athena_gguf.cards`): a proxy, and what it calls there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from athena_gguf.cards import Card
from athena_gguf.cards.child import Here
from athena_gguf.errors import AthenaError
from athena_gguf.model import LinearLayer

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.blockwise import LocalPart
    from athena_gguf.calibration.curvature import Sums
    from athena_gguf.model.blocks import BlockModel


def open_there(card: Card, model_dir: Path, dtype: torch.dtype, resident: int) -> bool:
    """As `athena_gguf.model.blocks.open_blocks`; whether the model can be run block by block."""
    return card.call(_open, model_dir, dtype, resident)


class RemotePart:
    """A `Part` in the process of a card on which the model was opened: its share `windows`, taken `batch` at a time.
    `room`, `host`: bytes of its shelf on the device and in host memory; beyond it writes to `folder`, once `disk` has
    returned, with the bytes of host memory that have become free (as `Shelf`'s). `with_weights`: as of `LocalPart`.
    Close it."""

    def __init__(
        self,
        card: Card,
        windows: torch.Tensor,
        batch: int,
        room: int,
        host: int,
        folder: Path,
        disk: Callable[[], int] = lambda: 0,
        with_weights: bool = False,
    ) -> None:
        self.card, self.folder = card, folder
        card.call(_start, windows.contiguous(), batch, room, host, folder, with_weights)
        Thread(target=self._allow_files, args=(disk,), daemon=True).start()

    def _allow_files(self, disk: Callable[[], int]) -> None:
        freed = None
        with suppress(CancelledError):
            freed = disk()
        with suppress(AthenaError):  # the process has ended, as the next step says
            self.card.call(_files, freed)

    def begin(self) -> None:
        self.card.call(_step, "begin")

    def forward(self, index: int) -> None:
        self.card.call(_step, "forward", index)

    def output(self, layers: Sequence[LinearLayer]) -> Sums:
        return self.card.call(_summed, "output", [layer.of(None) for layer in layers])

    def backward(self, index: int, layers: Sequence[LinearLayer]) -> Sums:
        return self.card.call(_summed, "backward", index, [layer.of(None) for layer in layers])

    def end(self) -> float:
        return self.card.call(_end)

    def close(self) -> None:
        with suppress(AthenaError):
            self.card.call(_close)
        shutil.rmtree(self.folder, ignore_errors=True)  # where the process has ended


@dataclass
class _Measuring:
    """What the process holds for these steps. `files` is set once it is decided whether they may be written: they may
    if `freed` is a number, of bytes of host memory that have become free and are not given to the shelf yet."""

    blocks: BlockModel
    part: LocalPart | None = None
    files: Event = field(default_factory=Event)
    freed: int | None = None

    def disk(self) -> int:
        self.files.wait()
        if self.freed is None:
            raise CancelledError
        freed, self.freed = self.freed, 0
        return freed


def _open(here: Here, model_dir: Path, dtype: torch.dtype, resident: int) -> bool:
    from athena_gguf.model.blocks import open_blocks

    blocks = open_blocks(model_dir, here.device, dtype, resident)
    if blocks is not None:
        here.held[_Measuring] = _Measuring(blocks)
    return blocks is not None


def _start(
    here: Here, windows: torch.Tensor, batch: int, room: int, host: int, folder: Path, with_weights: bool
) -> None:
    from athena_gguf.calibration.blockwise import LocalPart
    from athena_gguf.calibration.shelf import Shelf

    held: _Measuring = here.held[_Measuring]
    shelf = Shelf(here.device, room, host, folder, held.disk)
    held.part = LocalPart(held.blocks, shelf, windows, batch, with_weights=with_weights)


def _files(here: Here, freed: int | None) -> None:
    if (held := here.held.get(_Measuring)) is not None:
        held.freed = freed
        held.files.set()


def _step(here: Here, step: str, *args: Any) -> Any:
    import torch

    from athena_gguf.calibration.precision import measuring

    if here.device.type == "cuda":
        torch.cuda.ipc_collect()  # sums of the block before, which the first process has let go of
    with measuring(here.device):
        return getattr(here.held[_Measuring].part, step)(*args)


def _summed(here: Here, step: str, *args: Any) -> Sums:
    found: Sums = _step(here, step, *args).sums()
    return found


def _end(here: Here) -> float:
    """Without the precision of the other steps, which the encoding would take on."""
    part: LocalPart = here.held[_Measuring].part
    return part.end()


def _close(here: Here) -> None:
    held = here.held.pop(_Measuring, None)
    if held is not None and held.part is not None:
        held.part.shelf.close()
