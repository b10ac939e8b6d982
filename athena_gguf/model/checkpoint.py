"""The weights of a model directory, read from its safetensors files one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model directory, without the copy of the same weights that Mistral ships."""
    return [path for path in sorted(model_dir.glob("*.safetensors")) if not path.name.startswith("consolidated")]


class Checkpoint:
    """Tensors by name. `files`: the file that holds each of them. Only headers are read until a tensor is asked for."""

    def __init__(self, model_dir: Path) -> None:
        """Raises AthenaError naming a file that is no safetensors file."""
        self.files: dict[str, Path] = {}
        for path in weight_files(model_dir):
            with _opened(path) as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def columns(self, name: str, which: list[int]) -> torch.Tensor:
        """Some columns of a matrix, [rows, how many]."""
        import torch

        with _opened(self.files[name]) as file:
            part = file.get_slice(name)
            return torch.cat([part[:, at : at + 1] for at in which], dim=1)

    def tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A copy of a tensor. Raises AthenaError naming file and tensor if it cannot be read."""
        path = self.files[name]
        with _opened(path) as file:
            try:
                return file.get_tensor(name).to(device, dtype, copy=True)
            except Exception as error:  # safetensors has its own kinds, and a file may be cut off
                raise AthenaError(f"{path}: tensor {name} cannot be read: {error}; download the file again") from error


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AthenaError(f"{path} is no safetensors file: {error}; download it again") from error
