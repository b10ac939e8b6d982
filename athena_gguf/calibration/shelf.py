"""Tensors put away until they are needed again: on the device, in host memory, or in files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Shelf:
    """Holds tensors by key on `device` up to `device_bytes`, then in host memory up to `host_bytes`, then in files in
    `folder`, which nobody else writes to. What is taken makes room again. `disk` is called before anything is written
    to a file, and gives the bytes of host memory that have become free for this."""

    def __init__(
        self,
        device: torch.device,
        device_bytes: int,
        host_bytes: int,
        folder: Path,
        disk: Callable[[], int] = lambda: 0,
    ) -> None:
        self.device, self.folder, self.disk = device, folder, disk
        self.room = {"device": device_bytes, "host": host_bytes}
        self.held: dict[Hashable, tuple[str, torch.Tensor | Path]] = {}
        self.files = 0
        self.spilled = 0  # bytes written to files so far

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor, which is not to be changed any more. Raises AthenaError if the disk has no room."""
        from safetensors.torch import save_file

        from athena_gguf.gguf_file.atomic import require_space

        assert key not in self.held
        tensor = tensor.detach()
        place = self._place(tensor.nbytes)
        if place == "file":
            self.room["host"] += self.disk()
            place = self._place(tensor.nbytes)
        if place == "device":
            self.held[key] = place, tensor
        elif place == "host":
            self.held[key] = place, tensor.cpu()
        else:
            self.folder.mkdir(exist_ok=True)
            require_space(self.folder, tensor.nbytes, "what the calibration cannot hold in memory")
            path = self.folder / f"{self.files}.safetensors"
            self.files += 1
            self.spilled += tensor.nbytes
            save_file({"x": tensor.cpu().contiguous()}, path)
            self.held[key] = place, path
        if place != "file":
            self.room[place] -= tensor.nbytes

    def _place(self, size: int) -> str:
        return next((place for place in ("device", "host") if size <= self.room[place]), "file")

    def take(self, key: Hashable) -> torch.Tensor:
        """The tensor, on the device, and no longer here."""
        import torch
        from safetensors.torch import load_file

        place, what = self.held.pop(key)
        if isinstance(what, torch.Tensor):
            self.room[place] += what.nbytes
            return what.to(self.device)
        tensor = load_file(what)["x"].to(self.device, copy=True)
        what.unlink()
        return tensor

    def drop(self, key: Hashable) -> None:
        """The tensor is not needed any more."""
        place, what = self.held.pop(key)
        if isinstance(what, Path):
            what.unlink()
        else:
            self.room[place] += what.nbytes

    def look(self, key: Hashable) -> torch.Tensor:
        """The tensor, on the device; it stays here too."""
        import torch
        from safetensors.torch import load_file

        _, what = self.held[key]
        return what.to(self.device) if isinstance(what, torch.Tensor) else load_file(what)["x"].to(self.device)

    def close(self) -> None:
        """Forget everything; no files are left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.held = {}
