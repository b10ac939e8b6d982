"""Batches: the file of jobs, six jobs with a bad one and a killed worker, resuming, a Ray cluster."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model as tiny
from typer.testing import CliRunner

from athena_gguf import cli
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.errors import INTERRUPTED, UsageError
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.jobs import Job, read_batch, run_batch, state
from athena_gguf.jobs.batch import _run
from athena_gguf.jobs.process import Attempt
from athena_gguf.jobs.spec import STATE, Batch

finds_processes = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds processes in /proc")
FAMILIES = {"llama": ("Llama", {}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 32})}


@pytest.fixture
def folder(tmp_path, runtime, text):
    """Models of three architectures and a text."""
    for name, (family, config) in FAMILIES.items():
        tiny.make(tmp_path / name, family, num_hidden_layers=1, **config)
    (tmp_path / "text.txt").write_text(text.read_text())
    return tmp_path


def write(folder, models, head='out = "files"\nwork = "work"', more=""):
    path = folder / "jobs.toml"
    settings = f'[settings]\ncalibration = "text.txt"\ncalibration-tokens = 1024\ndevice = "cpu"\n{more}\n'
    entries = [f'[[model]]\nmodel = "{name}"\ntargets = {json.dumps(targets)}\n' for name, targets in models.items()]
    path.write_text("\n".join([head, settings, *entries]))
    return path


def log(folder, file):
    """The events of a job's log, in which Ray's own code may have written too."""
    lines = (folder / "files" / STATE / f"{file}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def count(events, event, text):
    return sum(e["event"] == event and text in (e.get("text") or e.get("stage")) for e in events)


@contextlib.contextmanager
def kill_when(victim):
    """Kills the first process that `victim` finds in the meantime; what it killed."""
    killed, over = [], threading.Event()

    def watch():
        while not killed and not over.wait(0.02):
            with contextlib.suppress(ProcessLookupError):
                if pid := victim():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_ours(pid):
    """Whether this process started it, or one that did."""
    while pid > 1 and pid != os.getpid():
        pid = parent(pid)
    return pid == os.getpid()


def job_process(folder, file):
    """The process of a job: the one whose stderr is the job's log."""
    log = str((folder / "files" / STATE / f"{file}.log").resolve())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"athena_gguf.jobs.child" in command and os.readlink(process / "fd" / "2") == log:
                return int(process.name)
        except OSError:
            continue
    return None


def said(folder, file, text):
    """Whether a job's log has the text."""
    path = folder / "files" / STATE / f"{file}.log"
    return path.exists() and text in path.read_text()


@finds_processes
def test_six_jobs_one_bad_one_killed_worker(folder, ray_cluster):
    """Five good files, one clear report, no work done twice; a second run makes the bad one only."""
    models = {"llama": ["A2", "A3"], "qwen2": ["A3", "A4"], "qwen3": ["A3"]}
    path = write(folder, models, more="spread = false")
    bad = '{ file = "bad.gguf", type = "A3", calibration = "absent.txt" }'
    path.write_text(path.read_text() + f'[[model]]\nmodel = "llama"\nname = "bad"\ntargets = [{bad}]\n')

    def worker():
        """The cluster's worker that runs the job: the parent of its process."""
        if said(folder, "qwen2-A3.gguf", "curvature of the loss") and (child := job_process(folder, "qwen2-A3.gguf")):
            with contextlib.suppress(OSError):
                return parent(child)

    with kill_when(worker) as killed:
        result = CliRunner().invoke(cli.app, ["batch", str(path), "--ray", ray_cluster, "--json"])
    assert result.exit_code == cli.FAILED_JOBS, result.output
    report = {Path(job["file"]).name: job for job in json.loads(result.stdout)["jobs"]}
    assert json.loads((folder / "files" / STATE / "report.json").read_text()) == json.loads(result.stdout)
    good = [f"{name}-{kind}.gguf" for name, kinds in models.items() for kind in kinds]
    assert {name: job["status"] for name, job in report.items()} == dict.fromkeys(good, "done") | {"bad.gguf": "failed"}
    assert "absent.txt: no such file" in report["bad.gguf"]["message"] and report["bad.gguf"]["attempts"] == 1
    assert len(killed) == 1 and report["qwen2-A3.gguf"]["attempts"] == 2
    for name in good:
        with GGUFFile(folder / "files" / name) as file:
            assert file.metadata["athena.type"] == name[-7:-5]
            assert report[name]["result"]["bytes"] == file.n_bytes
    assert sorted(p.name for p in (folder / "files").iterdir()) == sorted([STATE, *good])
    # The base file was made and the curvature measured once for each model; for the killed job's, after the kill too.
    for name, kinds in models.items():
        logs = [event for kind in kinds for event in log(folder, f"{name}-{kind}.gguf")]
        assert count(logs, "end", "base file") == 1, name
        assert count(logs, "end", "curvature") == 1, name
    before = {name: (folder / "files" / name).stat().st_mtime_ns for name in good}
    (folder / "absent.txt").write_text((folder / "text.txt").read_text())
    again = {Path(job.file).name: job.status for job in run_batch(path).jobs}
    assert again == dict.fromkeys(good, "kept") | {"bad.gguf": "done"}
    assert before == {name: (folder / "files" / name).stat().st_mtime_ns for name in good}


