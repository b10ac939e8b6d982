"""Curvatures measured once, one input after the other, and kept in a work directory for whoever wants them again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from athena_gguf import __version__, progress
from athena_gguf.calibration.curvature import Curvature, LayerInput, Lookup
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.atomic import remove_all_abandoned
from athena_gguf.model.trust import MODEL_FILES

METHOD = 8  # raised when the same inputs give another curvature

Measure = Callable[[Collection[str], Lookup, Callable[[], None]], Iterator[Curvature]]


class Calibration:
    """What is measured, under the `key` of what it is measured from, for the tensors called `names`. `inputs`: those
    seen by the last `stream`; `absent`: names that no layer feeds, and `lookup`, known when one is through."""

    def __init__(self, key: str, names: Collection[str], folder: Path, keep: bool, measure: Measure) -> None:
        """`folder` holds what was measured before, `keep` says whether curvatures are kept there and not just what
        else is known of an input. `measure(finished, lookup, pause)` measures the inputs whose tensors are not all
        `finished`, and calls `pause` before every stretch of work."""
        self.key, self.names, self.folder, self.keep, self.measure = key, set(names), folder, keep, measure
        self.inputs: list[LayerInput] = []
        self.absent: set[str] = set()
        self.lookup = Lookup()
        if _read(folder / "key.json") != {"key": key}:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # said here, as the base file may be at work around this
                raise AthenaError(f"{folder} cannot be made: {error}") from error
            _write(folder / "key.json", {"key": key})
        remove_all_abandoned(folder)

    @property
    def complete(self) -> bool:
        """Whether everything was measured before, by this process or another; what is kept of it may be damaged."""
        return (self.folder / "complete.json").exists()

    def stream(
        self, finished: Collection[str] = (), pause: Callable[[], None] = lambda: None, with_weights: bool = False
    ) -> Iterator[Curvature]:
        """Every curvature but those whose tensors are all `finished`: those that are kept, then the others as they are
        measured. `with_weights`: those that are kept without their tokens' weights are measured again."""
        self.inputs = []
        known = set(finished)
        for path, about in _known(self.folder):
            if known.issuperset(about.tensor_names):
                self.inputs.append(about)
            elif (found := _load(_matrix(path), about, with_weights)) is not None:
                self.inputs.append(about)
                known.update(about.tensor_names)
                yield found
                del found
            else:  # measured again from all that read the input, of which some may be finished
                known.difference_update(about.tensor_names)
        done = _read(self.folder / "complete.json") or {"absent": [], "lookup": None}
        self.absent, self.lookup = set(done["absent"]), Lookup(done["lookup"])
        if known >= self.names - self.absent and self.lookup.power is not None:
            return
        for curvature in self.measure(known, self.lookup, pause):
            self.inputs.append(curvature.about)
            known.update(curvature.about.tensor_names)
            self._save(curvature)
            yield curvature
        self.absent = self.names - known
        _write(self.folder / "complete.json", {"absent": sorted(self.absent), "lookup": self.lookup.power})

    def _path(self, first: str) -> Path:
        return self.folder / f"input.{first}.json"

    def _save(self, curvature: Curvature) -> None:
        from safetensors.torch import save_file

        from athena_gguf.gguf_file.atomic import require_space, temporary_beside

        path = self._path(curvature.about.tensor_names[0])
        if self.keep:
            try:
                tensors = {"matrix": curvature.matrix.cpu().contiguous()}
                if curvature.weights is not None:
                    tensors["weights"] = curvature.weights
                require_space(self.folder, sum(t.nbytes for t in tensors.values()), "the measured curvature")
                with temporary_beside(_matrix(path)) as temporary:
                    save_file(tensors, temporary)
            except (AthenaError, OSError) as error:
                self.keep = False
                progress.note(f"warning: the curvature is not kept for further conversions: {error}")
        _write(path, asdict(curvature.about))


def kept_curvatures(folder: Path) -> Iterator[Curvature]:
    """Those that a conversion left in the folder `curvature` of its work directory."""
    for path, about in _known(folder):
        if (found := _load(_matrix(path), about)) is not None:
            yield found


def _known(folder: Path) -> Iterator[tuple[Path, LayerInput]]:
    for path in sorted(folder.glob("input.*.json")):
        about = _about(_read(path))
        if about is not None:
            yield path, about


def _matrix(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _load(path: Path, about: LayerInput, with_weights: bool = False) -> Curvature | None:
    """What a file holds; None if there is none, it is damaged, or has not the weights that are asked for."""
    from safetensors.torch import load_file

    try:
        kept = load_file(path)
        found = Curvature(kept["matrix"], about, kept.get("weights"))
    except Exception:  # absent, or whatever a damaged file raises: measure again
        return None
    if tuple(found.matrix.shape[-2:]) != (about.columns, about.columns):
        return None
    single = found.matrix.ndim == 2  # experts' inputs have none
    return None if with_weights and single and found.weights is None else found


def _about(content: object) -> LayerInput | None:
    try:
        assert isinstance(content, dict)
        for name in ("tensor_names", "gradient_squares", "shares"):
            content[name] = tuple(content[name])
        return LayerInput(**content)
    except (AssertionError, KeyError, TypeError):
        return None


def _read(path: Path):  # type: ignore[no-untyped-def]
    """A JSON file's content, None if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, content: object) -> None:
    from athena_gguf.gguf_file.atomic import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())


def fingerprint(model_dir: Path, files: Iterable[Path], *settings: object) -> str:
    """A digest of everything that a measured curvature depends on; files count by name, size and time of change."""
    return _digest(METHOD, model_fingerprint(model_dir), _stats(files), *settings)


def model_fingerprint(model_dir: Path) -> str:
    """A digest of a model's files, by name, size and time of change; what else lies in its folder does not count."""
    files = (p for p in sorted(model_dir.iterdir()) if p.suffix in MODEL_FILES and p.is_file())
    return _digest(__version__, _stats(files))


def derived_fingerprint(key: str, files: Iterable[Path], *settings: object) -> str:
    """A digest of everything that something made from a calibration depends on."""
    return _digest(key, _stats(files), *settings)


def _stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
