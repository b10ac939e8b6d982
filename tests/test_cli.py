"""The console script as a user meets it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from athena_gguf import cli, progress
from athena_gguf.errors import AthenaError, UsageError
from athena_gguf.runtime import make


def athena(*arguments, **settings):
    code = "import sys; from athena_gguf.cli import main; sys.argv[0] = 'athena-gguf'; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | settings
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([c, "--help"] for c in ("convert", "base", "inspect", "eval", "compare", "batch", "run"))],
)
def test_help(arguments):
    result = athena(*arguments, NO_COLOR="1", COLUMNS="100")
    assert result.returncode == 0 and "Usage:" in result.stdout
    assert len(arguments) == 1 or f"athena-gguf {arguments[0]} " in result.stdout.partition("Examples:")[2]


def test_help_names_defaults_that_are_not_values(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    said = CliRunner().invoke(cli.app, ["convert", "--help"]).stdout
    for default in ("262144; on a CPU 49152; not in order 98304", "with a GPU only", "A3, without a target"):
        assert f"[default: {default}]" in said


@pytest.mark.parametrize("ignored", [True, False])
def test_hanging_up_ends_what_is_not_under_nohup(ignored):
    """The console script in a process of its own, which says how it takes the signal."""
    code = (
        "import signal, sys; from athena_gguf import cli\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "cli.app = lambda: signal.raise_signal(signal.SIGHUP)\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == ignored
    assert ("KeyboardInterrupt" in done.stderr) != ignored


def test_help_and_inspect_import_nothing_heavy(tiny_gguf):
    code = (
        "import sys; from athena_gguf import cli; from athena_gguf.report.inspection import inspect_file\n"
        f"inspect_file({str(tiny_gguf)!r})\n"
        "print([m for m in ('torch', 'transformers', 'numba', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    code = "import sys; from athena_gguf import cli; print('numpy' in sys.modules, 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_errors_are_one_line(tmp_path):
    result = athena("inspect", tmp_path / "absent.gguf")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "absent.gguf" in result.stderr


def test_no_runtime_is_said(tmp_path, tiny_gguf):
    empty = {"ATHENA_GGUF_RUNTIME": str(tmp_path / "none")}
    for arguments in (["runtime", "path"], ["run", tiny_gguf, "-p", "x"]):
        result = athena(*arguments, **empty)
        assert result.returncode == 1 and "athena-gguf runtime build" in result.stderr
    text = tmp_path / "text"
    text.write_text("some words")
    result = athena("eval", tiny_gguf, "--base", tiny_gguf, "--text", text, **empty)
    assert result.returncode == 1 and "athena-gguf runtime build" in result.stderr


def test_wrong_use_is_no_traceback():
    result = athena("run")
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "{here}", "{here}/out.gguf", "--size", "5"],
        ["convert", "{here}", "{here}/out.gguf", "--type", "A9"],
        ["convert", "{here}", "{here}/out.gguf", "--seed", "-1"],
        ["convert", "{here}", "{here}/out.gguf", "--bpw", "3", "--preset", "small"],
        ["batch", "{here}/jobs.toml"],
        ["batch", "{here}/jobs.toml", "--workers", "0"],
        ["run", "{here}/out.gguf", "-p", " "],
        ["run", "{here}/out.gguf", "-p", "x", "--raw", "--system", "y"],
        ["runtime", "build", "--dir", "{here}", "--llama-cpp", "{here}", "--archive", "{here}/archive"],
        ["eval", "{here}/out.gguf", "--base", "{here}/out.gguf", "--text", "{here}/text", "--windows", "0"],
    ],
    ids=" ".join,
)
def test_wrong_values_are_wrong_use(arguments, tmp_path):
    (tmp_path / "jobs.toml").write_text('[[model]]\nmodel = "m"\ntargets = ["A7"]\n')
    result = CliRunner().invoke(cli.app, [a.format(here=tmp_path) for a in arguments])
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("raised", "code"), [(AthenaError("no\n  room"), 1), (UsageError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(monkeypatch, tmp_path, raised, code):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("athena_gguf.runtime.build", fail)
    result = CliRunner().invoke(cli.app, ["runtime", "build"])
    assert result.exit_code == code
    if code == 1:
        assert result.stderr == "error: no room\n"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_ctrl_c_is_130(tmp_path):
    code = (
        "import os, signal; from athena_gguf import cli; from athena_gguf.report import inspection\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "inspection.print_inspection = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "import sys; sys.argv = ['athena-gguf', 'inspect', 'x']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130 and result.stderr == "interrupted\n"


def test_inspect_json(tiny_gguf):
    result = athena("inspect", tiny_gguf, "--json")
    found = json.loads(result.stdout)
    assert found["bytes"] == tiny_gguf.stat().st_size
    assert found["metadata"]["a.strings"] == {"count": 5, "first": ["one", "two", "", "drei"]}
    assert found["metadata"]["a.numbers"] == [1, -2, 3]
    linear = next(t for t in found["tensors"] if t["name"] == "linear.weight")
    assert linear == {"name": "linear.weight", "type": "BF16", "shape": [6, 128], "bytes": 1536, "bpw": 16.0}
    assert found["types"]["Q8_0"] == {"tensors": 1, "weights": 768, "bytes": 816, "bpw": 8.5}
    assert found["weights"] == 96 + 768 + 768 + 768
    assert found["tensor_bytes"] == 96 * 4 + 1536 + 816 + 1536
    assert found["bpw"] == pytest.approx(found["tensor_bytes"] * 8 / found["weights"])


def test_inspect_text(tiny_gguf):
    result = athena("inspect", tiny_gguf)
    assert result.returncode == 0
    assert "a.string = 'Größe'" in result.stdout and "5 items: 'one', 'two', '', 'drei', ..." in result.stdout
    assert "3 x 4 x 64" in result.stdout and "14.240 bits a weight" in result.stdout


def test_runtime_build_options_reach_it(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("athena_gguf.runtime.build", lambda folder, **rest: seen.update(folder=folder, **rest))
    arguments = ["runtime", "build", "--dir", str(tmp_path), "--llama-cpp", "src", "--jobs", "3", "--tests"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert seen["folder"] == tmp_path and str(seen["checkout"]) == "src"
    assert (seen["jobs"], seen["tests"], seen["source"]) == (3, True, None)
    assert "llama-server" in make.TOOLS


def test_a_fault_shows_its_traceback(monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("so it goes")

    monkeypatch.setattr("athena_gguf.runtime.build", fail)
    result = CliRunner().invoke(cli.app, ["runtime", "build"])
    assert (
        result.exit_code == cli.FAULT
        and "Traceback" in result.stderr
        and "ZeroDivisionError: so it goes" in result.stderr
    )


@pytest.fixture
def text_form():
    """Whatever a test sets, the next one starts from the usual form."""
    yield
    progress.set_form("text")


def work_along():
    progress.note("hello")
    progress.note("warning: mind the gap")
    with progress.stage("first"):
        pass
    with progress.bar("second", 4) as advance:
        for _ in range(4):
            advance(1)
    progress.error("too bad", 1)


def test_quiet_form(capsys, text_form):
    progress.set_form("quiet")
    work_along()
    assert capsys.readouterr().err.splitlines() == ["warning: mind the gap", "error: too bad"]


def test_json_form(capsys, monkeypatch, text_form):
    monkeypatch.setattr(progress, "_EVENT_SECONDS", 0.0)
    progress.set_form("json")
    work_along()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    times = [e.pop("time") for e in events]
    assert times == sorted(times)
    assert events[:4] == [
        {"event": "note", "text": "hello"},
        {"event": "warning", "text": "mind the gap"},
        {"event": "start", "stage": "first"},
        {"event": "end", "stage": "first", "seconds": events[3]["seconds"]},
    ]
    assert events[4] == {"event": "start", "stage": "second", "total": 4}
    assert [(e["event"], e["done"], e["total"]) for e in events[5:8]] == [("progress", n, 4) for n in (1, 2, 3)]
    assert events[8]["event"] == "end" and events[9] == {"event": "error", "text": "too bad", "code": 1}


def test_forms_on_the_command_line(tmp_path):
    quiet = athena("base", tmp_path / "absent", tmp_path / "out.gguf", "--quiet")
    assert quiet.returncode == 1 and quiet.stderr.startswith("error: ") and quiet.stderr.count("\n") == 1
    events = [json.loads(line) for line in athena("base", tmp_path / "absent", "x", "--log-json").stderr.splitlines()]
    assert [e["event"] for e in events] == ["start", "error"] and events[-1]["code"] == 1
    assert quiet.stderr == f"error: {events[-1]['text']}\n"


def test_completion(monkeypatch):
    """What a shell asks when the user presses the tab key."""
    for words, wanted in (("athena-gguf conv", "convert"), ("athena-gguf convert --pre", "--preset")):
        settings = {"_ATHENA_GGUF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert wanted in athena(**settings).stdout.split()


def test_plain_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with progress.stage("first"):
        pass
    with progress.bar("second", 4) as advance:
        for _ in range(4):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "first ..." and lines[1].startswith("first: ")
    assert [line.split(" after")[0] for line in lines[3:-1]] == ["second: 25%", "second: 50%", "second: 75%"]
    assert lines[-1].startswith("second: ") and lines[-1].endswith(" s")


def test_time_of_other_things_does_not_count(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    watch = progress.Stopwatch()
    with progress.bar("measuring", 4, watch) as advance:
        now[0] += 30
        advance(2)
        with watch.paused():
            now[0] += 500
        now[0] += 25
        advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "measuring: 50% after 30 s, about 30 s left",
        "measuring: 75% after 55 s, about 18 s left",
        "measuring: 55.0 s",
    ]


def test_runtime_path_says_that_the_runtime_is_outdated(tmp_path):
    from athena_gguf.runtime.make import TOOLS

    binaries = tmp_path / "build" / "bin"
    binaries.mkdir(parents=True)
    for name in TOOLS:
        (binaries / name).touch()
    (tmp_path / "build.json").write_text('{"key": "another", "targets": []}')
    result = athena("runtime", "path", "--dir", tmp_path)
    assert result.returncode == 0 and result.stdout.strip() == str(binaries)
    assert "athena-gguf runtime build" in result.stderr
