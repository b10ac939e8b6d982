"""The weights of a model directory, read from its safetensors files when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError
from athena_gguf.model.pieces import Piece

if TYPE_CHECKING:
    import torch


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model directory, without the copy of the same weights that Mistral ships."""
    return [path for path in sorted(model_dir.glob("*.safetensors")) if not path.name.startswith("consolidated")]


class Checkpoint:
    """Tensors by name. `files`, `shapes`: of each of them. Only headers are read until a tensor is asked for."""

    def __init__(self, model_dir: Path) -> None:
        """Raises AthenaError naming a file that is no safetensors file."""
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(model_dir):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self.files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def parameter(
        self, pieces: list[Piece], device: torch.device, dtype: torch.dtype | None, columns: list[int] | None = None
    ) -> torch.Tensor:
        """What the pieces make: a copy on the device, in `dtype` or as it is stored. `columns`: only those of it.
        Raises AthenaError naming file and tensor if one cannot be read."""
        import torch

        if pieces[0].expert is None:
            (tensor,) = (tensor for _, tensor in self._read(pieces, columns))
            return tensor.to(device, dtype, copy=True)
        out = None
        rows = max(piece.row + self.shapes[piece.name][0] for piece in pieces)
        experts = 1 + max(piece.expert or 0 for piece in pieces)
        for piece, tensor in self._read(pieces, columns):
            if out is None:
                out = torch.empty(experts, rows, tensor.shape[1], device=device, dtype=dtype or tensor.dtype)
            out[piece.expert, piece.row : piece.row + len(tensor)] = tensor
        assert out is not None
        return out

    def _read(self, pieces: Iterable[Piece], columns: list[int] | None) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The tensors of the pieces, file by file."""
        import torch

        by_file: dict[Path, list[Piece]] = {}
        for piece in pieces:
            by_file.setdefault(self.files[piece.name], []).append(piece)
        for path, those in by_file.items():
            with _opened(path) as file:
                for piece in those:
                    every = [slice(None)] * (len(self.shapes[piece.name]) - 1)
                    try:
                        if columns is None:
                            tensor = file.get_tensor(piece.name)
                        else:
                            part = file.get_slice(piece.name)
                            tensor = torch.cat([part[tuple([*every, slice(at, at + 1)])] for at in columns], dim=-1)
                    except Exception as error:  # safetensors has its own kinds, and a file may be cut off
                        raise AthenaError(
                            f"{path}: tensor {piece.name} cannot be read: {error}; download the file again"
                        ) from error
                    yield piece, tensor


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AthenaError(f"{path} is no safetensors file: {error}; download it again") from error
