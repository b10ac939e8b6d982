"""The share of a GPU in going through the blocks in order, in a process of its own (`athena_gguf.cards`)."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf.calibration.prefix import Halves, LocalPart, open_twice
from athena_gguf.cards import Card
from athena_gguf.cards.child import Here
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch


class RemotePart:
    """A `Part` of `athena_gguf.calibration.prefix` in the process of a card: its share `windows`, `batch` at a time, of
    the model in `model_dir`. `room`, `host`: bytes of its shelf on the device and in host memory; beyond it writes to
    `folder`; `first`: as of `LocalPart`. Close it."""

    def __init__(
        self,
        card: Card,
        model_dir: Path,
        windows: torch.Tensor,
        batch: int,
        room: int,
        host: int,
        folder: Path,
        first: int,
    ) -> None:
        self.card, self.folder, self.windows = card, folder, len(windows)
        card.call(_open, model_dir, windows.contiguous(), batch, room, host, folder, first)

    def begin(self, embeddings: torch.Tensor | None) -> None:
        self.card.call(_step, "begin", embeddings)

    def enter(self, index: int) -> None:
        self.card.call(_step, "enter", index)

    def leave(self) -> None:
        with suppress(AthenaError):  # the process has ended, as what it left says
            self.card.call(_step, "leave")

    def go_on(self, index: int) -> None:
        self.card.call(_step, "go_on", index)

    def put(self, index: int, module: str, weight: torch.Tensor) -> None:
        self.card.call(_step, "put", index, module, weight)

    def moments(self, index: int, name: str, weights: torch.Tensor, place: str | None, last: bool) -> Halves:
        found: Halves = self.card.call(_step, "moments", index, name, weights, place, last)
        return found

    def close(self) -> None:
        with suppress(AthenaError):
            self.card.call(_close)
        shutil.rmtree(self.folder, ignore_errors=True)  # where the process has ended


def _open(
    here: Here, model_dir: Path, windows: torch.Tensor, batch: int, room: int, host: int, folder: Path, first: int
) -> None:
    from athena_gguf.calibration.shelf import Shelf

    shelf = Shelf(here.device, room, host, folder)
    here.held[LocalPart] = LocalPart(*open_twice(model_dir, here.device), windows, batch, shelf, first)


def _step(here: Here, step: str, *args: Any) -> Any:
    import torch

    if here.device.type == "cuda":
        torch.cuda.ipc_collect()  # sums of the layers before, which the first process has let go of
    return getattr(here.held[LocalPart], step)(*args)


def _close(here: Here) -> None:
    held = here.held.pop(LocalPart, None)
    if held is not None:
        held.shelf.close()
