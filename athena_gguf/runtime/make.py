"""Configure and build the tools with CMake; nothing is done again when nothing changed."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.lock import locked
from athena_gguf.runtime.places import binary_dir, resolve
from athena_gguf.runtime.tree import make_tree, tree_fingerprint

TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "ggml-rpc-server",
)
TESTS = ("test-quantize-fns", "test-backend-ops")
PAGE = "llama-ui-assets"  # the target that makes llama-server's web page, which is then built into llama-server

# No download while building (OpenSSL, which is needed only to fetch models, and the web page, unless it is asked for),
# no part that none of the tools uses, and a version that does not depend on a git repository around the build folder.
# RPC spreads a model over several machines; an unpatched server cannot take part.
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "GGML_RPC=ON",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_NUMBER=0",
    "LLAMA_BUILD_COMMIT=athena",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
)


def build(
    folder: Path | None = None,
    *,
    checkout: Path | None = None,
    source: Path | None = None,
    jobs: int | None = None,
    tests: bool = False,
    web_page: bool = False,
) -> Path:
    """Fetch, patch and build llama.cpp in `folder` (`default_dir()` if None); the folder of the binaries.

    `checkout`, `source`: as in `source_tree`. `jobs`: parallel compilers, all cores if None. `tests`: also llama.cpp's
    own tests of the tensor types. `web_page`: also the page of llama-server, through npm; once made it is kept and made
    again where its source changes. Raises AthenaError naming what is missing, or the compiler's first error.
    """
    folder = resolve(folder)
    with locked(folder, "--dir"):
        cmake = _require_tools(web_page and not has_web_page(folder))
        tree, fingerprint = make_tree(folder, checkout, source)
        stamp = folder / "build.json"
        targets = [*TOOLS, *(TESTS if tests else ()), *([PAGE] if web_page or has_web_page(folder) else [])]
        key = _key(fingerprint)
        done = _done(stamp, key)
        if set(targets) <= done and all(_exists(name, folder) for name in targets):
            return binary_dir(folder)
        stamp.unlink(missing_ok=True)
        _compile(cmake, folder, tree, targets, jobs, tests or any(name in done for name in TESTS))
        log = folder / "build.log"
        trouble = _page_trouble(folder, log) if PAGE in targets else None
        built = {*targets, *done} - ({PAGE} if trouble else set())
        stamp.write_text(json.dumps({"key": key, "targets": sorted(built)}))
        if trouble:
            said = (
                f"llama-server's web page could not be built: {trouble} (all of it: {log}); it needs Node.js 20.19 or "
                "newer and npm's registry. Everything else is built"
            )
            if web_page:
                raise AthenaError(said)
            progress.note(f"warning: {said}, with the page of before")
        return binary_dir(folder)


def has_web_page(folder: Path) -> bool:
    """Whether the llama-server in the runtime folder has its web page."""
    return (folder / "build" / "tools" / "ui" / "dist" / "index.html").is_file()


def build_state(folder: Path) -> Literal["current", "old", "absent"]:
    """Whether the tools in the runtime folder are built from its source, this package's patch, and for this machine."""
    if not (folder / "build.json").exists() or not all(_exists(name, folder) for name in TOOLS):
        return "absent"
    fingerprint = tree_fingerprint(folder)
    built = fingerprint is not None and set(TOOLS) <= _done(folder / "build.json", _key(fingerprint))
    return "current" if built else "old"


