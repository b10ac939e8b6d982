"""The patched source tree: made beside its place, then synchronized, so that unchanged files are not rebuilt."""

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from athena_gguf.errors import AthenaError, UsageError
from athena_gguf.lock import locked
from athena_gguf.runtime import archive, patching
from athena_gguf.runtime.places import patch_dir, resolve

_STAMP = "source.json"


def source_tree(folder: Path | None = None, *, checkout: Path | None = None, source: Path | None = None) -> Path:
    """The patched llama.cpp tree in the runtime `folder` (`default_dir()` if None), made if it is missing or outdated.

    `checkout`: a llama.cpp checkout to take instead of the pinned archive; it is only read. `source`: the pinned
    archive, already downloaded. With neither, a tree that is there stays, whatever it was made from.
    Raises AthenaError if it cannot be fetched or patched, UsageError if both are given.
    """
    folder = resolve(folder)
    with locked(folder, "--dir"):
        if checkout is None and source is None and tree_fingerprint(folder) is not None:
            return folder / "llama.cpp"
        return make_tree(folder, checkout, source)[0]


def make_tree(folder: Path, checkout: Path | None, source: Path | None) -> tuple[Path, str]:
    """The tree and a fingerprint of what is in it; the caller holds the lock."""
    if checkout is not None and source is not None:
        raise UsageError("--llama-cpp and --archive exclude each other; give one of them")
    tree, stamp = folder / "llama.cpp", folder / _STAMP
    ours = patch_dir()
    files = None
    if checkout is not None:
        checkout = checkout.expanduser().absolute()
        files = checkout_files(checkout)
        origin = _hash_files(checkout, files)
    else:
        origin = archive.ARCHIVE_SHA256
    wanted = {"origin": origin, "patch": _patch_hash()}
    fingerprint = _fingerprint(wanted)
    if tree.is_dir() and _read(stamp) == wanted:
        return tree, fingerprint
    with tempfile.TemporaryDirectory(prefix=".source-", dir=folder) as scratch:
        fresh = Path(scratch, "llama.cpp")
        if checkout is not None and files is not None:
            _copy(checkout, files, fresh)
        else:
            if source is not None:
                archive.verify(source)
            archive.unpack(source or archive.fetch(folder), fresh)
        patching.apply(ours, fresh)
        stamp.unlink(missing_ok=True)
        _synchronize(fresh, tree)
    stamp.write_text(json.dumps(wanted))
    return tree, fingerprint


def tree_fingerprint(folder: Path) -> str | None:
    """That of the tree in the runtime folder, None if there is none with this package's patch."""
    there = _read(folder / _STAMP)
    current = isinstance(there, dict) and there.get("patch") == _patch_hash() and (folder / "llama.cpp").is_dir()
    return _fingerprint(there) if current else None


def _fingerprint(origin_and_patch: object) -> str:
    return hashlib.sha256(json.dumps(origin_and_patch, sort_keys=True).encode()).hexdigest()


def checkout_files(checkout: Path) -> list[Path]:
    """The files of a llama.cpp checkout: what git tracks, or everything but build folders where git says nothing."""
    if not (checkout / "convert_hf_to_gguf.py").is_file() or not (checkout / "ggml" / "CMakeLists.txt").is_file():
        raise AthenaError(f"{checkout} is no llama.cpp checkout (convert_hf_to_gguf.py or ggml/CMakeLists.txt missing)")
    if (checkout / ".git").exists() and shutil.which("git"):
        result = subprocess.run(["git", "ls-files", "-z", "--cached"], cwd=checkout, capture_output=True)
        if result.returncode == 0:
            tracked = [Path(os.fsdecode(name)) for name in result.stdout.split(b"\0") if name]
            return sorted(name for name in tracked if (checkout / name).is_file())
    files = []
    for here, folders, names in os.walk(checkout):
        folders[:] = [f for f in folders if f not in (".git", "__pycache__", "node_modules") and not _is_build(here, f)]
        files += [Path(here, name).relative_to(checkout) for name in names if Path(here, name).is_file()]
    return sorted(files)


def _is_build(here: str, name: str) -> bool:
    return Path(here, name, "CMakeCache.txt").exists()


def _copy(checkout: Path, files: Iterable[Path], target: Path) -> None:
    for name in files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, path)


def _synchronize(fresh: Path, tree: Path) -> None:
    """Make `tree` equal to `fresh`, keeping the time stamps of equal files."""
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for path in [path for path in tree.rglob("*") if path.is_file() or path.is_symlink()]:
        if path.relative_to(tree) not in wanted:
            path.unlink()
    for name in sorted(wanted):
        target = tree / name
        if target.is_file() and filecmp.cmp(fresh / name, target, shallow=False):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, target)
        os.utime(target)  # newer than every object built from the old one, whatever the archive's time stamps


def _patch_hash() -> str:
    ours = patch_dir()
    files = [*patching.diffs(ours), *sorted(p for p in (ours / "src").rglob("*") if p.is_file())]
    return _hash_files(ours, [p.relative_to(ours) for p in files])


def _hash_files(root: Path, names: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for name in names:
        data = (root / name).read_bytes()
        digest.update(f"{name.as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None