def test_what_counts_as_made(tmp_path):
    """A file with its fingerprint, not any file of that name."""
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "a.txt", "b.txt", "out.gguf"):
        (tmp_path / name).write_text("something")
    settings = {"type": "A3", "calibration": [str(tmp_path / "a.txt")]}
    job = Job("j", "g", str(tmp_path / "model"), str(tmp_path / "out.gguf"), str(tmp_path / "work"), settings)
    assert state.finished(tmp_path, job) is None
    state.remember(tmp_path, job, {"bytes": 9})
    assert state.finished(tmp_path, job) == {"bytes": 9}
    for change in ({"type": "A2"}, {"calibration": [str(tmp_path / "b.txt")]}, {"seed": 1}):
        assert state.finished(tmp_path, replace(job, settings=settings | change)) is None
    for name in ("model/config.json", "a.txt", "out.gguf"):
        (tmp_path / name).write_text("another thing")
        assert state.finished(tmp_path, job) is None
        state.remember(tmp_path, job, {})
    (tmp_path / "out.gguf").unlink()
    assert state.finished(tmp_path, job) is None
    assert state.finished(tmp_path, replace(job, model="org/name-that-is-not-here")) is None


@finds_processes
def test_jobs_end_with_the_batch(folder):
    """Even when it is killed."""
    path = write(folder, {"llama": ["A2"]})
    command = [sys.executable, "-c", "from athena_gguf.cli import main; main()", "batch", str(path), "--quiet"]
    batch = subprocess.Popen(command)
    while (child := job_process(folder, "llama-A2.gguf")) is None:
        assert batch.poll() is None
        time.sleep(0.05)
    batch.kill()
    batch.wait()
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        time.sleep(0.05)
    assert not (folder / "files" / "llama-A2.gguf").exists()


def test_what_a_running_job_is_at_is_said(tmp_path, monkeypatch, capsys):
    """The last event of its log, after what an earlier run wrote there."""
    job = Job("llama A3", "llama", "llama", str(tmp_path / "a.gguf"), str(tmp_path / "work"), {})
    batch = Batch(tmp_path, tmp_path, True, (job,))
    batch.state.mkdir()
    assert state.doing(batch.state, job) == "llama A3"
    progressed = {"event": "progress", "stage": "curvature", "done": 30, "total": 120, "seconds": 9.5, "left": 28.6}
    for event, said in (
        ({"event": "error", "text": "interrupted"}, ""),
        ({"event": "start", "stage": "curvature", "total": 120}, ": curvature"),
        (progressed, ": curvature, 25%, about 29 s left"),
        ({"event": "note", "text": "something else"}, ": curvature, 25%, about 29 s left"),
    ):
        with open(state.log_file(batch.state, job), "a") as log:
            log.write(json.dumps(event) + "\nno event\n")
        assert state.doing(batch.state, job) == "llama A3" + said

    class Slow(Machines):
        def spreads(self, models):
            return True

        def submit(self, job):
            future = Future()
            threading.Timer(0.3, future.set_result, [Attempt(1.0, message="bad")]).start()
            return future

    monkeypatch.setattr("athena_gguf.jobs.batch._LINE_SECONDS", 0.05)
    _run(batch, [job], Slow(), 1)
    assert "llama A3: curvature, 25%, about 29 s left\n" in capsys.readouterr().err


