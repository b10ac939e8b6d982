"""What happens to a conversion that is killed or interrupted, or that runs out of disk or memory (docs/reliability.md).

Nothing half-written is ever under the result's name, what was there before stays, the message says what to do, and the
next run goes on.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from athena_gguf.gguf_file import GGUFFile
from athena_gguf.gguf_file.atomic import temporary_beside

MOMENTS = 5


class Runner:
    """tests/fault_runner.py, and the arguments of a conversion of the small model."""

    def __init__(self, model: Path, base: Path, text: Path) -> None:
        script = Path(__file__).with_name("fault_runner.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.model, self.base, self.text = model, base, text

    def convert(self, out: Path, *more: object, base: bool = True, **task: object) -> dict:
        arguments = ["convert", self.model, out, "--calibration", self.text, "--calibration-tokens", 512]
        arguments += ["--device", "cpu", *(["--base", self.base] if base else []), *more]
        task["arguments"] = list(map(str, arguments))
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runner(tiny_model, tiny_base, text):
    found = Runner(tiny_model, tiny_base, text)
    yield found
    found.process.stdin.close()
    found.process.wait()


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """What an undisturbed conversion writes, and its seconds."""
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    first = runner.convert(out)
    assert first["status"] == 0, first["said"]
    return out.read_bytes(), runner.convert(out)["seconds"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kept", [False, True], ids=["no work directory", "work directory"])
def test_killed_at_any_moment(kept, runner, whole, tmp_path):
    expected, seconds = whole
    out, folder = tmp_path / "out" / "out.gguf", tmp_path / "out"
    folder.mkdir()
    more = ("--work-dir", tmp_path / "work") if kept else ()
    killed = 0
    for moment in range(MOMENTS):
        found = runner.convert(out, *more, after=seconds * (moment + 0.5) / MOMENTS, signal=signal.SIGKILL)
        killed += found["status"] == -signal.SIGKILL
        assert not out.exists() or out.read_bytes() == expected
        # of all the killed ones only the last left something: every run removes what it finds
        assert len([name for name in names(folder) if name != "out.gguf"]) <= 2
        out.unlink(missing_ok=True)
    assert killed >= MOMENTS // 2
    found = runner.convert(out, *more)
    assert found["status"] == 0, found["said"]
    assert out.read_bytes() == expected
    assert names(folder) == ["out.gguf"]
    assert not kept or not [path for path in (tmp_path / "work").rglob("*") if path.suffix in (".part", ".work")]


def test_killed_while_writing_keeps_the_older_file(tmp_path):
    """At a moment that the others may miss: half of the new file is there."""
    target = tmp_path / "out.gguf"
    target.write_bytes(b"older")
    code = (
        "import os, signal, sys; from pathlib import Path; from athena_gguf.gguf_file.atomic import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as out:\n"
        "    out.write(b'new'); out.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", code, target])
        assert result.returncode == -signal.SIGKILL
        assert target.read_bytes() == b"older"
        assert len(names(tmp_path)) == 2
    with temporary_beside(target) as held, temporary_beside(target) as other:  # those of living processes stay
        assert held.exists() and other.exists()
        held.write_bytes(b"one")
        other.write_bytes(b"two")
    assert target.read_bytes() == b"one" and names(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("at", ["curvature of the loss", "encoding"])
def test_interrupted_from_the_keyboard(at, runner, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")
    found = runner.convert(out, at=at, signal=signal.SIGINT)
    assert (found["status"], found["said"].splitlines()[-1]) == (130, "interrupted")
    assert out.read_bytes() == b"older" and names(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("base", [True, False], ids=["result", "base file"])
def test_files_that_cannot_grow(base, runner, tmp_path):
    """As on a disk that others fill meanwhile: there was room when it was asked for."""
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")
    found = runner.convert(out, base=base, limit={"RLIMIT_FSIZE": 60_000})
    assert found["status"] == 1
    assert "Traceback" not in found["said"], found["said"]
    assert ("out.gguf cannot be written: " if base else "cannot be converted: OSError") in found["said"], found["said"]
    assert out.read_bytes() == b"older" and names(tmp_path) == ["out.gguf"]


@contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(runner, tmp_path):
    with mounted(tmp_path / "disk", "size=400k") as disk:
        (disk / "out.gguf").write_bytes(b"older")
        found = runner.convert(disk / "out.gguf", base=False)
        assert found["status"] == 1
        assert "needs 0.5 MiB" in found["said"] and "make room or choose another place" in found["said"]
        found = runner.convert(disk / "out.gguf", "--embedding-type", "F32")
        assert found["status"] == 1 and "Traceback" not in found["said"]
        assert "MiB free" in found["said"], found["said"]
        assert (disk / "out.gguf").read_bytes() == b"older" and names(disk) == ["out.gguf"]


def test_read_only_folder(runner, tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        found = runner.convert(disk / "out.gguf")
        assert found["status"] == 1 and "out.gguf cannot be written" in found["said"]
        found = runner.convert(tmp_path / "out.gguf", "--work-dir", disk / "work")
        assert found["status"] == 1 and "--work-dir" in found["said"]
    assert names(tmp_path) == ["disk"]


def test_too_little_memory(runner, tmp_path):
    """Where a library dies of it (a negative status), there is no message, but nothing half-written either."""
    said = []
    for mib in (20, 30, 40, 60):
        found = runner.convert(tmp_path / "out.gguf", limit={"RLIMIT_AS": mib << 20})
        assert found["status"] == 1 or found["status"] < 0, found["said"]
        said += ["not enough memory" in found["said"]] * (found["status"] == 1)
    assert said and all(said)
    assert runner.convert(tmp_path / "out.gguf")["status"] == 0
    assert names(tmp_path) == ["out.gguf"]


def test_results_survive(whole, tmp_path):
    """The file that all of these are compared with can be read."""
    path = tmp_path / "out.gguf"
    path.write_bytes(whole[0])
    with GGUFFile(path) as file:
        assert {t.type_name for t in file} == {"A3", "F32", "Q8_0"}
