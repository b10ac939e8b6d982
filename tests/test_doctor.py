"""`doctor`: what is said about a machine that lacks something."""

import json

import pytest
from typer.testing import CliRunner

import athena_gguf
from athena_gguf import cli, health
from athena_gguf.runtime import make, tree


def doctor(*arguments):
    result = CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_all_is_here(runtime):
    code, said = doctor()
    assert code == 0 and said.splitlines()[-1] == "all that is needed is here" and "MISSING" not in said
    code, said = doctor("--json")
    found = {entry["what"]: entry for entry in json.loads(said)}
    assert (
        code == 0 and found["runtime"]["status"] == "ok" and found["athena-gguf"]["detail"] == athena_gguf.__version__
    )


def test_no_runtime(tmp_path):
    code, said = doctor("--dir", tmp_path)
    assert code == 1 and f"athena-gguf runtime build --dir {tmp_path}" in said
    assert said.splitlines()[-1] == "something is missing: see above"


def test_missing_tools_and_packages(runtime, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(health, "_PACKAGES", ("no-such-package",))
    found = {f.what: f for f in athena_gguf.doctor()}
    for what in ("CMake", "make", "C++ compiler", "patching", "no-such-package"):
        assert found[what].status == "missing" and "install" in found[what].remedy, what


def test_runtime_of_another_patch(runtime, monkeypatch):
    assert make.build_state(runtime.parent.parent) == "current"
    monkeypatch.setattr(tree, "_patch_hash", lambda: "another")
    assert make.build_state(runtime.parent.parent) == "old"
    (finding,) = health._runtime(runtime.parent.parent, None)
    assert finding.status == "missing" and finding.remedy == "athena-gguf runtime build"


@pytest.mark.parametrize(
    ("info", "flag"),
    [("processor\t: 0\nflags\t\t: fpu avx2 amx_int8\n", "amx_int8"), ("Features\t: fp asimd asimddp i8mm\n", "i8mm")],
)
def test_features_of_processors(info, flag):
    assert flag in health.cpu_flags(info)
