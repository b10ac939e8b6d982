"""A source archive has everything, and so has the wheel that is built from it: all packages, and the patch."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel built from it alone."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "source"  # setuptools writes into its source folder
    source.mkdir()
    for name in ("athena_gguf", "ggml_patch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(archive)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


def test_nothing_is_missing_and_nothing_strange_in_it(archives):
    archive, wheel = archives
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "athena_gguf").rglob("*.py")}
    patch = [p for p in (ROOT / "ggml_patch" / "src").rglob("*") if p.is_file()]
    patch += (ROOT / "ggml_patch").glob("*.patch")
    wanted = ours | {str(p.relative_to(ROOT)) for p in patch} | {"pyproject.toml", "README.md", "LICENSE"}
    assert wanted <= inside, sorted(wanted - inside)
    wanted = ours | {f"athena_gguf/{p.relative_to(ROOT)}" for p in patch}
    assert wanted <= names, sorted(wanted - names)
    strange = {name for name in names - wanted if ".dist-info/" not in name and name != "athena_gguf/py.typed"}
    assert not strange


def test_extras(archives):
    _, wheel = archives
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
    assert {"cuda", "gguf", "plots", "ray"} <= set(metadata.get_all("Provides-Extra"))
    requirements = metadata.get_all("Requires-Dist")
    for package, extra in (("numba-cuda", "cuda"), ("accelerate", "gguf"), ("matplotlib", "plots"), ("ray", "ray")):
        assert any(r.startswith(package) and f'extra == "{extra}"' in r for r in requirements), package