def test_an_interrupted_job_leaves_json_lines():
    """No traceback, wherever the signal finds it."""
    start = "import os, signal; from athena_gguf.jobs import child; "
    start += "child._first_line = lambda: os.kill(os.getpid(), signal.SIGTERM); child.main()"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == INTERRUPTED and done.stdout == ""
    assert [json.loads(line)["text"] for line in done.stderr.splitlines()] == ["interrupted"]


@finds_processes
def test_a_killed_job_is_started_once_more(folder):
    path = write(folder, {"llama": ["A3"]}, head='out = "files"')
    with kill_when(lambda: said(folder, "llama-A3.gguf", "start") and job_process(folder, "llama-A3.gguf")) as killed:
        report = run_batch(path)
    assert [(job.status, job.attempts) for job in report.jobs] == [("done", 2)] and len(killed) == 1, report.table()
    assert (folder / "files" / "llama-A3.gguf").exists()
    assert not (folder / "files" / STATE / "work").exists()  # nobody asked to keep it


@finds_processes
def test_machines_share_the_encoding_of_one_model(folder, ray_cluster):
    """There are more machines than models; a worker is killed at its task; the file is that of one machine."""
    path = write(folder, {"llama": ["A3"]})

    def worker():
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cmdline").read_bytes().startswith(b"ray::_encode") and is_ours(int(process.name)):
                    return int(process.name)

    with kill_when(worker) as killed:
        report = run_batch(path, ray=ray_cluster)
    assert [(job.status, job.attempts) for job in report.jobs] == [("done", 1)] and len(killed) == 1, report.table()
    assert count(log(folder, "llama-A3.gguf"), "note", "Ray: 2 machines") == 1
    alone = ConvertOptions(
        type="A3",
        calibration=str(folder / "text.txt"),
        calibration_tokens=1024,
        device="cpu",
        sequential=False,  # as machines share it
        base=folder / "work" / "llama" / "base.gguf",
    )
    convert(folder / "llama", folder / "alone.gguf", alone)
    assert (folder / "files" / "llama-A3.gguf").read_bytes() == (folder / "alone.gguf").read_bytes()


class Machines:
    """A pool of three machines whose jobs end when they are let; `most`: that were spread at once."""

    def __init__(self):
        self.spread, self.most, self.names, self.shared = [], 0, [], []

    def spreads(self, models):
        return models < self.machines()

    def machines(self):
        return 3

    def submit(self, job):
        future = Future()
        self.names.append(job.name)
        if not job.spread:
            future.set_result(Attempt(1.0, message="bad"))
            return future
        self.shared.append(job.name)
        self.spread.append(future)
        self.most = max(self.most, len(self.spread))
        threading.Timer(0.05, self.end, [future]).start()
        return future

    def end(self, future):
        self.spread.remove(future)
        future.set_result(Attempt(1.0, message="bad"))


def test_a_machine_has_one_job_that_is_spread(tmp_path):
    """Others pass those that wait; jobs are spread by themselves once models are fewer than machines."""
    jobs = [Job(f"{i}", f"model {i}", "", f"{i}.gguf", "", {}, spread=True) for i in range(7)]
    jobs.append(Job("other", "other", "", "other.gguf", "", {}))
    pool = Machines()
    reports = _run(Batch(tmp_path, tmp_path, True, tuple(jobs)), jobs, pool, len(jobs))
    assert pool.most == 3 and reports.keys() == {job.name for job in jobs}
    assert pool.names[:4] == ["0", "1", "2", "other"]
    pool = Machines()
    _run(Batch(tmp_path, tmp_path, True, tuple(jobs)), [replace(job, spread=None) for job in jobs[:4]], pool, 1)
    assert pool.shared == ["2", "3"]


