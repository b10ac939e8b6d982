"""A small part of what tools/fuzz.py does, the same every time (docs/reliability.md has the large runs)."""

import subprocess
from pathlib import Path

import fuzz
import ggml_library


def test_reader() -> None:
    counts = fuzz.fuzz_reader(2000, seed=0)
    assert counts["read"] > 100 and counts["refused"] > 1000


def test_model_directories() -> None:
    counts = fuzz.fuzz_models(30, seed=0)
    assert counts["read"] > 1 and counts["refused"] > 10


def replay(program: Path, target: str, runs: int, folder: Path) -> None:
    inputs = folder / "inputs"
    fuzz.pack(inputs, target, runs, seed=0)
    result = subprocess.run([program, inputs], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == f"{runs + 1} inputs\n"


def test_rows(tmp_path: Path) -> None:
    program = tmp_path / "rows"
    flags = [*ggml_library.flags_of_build("native"), "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [ggml_library.C_TESTS / "gemm.c", fuzz.TARGETS / "rows.c", fuzz.TARGETS / "replay.c"]
    ggml_library.compile_c(program, flags, sources)
    replay(program, "rows", 2000, tmp_path)


def test_gguf(runtime: Path, tmp_path: Path) -> None:
    """The runtime's own libraries, without sanitizers."""
    program = tmp_path / "gguf"
    ggml_library.link_ggml(program, runtime, fuzz.TARGETS / "gguf.c", fuzz.TARGETS / "replay.c")
    replay(program, "gguf", 5000, tmp_path)
