"""A wheel has everything: all packages, and the patch."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_has_everything(tmp_path):
    source = tmp_path / "source"  # setuptools writes into its source folder
    source.mkdir()
    for name in ("athena_gguf", "ggml_patch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "athena_gguf").rglob("*.py")}
    wanted |= {f"athena_gguf/{p.relative_to(ROOT)}" for p in (ROOT / "ggml_patch" / "src").rglob("*") if p.is_file()}
    wanted |= {f"athena_gguf/ggml_patch/{p.name}" for p in (ROOT / "ggml_patch").glob("*.patch")}
    assert wanted <= names, sorted(wanted - names)
