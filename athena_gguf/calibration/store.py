"""Curvature kept in a work directory, for further conversions of the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from athena_gguf import __version__
from athena_gguf.calibration.curvature import Curvature


def fingerprint(
    model_dir: Path, calibration: Sequence[str], tokens: int, seed: int, device: str, tensors: Iterable[str]
) -> str:
    """A digest of everything that a measured curvature depends on; files count by name, size and time of change."""
    files = [p for p in sorted(model_dir.iterdir()) if p.is_file()]
    files += [Path(name) for name in calibration if name != "self"]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    what = [__version__, stats, list(calibration), tokens, seed, device, sorted(tensors)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def save(path: Path, key: str, curvatures: Sequence[Curvature]) -> None:
    """Keep `curvatures` under a fingerprint; the file appears only when it is complete."""
    import torch

    from athena_gguf.gguf_file.atomic import temporary_beside

    content = {"key": key, "curvatures": [vars(c) for c in curvatures]}
    with temporary_beside(path) as temporary:
        torch.save(content, temporary)


def load(path: Path, key: str) -> list[Curvature] | None:
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
    return [Curvature(**c) for c in content["curvatures"]]
