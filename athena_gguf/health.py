"""What `athena-gguf doctor` looks at: all that conversions, the runtime's build and its kernels depend on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from athena_gguf import __version__
from athena_gguf.runtime.places import binary, resolve

Status = Literal["ok", "note", "missing"]

_PACKAGES = ("gguf", "huggingface_hub", "numba", "numpy", "safetensors", "sentencepiece", "torch", "transformers")
_EXTRAS = {"accelerate": "gguf", "numba-cuda": "cuda", "ray": "ray", "matplotlib": "plots"}
# Instructions that the kernels of the A types use, best first, as /proc/cpuinfo has them, and what they serve.
_FEATURES = {
    "x86_64": {
        "amx_int8": "matrix products (AMX)",
        "avx512_vnni": "dot and matrix products (AVX-512)",
        "avx_vnni": "dot and matrix products (AVX-VNNI)",
        "avx2": "dot and matrix products (AVX2)",
    },
    "aarch64": {
        "i8mm": "matrix products (i8mm)",
        "asimddp": "dot and matrix products (dot product)",
        "asimd": "dot and matrix products (NEON)",
    },
}
_BUILD_BYTES, _MEMORY_BYTES = 2 << 30, 5 << 30  # that the runtime's build, and the demo model's conversion, take


@dataclass(frozen=True)
class Finding:
    """`status`: ok; note, for something that is not needed by everybody; or missing. `remedy`: what to do."""

    what: str
    status: Status
    detail: str
    remedy: str = ""


def examine(runtime: Path | None = None) -> list[Finding]:
    """Everything, in the order in which it is needed. `runtime`: its folder, as for `athena-gguf runtime build`."""
    folder = resolve(runtime)
    found = [Finding("athena-gguf", "ok", __version__), _python()]
    found += [_package(name) for name in _PACKAGES]
    found += [_extra(name, extra) for name, extra in _EXTRAS.items()]
    found += [_tool("CMake", ("cmake",), "cmake"), _tool("make", ("ninja", "make"), "ninja-build")]
    compilers = (os.environ.get("CXX") or "c++", "g++", "clang++")
    found += [_tool("C++ compiler", compilers, "g++"), _tool("patching", ("git", "patch"), "git")]
    return [*found, _cpu(), _gpu(), _memory(), _disk(folder), *_runtime(folder, runtime)]


def healthy(findings: Iterable[Finding]) -> bool:
    return all(finding.status != "missing" for finding in findings)


def lines(findings: list[Finding]) -> list[str]:
    """A line for each, with what to do under those that are not well."""
    width = max(len(f.what) for f in findings)
    marks = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}
    said = []
    for finding in findings:
        said.append(f"{marks[finding.status]} {finding.what:{width}}  {finding.detail}")
        if finding.remedy:
            said.append(f"{'':{8 + width}}  -> {finding.remedy}")
    said.append("all that is needed is here" if healthy(findings) else "something is missing: see above")
    return said


def _python() -> Finding:
    good = sys.version_info >= (3, 10)
    return Finding(
        "Python", "ok" if good else "missing", platform.python_version(), "" if good else "install 3.10 or newer"
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")


def _extra(name: str, extra: str) -> Finding:
    use = {"gguf": "GGUF files as input", "cuda": "conversion on a GPU", "ray": "batch --ray", "plots": "--report"}
    found = _package(name)
    if found.status == "ok":
        return found
    return Finding(name, "note", f"not installed; needed for {use[extra]}", f"pip install 'athena-gguf[{extra}]'")


def _tool(what: str, names: tuple[str, ...], package: str) -> Finding:
    path = next((found for name in names if (found := shutil.which(name.split()[0]))), None)
    if path is None:
        return Finding(
            what, "missing", f"no {' or '.join(names)}", f"install it (Debian, Ubuntu: apt install {package})"
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace").stdout
    return Finding(what, "ok", f"{path}: {(said.strip() or 'no version').splitlines()[0]}")


def cpu_flags(info: str) -> set[str]:
    """The features of a processor from the text of /proc/cpuinfo."""
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _cpu() -> Finding:
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    known = _FEATURES.get(machine)
    cores = f"{machine}, {os.cpu_count()} processors"
    try:
        flags = cpu_flags(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return Finding("CPU", "note", f"{cores}; its features cannot be read here")
    used = [f"{name}: {use}" for name, use in (known or {}).items() if name in flags]
    if not used:
        return Finding("CPU", "note", f"{cores}; the A types run in plain C here, slowly")
    return Finding("CPU", "ok", f"{cores}; {', '.join(used)}")


def _gpu() -> Finding:
    if find_spec("torch") is None:
        return Finding("GPU", "note", "torch is not installed, and so sees none")
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "note", f"torch {torch.__version__} sees none; conversions run on the CPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    detail = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
    if find_spec("numba_cuda") is None:
        return Finding("GPU", "note", f"{detail}, but no numba-cuda to encode on it", "pip install 'athena-gguf[cuda]'")
    return Finding("GPU", "ok", detail)


def _memory() -> Finding:
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return Finding("memory", "note", "cannot be read here")
    return _room("memory", free, _MEMORY_BYTES, "free", "close other programs; small models still fit")


def _disk(folder: Path) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return _room(
        "disk", free, _BUILD_BYTES, f"free in {there}", "make room, or set ATHENA_GGUF_RUNTIME to another disk"
    )


def _room(what: str, free: int, wanted: int, where: str, remedy: str) -> Finding:
    detail = f"{free / 2**30:.1f} GiB {where}"
    return Finding(what, "ok", detail) if free >= wanted else Finding(what, "note", detail, remedy)


def _runtime(folder: Path, given: Path | None) -> list[Finding]:
    from athena_gguf.errors import AthenaError
    from athena_gguf.runtime.make import build_state, has_web_page

    build = "athena-gguf runtime build" + (f" --dir {given}" if given else "")
    state = build_state(folder)
    if state == "absent":
        return [Finding("runtime", "missing", f"not built in {folder}", build)]
    if state == "old":
        return [Finding("runtime", "missing", f"{folder} was built from another patch, source or processor", build)]
    try:
        command = [str(binary("llama-bench", folder)), "--help"]
        done = subprocess.run(command, capture_output=True, timeout=60)
    except (AthenaError, OSError, subprocess.TimeoutExpired) as error:
        return [Finding("runtime", "missing", str(error), build)]
    if done.returncode:
        return [Finding("runtime", "missing", f"{command[0]} ends with exit code {done.returncode}", build)]
    found = Finding("runtime", "ok", f"{folder}, built from the patch of this version")
    if has_web_page(folder):
        return [found, Finding("web page", "ok", "llama-server has it")]
    return [found, Finding("web page", "note", "llama-server is built without", f"{build} --web-page")]
