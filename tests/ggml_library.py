"""Compiles our ggml sources without the rest of llama.cpp and calls them through ctypes."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import athena_gguf.runtime
from athena_gguf.format import AType, row_bytes

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "ggml_patch" / "src" / "ggml" / "src"
C_TESTS = Path(__file__).parent / "c"
FILES = [
    SOURCE / "ggml-athena.c",
    SOURCE / "ggml-athena-quantize.c",
    SOURCE / "ggml-cpu" / "athena.c",
    SOURCE / "ggml-cpu" / "athena-gemm.c",
]

ACTIVATION = np.dtype([("d", "<f4"), ("offset", "<i4"), ("qs", "i1", 64)])  # block_q8_a64


def tree() -> Path:
    """The patched llama.cpp source: $ATHENA_LLAMA_CPP, or the runtime's."""
    given = os.environ.get("ATHENA_LLAMA_CPP")
    return Path(given) if given else athena_gguf.runtime.source_tree()


def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        pytest.skip("no C compiler")
    return found


# Builds of our sources: compiler flags, and what /proc/cpuinfo must name for them to run.
BUILDS = {
    "plain": ([], set()),
    "avx2": (["-mavx2", "-mfma"], {"avx2", "fma"}),
    "avxvnni": (["-mavx2", "-mfma", "-mavxvnni"], {"avx2", "fma", "avx_vnni"}),
    "avx512": (
        ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"],
        {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni"},
    ),
    "native": (["-march=native"], set()),
}


def flags_of_build(name: str) -> list[str]:
    """The compiler flags of one of BUILDS; skips the test where this CPU cannot run it."""
    flags, wanted = BUILDS[name]
    try:
        has = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        has = set()
    if not wanted <= has:
        pytest.skip(f"the CPU has no {', '.join(sorted(wanted - has))}")
    return flags


def run(*command: object, status: int | None = 0) -> str:
    """What a command says on both streams; fails where its exit status is not `status` (None: any but 0)."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, errors="replace")
    said = result.stdout + result.stderr
    # a signal is a crash, whatever was expected
    assert result.returncode == status or (status is None and result.returncode > 0), said[-3000:]
    return said


def compile_c(target: Path, flags: list[str], extra: list[Path], with_compiler: str | None = None) -> None:
    includes = [f"-I{tree() / 'ggml' / 'include'}", f"-I{SOURCE}", f"-I{SOURCE / 'ggml-cpu'}"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    files = [str(f) for f in [*FILES, C_TESTS / "ggml_abort.c", *extra]]
    command = [with_compiler or compiler(), "-std=c11", "-O2", *warnings, *flags, *includes, *files]
    command += ["-o", str(target), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def link_ggml(target: Path, binaries: Path, *sources: Path) -> None:
    """Compile a program against the built libraries of llama.cpp."""
    command = [compiler(), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{tree() / 'ggml' / 'include'}"]
    libraries = [f"-L{binaries}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{binaries}"]
    command += [*map(str, sources), "-o", str(target), *libraries]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _pointer(array: npt.NDArray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class Library:
    """Our C functions on NumPy rows."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))

    def decode(self, kind: AType, row: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.float32]:
        """One row of bytes to [columns] floats."""
        out = np.full(columns, np.nan, np.float32)
        function = self._c[f"dequantize_row_{kind.name.lower()}"]
        function(_pointer(row), _pointer(out), ctypes.c_int64(columns))
        return out

    def dot(self, kind: AType, row: npt.NDArray[np.uint8], activations: npt.NDArray, suffix: str = "") -> float:
        """One row times activation blocks (dtype ACTIVATION); suffix "_generic" for the scalar version."""
        out = np.full(1, np.nan, np.float32)
        none, zero = ctypes.c_size_t(0), ctypes.c_int(1)
        function = self._c[f"ggml_vec_dot_{kind.name.lower()}_q8_a64{suffix}"]
        function(
            ctypes.c_int(activations.size * 64),
            _pointer(out),
            none,
            _pointer(row),
            none,
            _pointer(activations),
            none,
            zero,
        )
        return float(out[0])

    def dot_rows(
        self, kind: AType, rows: npt.NDArray[np.uint8], columns: int, activations: npt.NDArray
    ) -> npt.NDArray[np.float32]:
        """Rows of bytes, the first ones of every row of `rows`, times activation blocks."""
        out = np.full(len(rows), np.nan, np.float32)
        stride, count = ctypes.c_size_t(rows.strides[0]), ctypes.c_int64(len(rows))
        self._c["ggml_athena_dot_rows"](
            ctypes.c_int(kind.ggml_type), ctypes.c_int(columns), _pointer(rows), stride, count, _pointer(activations),
            _pointer(out),
        )  # fmt: skip
        return out

    def multiply(
        self,
        kind: AType,
        rows: npt.NDArray[np.uint8],
        columns: int,
        activations: npt.NDArray[np.float32],
        gathered: bool,
    ) -> npt.NDArray[np.float32] | None:
        """Bytes [rows, row bytes] times floats [tokens, columns]: [tokens, rows]; None where the build has no such."""
        tokens = len(activations)
        out = np.full((tokens, len(rows)), np.nan, np.float32)
        i64 = ctypes.c_int64
        function = self._c["multiply"]
        function.restype = ctypes.c_bool
        sizes = [i64(len(rows)), i64(columns)]
        done = function(
            ctypes.c_int(kind.ggml_type), _pointer(rows), *sizes, _pointer(activations), i64(tokens), _pointer(out),
            ctypes.c_bool(gathered),
        )  # fmt: skip
        return out if done else None

    def quantize_activations(self, x: npt.NDArray[np.float32], suffix: str = "") -> npt.NDArray:
        """[columns] floats to blocks of dtype ACTIVATION; suffix "_ref" for the scalar version."""
        out = np.zeros(x.size // 64, ACTIVATION)
        self._c[f"quantize_row_q8_a64{suffix}"](_pointer(x), _pointer(out), ctypes.c_int64(x.size))
        return out

    def quantize(
        self, kind: AType, x: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.uint8]:
        """[rows, columns] floats to [rows, row bytes]; importance [columns]."""
        rows, columns = x.shape
        out = np.zeros((rows, row_bytes(kind, columns)), np.uint8)
        function = self._c[f"quantize_{kind.name.lower()}"]
        function.restype = ctypes.c_size_t
        weights = None if importance is None else _pointer(importance)
        written = function(_pointer(x), _pointer(out), ctypes.c_int64(rows), ctypes.c_int64(columns), weights)
        assert written == out.size
        return out
