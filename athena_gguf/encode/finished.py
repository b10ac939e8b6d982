"""Finished tensors in a folder: a conversion that was cut off goes on from them, and none of them stays in memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from athena_gguf.encode.matrix import Encoded
from athena_gguf.format import TYPES
from athena_gguf.gguf_file.atomic import remove_all_abandoned, require_space, temporary_beside

METHOD = 5  # raised when the same inputs are encoded otherwise


class FinishedTensors(Mapping[str, Encoded]):
    """By tensor name. What `folder` holds is believed if it was put there under the same `key`, of everything that the
    encoding depends on but the tensor's type, and its checksum is right."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.paths: dict[str, Path] = {}
        self.losses: dict[str, float] = {}  # of A types, as shares of the power
        folder.mkdir(parents=True, exist_ok=True)
        remove_all_abandoned(folder)

    def find(self, name: str, kind: str) -> bool:
        """Whether the tensor was finished in this type before, by this process or another."""
        encoded = self._read(self._path(name, kind))
        if encoded is None:
            return False
        self.note(name, kind, encoded.loss, encoded.power)
        return True

    def put(self, name: str, kind: str, encoded: Encoded) -> None:
        """Raises AthenaError if it cannot be written."""
        from safetensors.numpy import save_file

        path = self._path(name, kind)
        about = {"key": self.key, "loss": encoded.loss, "power": encoded.power, "crc32": zlib.crc32(encoded.data.data)}
        require_space(self.folder, encoded.data.nbytes, f"the encoded tensor {name}")
        with temporary_beside(path, sync=False) as temporary:  # a checksum tells what a loss of power spoiled
            save_file({"data": encoded.data}, temporary, {"about": json.dumps(about)})
        self.note(name, kind, encoded.loss, encoded.power)

    def note(self, name: str, kind: str, loss: float, power: float) -> None:
        """It was put there, perhaps by another process."""
        self.paths[name] = self._path(name, kind)
        if kind in TYPES:
            self.losses[name] = loss / power if power else 0.0

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}.safetensors"

    def _read(self, path: Path) -> Encoded | None:
        from safetensors import safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                about, data = json.loads((file.metadata() or {})["about"]), file.get_tensor("data")
            if about["key"] != self.key or about["crc32"] != zlib.crc32(data.data):
                return None
            return Encoded(data, about["loss"], about["power"])
        except Exception:  # absent, or whatever a damaged file raises: encode it again
            return None

    def remove(self) -> None:
        """The files, once they are part of the result."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)
        remove_all_abandoned(self.folder)  # again: a killed process may have gone only just now

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        return self[name].data

    def __getitem__(self, name: str) -> Encoded:
        from athena_gguf.errors import AthenaError

        encoded = self._read(self.paths[name])
        if encoded is None:
            raise AthenaError(f"{self.paths[name]} was changed or removed during the conversion; start it again")
        return encoded

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
