"""A-type files in llama-server's ways of running: caches, mapped files, slots, draft models, RPC."""

from pathlib import Path

import check_runs
import pytest
from ggml_library import run


@pytest.fixture(scope="module")
def results(runtime: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, str]]:
    files = {}
    for name in ("A2", "A4"):
        files[name] = tmp_path_factory.mktemp("runs") / f"{name}.gguf"
        run(runtime / "llama-quantize", "--pure", tiny_base, files[name], name, 1)
    return check_runs.check(runtime, files["A4"], files["A2"], tokens=24, threads=1, tie=0.25)


def test_every_way_of_running(results: dict[str, tuple[bool, str]]) -> None:
    """The same greedy tokens (but for ties), and as many as were asked for."""
    assert len(results) == 9
    assert [f"{name}: {text}" for name, (good, text) in results.items() if not good] == []


@pytest.mark.parametrize("name", ["file mapped", "file read, not mapped"])
def test_how_a_file_is_read_changes_nothing(results: dict[str, tuple[bool, str]], name: str) -> None:
    assert results[name][1] == "24, 24, 24, 24 of 24 tokens agree"
