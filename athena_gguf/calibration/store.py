"""Curvature kept in a work directory, for further conversions of the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from athena_gguf import __version__, progress
from athena_gguf.calibration.curvature import Curvature, Lookup
from athena_gguf.errors import AthenaError

_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")
METHOD = 3  # raised when the same inputs give another curvature


@dataclass
class Calibration:
    """All that was measured, under the `fingerprint` of what it was measured from."""

    key: str
    curvatures: list[Curvature]
    lookup: Lookup


def fingerprint(model_dir: Path, files: Iterable[Path], *settings: object) -> str:
    """A digest of everything that a measured curvature depends on; files count by name, size and time of change."""
    return _digest(METHOD, model_fingerprint(model_dir), _stats(files), *settings)


def model_fingerprint(model_dir: Path) -> str:
    """A digest of a model's files, by name, size and time of change; what else lies in its folder does not count."""
    files = (p for p in sorted(model_dir.iterdir()) if p.suffix in _MODEL_FILES and p.is_file())
    return _digest(__version__, _stats(files))


def derived_fingerprint(key: str, files: Iterable[Path], *settings: object) -> str:
    """A digest of everything that something made from a calibration depends on."""
    return _digest(key, _stats(files), *settings)


def _stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def save(path: Path, measured: Calibration) -> None:
    """Keep what was measured; the file appears only when it is complete.

    It is not kept, and a warning says so, if the disk has no room: the conversion can go on without.
    """
    import torch

    from athena_gguf.gguf_file.atomic import require_space, temporary_beside

    curvatures = [vars(c) for c in measured.curvatures]
    content = {"key": measured.key, "curvatures": curvatures, "lookup": asdict(measured.lookup)}
    try:
        require_space(path.parent, sum(c.matrix.nbytes for c in measured.curvatures), "the measured curvature")
        with temporary_beside(path) as temporary:
            torch.save(content, temporary)
    except (AthenaError, RuntimeError) as error:  # torch raises RuntimeError for a failed write
        progress.note(f"warning: the curvature is not kept for further conversions: {error}")


def load(path: Path, key: str) -> Calibration | None:
    """What was saved under this fingerprint, or None."""
    import torch

    try:
        content = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged file raises: measure again
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    return Calibration(key, [Curvature(**c) for c in content["curvatures"]], Lookup(**content["lookup"]))
