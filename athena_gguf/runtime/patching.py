"""Put our sources and our patch into a llama.cpp tree."""

import os
import shutil
import subprocess
from pathlib import Path

from athena_gguf.errors import AthenaError


def apply(patch_folder: Path, tree: Path) -> None:
    """Copy `patch_folder/src` over `tree`, then apply the patches `patch_folder/*.patch`, each of them whole or not.

    Raises AthenaError naming file and line of every hunk that does not fit, or a source that would overwrite a file.
    """
    sources = patch_folder / "src"
    files = sorted(path for path in sources.rglob("*") if path.is_file()) if sources.is_dir() else []
    for path in files:
        target = tree / path.relative_to(sources)
        if target.exists():
            raise AthenaError(f"{target} already exists: this llama.cpp is patched already, or brings its own file")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for diff in diffs(patch_folder):
        _apply_diff(diff, tree)


def diffs(patch_folder: Path) -> list[Path]:
    """The patches, in the order in which they are applied."""
    return sorted(patch_folder.glob("*.patch"))


def _apply_diff(diff: Path, tree: Path) -> None:
    git, patch = shutil.which("git"), shutil.which("patch")
    if git:
        command = [git, "apply", "--whitespace=nowarn", str(diff)]
    elif patch:
        command = [patch, "--strip=1", "--batch", "--forward", "--reject-file=-", f"--input={diff}"]
    else:
        raise AthenaError("neither git nor patch is installed; install one of them to patch llama.cpp")
    # git must not take an enclosing repository for the one to patch
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    environment |= {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "LC_ALL": "C"}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode:
        said = [line.removeprefix("error: ") for line in (result.stderr + result.stdout).splitlines()]
        reasons = "; ".join(line for line in said if line.strip()) or "no message"
        raise AthenaError(f"{diff} does not apply to this llama.cpp: {reasons}; use the pinned source instead")