GOOD = '[[model]]\nmodel = "llama"\ntargets = ["A3"]\n'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[[model]", "no TOML file"),
        ("", r"give each model an entry \[\[model\]\]"),
        ("outt = 1\n" + GOOD, "the file has outt, which means nothing; known are model, out"),
        ('[[model]]\ntargets = ["A3"]', "model of the model without model = must be a text"),
        ('[[model]]\nmodel = "llama"', "needs targets"),
        ('[[model]]\nmodel = "llama"\ntargets = ["A7"]', "target A7: give a type"),
        ('[[model]]\nmodel = "llama"\ntargets = ["71"]', "target 71: give a type"),
        (GOOD + 'device = "tpu"', "llama-A3.gguf of the model llama: --device tpu: choose from"),
        (GOOD + "bpw = 3.0", "llama-A3.gguf of the model llama: --type A3 .* --bpw chooses"),
        (GOOD + 'host-memory = "12"', r"--host-memory 12: 12 bytes\?"),
        ('[[model]]\nmodel = "llama"\ntargets = [3]', "3 is no target"),
        ('[[model]]\nmodel = "llama"\ntargets = [{ file = "../x" }]', "no file name"),
        (GOOD + "sede = 1", "has sede"),
        (GOOD + 'seed = "1"', "seed = '1' is of the wrong kind"),
        (GOOD + "calibration = [1]", "of the wrong kind"),
        (GOOD + "dry-run = true", "has dry_run"),
        (GOOD + 'ray = "auto"', "has ray"),
        (GOOD + "spread = 2", "spread = 2 is of the wrong kind"),
        (GOOD + GOOD, "two jobs have the name llama/llama-A3.gguf"),
        (GOOD + '[[model]]\nmodel = "qwen2"\nname = "llama"\ntargets = ["A2"]', "two models are called llama"),
    ],
)
def test_wrong_files_of_jobs(content, match, tmp_path):
    path = tmp_path / "jobs.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=match):
        read_batch(path)
    assert [p.name for p in tmp_path.iterdir()] == ["jobs.toml"]


def test_file_of_jobs(tmp_path):
    (tmp_path / "models" / "small").mkdir(parents=True)
    path = tmp_path / "jobs.toml"
    path.write_text(
        """
        out = "files"
        [settings]
        calibration = ["a.txt", "self"]
        seed = 3
        [[model]]
        model = "models/small"
        embedding-type = "A4"
        spread = true
        targets = ["a3", "3.4bpw", "71MiB", { file = "x.gguf", fit-memory = "8GiB", seed = 4 }]
        [[model]]
        model = "org/name@v2"
        name = "other"
        targets = ["tiny"]
        """
    )
    batch = read_batch(path)
    shared = {"calibration": [str(tmp_path / "a.txt"), "self"], "seed": 3}
    small = shared | {"embedding_type": "A4"}
    assert [job.settings for job in batch.jobs] == [
        small | {"type": "A3"},
        small | {"bpw": 3.4},
        small | {"size": "71MiB"},
        small | {"fit_memory": "8GiB", "seed": 4},
        shared | {"preset": "tiny"},
    ]
    assert [job.spread for job in batch.jobs] == [True, True, True, True, None]
    assert [Path(job.out).name for job in batch.jobs] == [
        "small-a3.gguf",
        "small-3.4bpw.gguf",
        "small-71MiB.gguf",
        "x.gguf",
        "other-tiny.gguf",
    ]
    assert {job.model for job in batch.jobs} == {str(tmp_path / "models" / "small"), "org/name@v2"}
    assert {Path(job.out).parent for job in batch.jobs} == {tmp_path / "files"} and not batch.keep_work
