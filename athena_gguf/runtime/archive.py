"""The pinned llama.cpp source: a PyPI source archive, fetched through pip, checked, unpacked without trust."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from athena_gguf import progress
from athena_gguf.errors import AthenaError

REQUIREMENT = "llama-cpp-python==0.3.36"
ARCHIVE_NAME = "llama_cpp_python-0.3.36.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TREE = PurePosixPath("llama_cpp_python-0.3.36/vendor/llama.cpp")  # the part of the archive that is used

# pip asks a source archive's build backend for metadata before it keeps the file. This one answers at once, so that
# fetching neither runs code of the archive nor downloads its build tools.
_BACKEND = """
import pathlib

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "llama_cpp_python-0.3.36.dist-info")
    folder.mkdir()
    text = "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 0.3.36\\n"
    (folder / "METADATA").write_text(text)
    (folder / "WHEEL").write_text("Wheel-Version: 1.0\\nTag: py3-none-any\\n")
    return folder.name

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("only the metadata is needed")
"""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path) -> None:
    """Raise AthenaError unless `path` is the pinned archive."""
    try:
        found = sha256_of(path)
    except OSError as error:
        raise AthenaError(f"{path}: {error.strerror}") from error
    if found != ARCHIVE_SHA256:
        raise AthenaError(f"{path} has SHA-256 {found}, not {ARCHIVE_SHA256}: it is not {ARCHIVE_NAME}; fetch it again")


def fetch(cache: Path) -> Path:
    """The verified archive in `cache`, downloaded through pip (and so from the user's own index) if it is not there."""
    kept = cache / ARCHIVE_NAME
    if kept.is_file() and sha256_of(kept) == ARCHIVE_SHA256:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with (
        progress.stage(f"Downloading {REQUIREMENT}"),
        tempfile.TemporaryDirectory(prefix="athena-fetch-", dir=cache) as scratch,
    ):
        backend = Path(scratch, "backend", "scikit_build_core")
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build.py").write_text(_BACKEND)
        downloaded = Path(scratch, "download")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--quiet"]
        command += ["--no-binary", "llama-cpp-python", "--dest", str(downloaded), REQUIREMENT]
        search = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
        result = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
        archive = downloaded / ARCHIVE_NAME
        if result.returncode or not archive.is_file():
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise AthenaError(
                f"pip could not download {REQUIREMENT} ({lines[-1] if lines else 'no message'}); "
                f"check the network and pip's index settings, or pass --archive {ARCHIVE_NAME}"
            )
        verify(archive)
        os.replace(archive, kept)
    return kept


def unpack(archive: Path, target: Path, tree: PurePosixPath = TREE) -> None:
    """Unpack the files below `tree` into the new folder `target`: regular files and directories only, no escapes."""
    target.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                relative = _inside(member.name, tree)
                if relative is None or member.isdir():
                    continue
                if ".." in relative.parts or not member.isfile():
                    raise AthenaError(f"{archive}: refusing the member {member.name!r} (a link or a path that escapes)")
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # a regular file
                with source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                if member.mode & 0o100:
                    path.chmod(0o755)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AthenaError(f"{archive} cannot be unpacked into {target}: {error}") from error
    if not any(target.iterdir()):
        raise AthenaError(f"{archive} has nothing below {tree}")


def _inside(name: str, tree: PurePosixPath) -> PurePosixPath | None:
    """The path of a member below `tree`; None if it lies elsewhere or is git's own."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.is_relative_to(tree) or path == tree:
        return None
    relative = path.relative_to(tree)
    return None if relative.parts[0] == ".git" else relative