def _key(fingerprint: str) -> str:
    state = {"source": fingerprint, "options": OPTIONS, "machine": _machine()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _require_tools(npm: bool) -> str:
    cmake = shutil.which("cmake")
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    missing = [] if cmake else ["CMake (package cmake)"]
    if not compiler:
        missing.append("a C++17 compiler (package g++ or clang; on macOS: xcode-select --install)")
    if not (shutil.which("ninja") or shutil.which("make") or shutil.which("cl")):
        missing.append("Ninja or make (package ninja-build or make)")
    if npm and not shutil.which("npm"):
        missing.append("npm (with Node.js 20.19 or newer, for the web page)")
    if missing or not cmake:
        raise AthenaError("building llama.cpp needs " + ", ".join(missing) + "; install what is missing and try again")
    return cmake


def _compile(cmake: str, folder: Path, tree: Path, targets: list[str], jobs: int | None, tests: bool) -> None:
    where = folder / "build"
    configure = [cmake, "-S", str(tree), "-B", str(where), *(f"-D{option}" for option in OPTIONS)]
    configure.append(f"-DLLAMA_BUILD_TESTS={'ON' if tests else 'OFF'}")
    configure += ["-DLLAMA_BUILD_UI=ON"] if PAGE in targets else []
    if shutil.which("ninja") and not (where / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    environment = dict(os.environ)
    # lets ccache share objects between runtime folders
    environment.setdefault("CCACHE_BASEDIR", str(folder))
    environment.setdefault("CCACHE_NOHASHDIR", "1")
    log = folder / "build.log"
    make = [cmake, "--build", str(where), "--config", "Release", "--parallel", str(jobs or os.cpu_count() or 1)]
    with open(log, "w") as out:
        if subprocess.run(configure, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode:
            raise AthenaError(f"CMake could not configure llama.cpp: {_first_error(log)} (all of it: {log})")
    with progress.bar("Building llama.cpp", 1.0) as advance:
        if _run_build([*make, "--target", *targets], environment, log, advance):
            raise AthenaError(f"CMake could not build llama.cpp: {_first_error(log)} (all of it: {log})")
    # npm's packages, 700 MB; they are fetched again where the page's source changes
    shutil.rmtree(where / "tools" / "ui" / "ui-src", ignore_errors=True)


def _run_build(command: list[str], environment: dict[str, str], log: Path, advance: progress.Advance) -> int:
    """Append what the build says to `log` and advance by the share that it says is done; its exit code."""
    done = 0.0
    with (
        open(log, "ab") as out,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            match = re.match(rb"\[\s*(?:(\d+)/(\d+)|(\d+)%)\]", line)  # Ninja's and make's
            if match:
                share = int(match[1]) / int(match[2]) if match[1] else int(match[3]) / 100
                advance(max(0.0, share - done))
                done = max(done, share)
        return process.wait()


def _first_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    marks = ("error:", "CMake Error")
    for number, line in enumerate(lines):
        if any(mark in line for mark in marks):
            detail = " ".join(part.strip() for part in lines[number + 1 : number + 3]) if "CMake Error" in line else ""
            return f"{line.strip()} {detail}".strip()
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _page_trouble(folder: Path, log: Path) -> str | None:
    """Why the page is not there, or an older one: the step that failed, and npm's first error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    failed = [line.removeprefix("-- ") for line in lines if re.search(r"UI: npm .*(failed|not found|missing)", line)]
    errors = [line for line in lines if re.match(r"(--\s+stderr:\s*)?npm (error|ERR!)", line)]
    if failed or not has_web_page(folder):
        return "; ".join([*failed[:1], *errors[:1]]) or "npm made no page"
    return None


def _machine() -> str:
    """What a native build depends on: another CPU behind the same home directory needs its own."""
    flags = ""
    try:
        with open("/proc/cpuinfo") as info:
            flags = next((line for line in info if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return platform.machine() + hashlib.sha256(flags.encode()).hexdigest()


def _done(stamp: Path, key: str) -> set[str]:
    """The targets that the stamp says were built from exactly this."""
    try:
        state = json.loads(stamp.read_text())
        return set(state["targets"]) if state["key"] == key else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _exists(name: str, folder: Path) -> bool:
    if name == PAGE:
        return has_web_page(folder)
    return any((binary_dir(folder) / (name + end)).is_file() for end in ("", ".exe"))
