"""One attempt at one job, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from athena_gguf.errors import INTERRUPTED
from athena_gguf.jobs.spec import Job
from athena_gguf.jobs.state import log_file
from athena_gguf.processes import command, how_it_ended


@dataclass(frozen=True)
class Attempt:
    """How it ended. `result`: what the conversion returned, None unless it succeeded; `message`: why it did not;
    `killed`: by a signal or with its machine, so that another attempt may succeed."""

    seconds: float
    result: dict[str, Any] | None = None
    message: str = ""
    killed: bool = False


@dataclass
class Process:
    """`cpus`: the processors that it may use, all of this process's if empty."""

    job: Job
    state: Path
    cpus: list[int] = field(default_factory=list)
    popen: subprocess.Popen[bytes] | None = None

    def run(self, started: Callable[[Process], None] = lambda process: None) -> Attempt:
        """Start the process, call `started` and wait for its end. The log file gets all that it says."""
        start = time.monotonic()
        log = log_file(self.state, self.job)
        with open(log, "ab") as said:
            begin = said.tell()
            # A session of its own: Ctrl-C reaches the batch only, which then ends its jobs.
            self.popen = subprocess.Popen(
                command("athena_gguf.jobs.child"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
            with self.popen as process:
                assert process.stdin is not None and process.stdout is not None
                try:
                    started(self)
                    process.stdin.write(json.dumps(asdict(self.job) | {"cpus": self.cpus}).encode() + b"\n")
                    process.stdin.flush()
                    answer = process.stdout.read()
                except BrokenPipeError:
                    answer = b""
                process.wait()  # before its input is closed, which would end it
        return self._attempt(answer, time.monotonic() - start, log, begin)

    def stop(self) -> None:
        """Ask the process to end; it removes its temporary files."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.terminate()

    def _attempt(self, answer: bytes, seconds: float, log: Path, begin: int) -> Attempt:
        assert self.popen is not None
        code = self.popen.returncode
        if code == 0:
            try:
                return Attempt(seconds, json.loads(answer))
            except ValueError:
                return Attempt(seconds, message=f"it ended without a result; see {log}")
        if code < 0:
            return Attempt(seconds, message=how_it_ended(code), killed=True)
        if code == INTERRUPTED:
            return Attempt(seconds, message="interrupted", killed=True)
        with open(log, "rb") as said:
            said.seek(begin)
            lines = said.read().decode(errors="replace").splitlines()
        return Attempt(seconds, message=_complaint(lines) or f"exit code {code}; see {log}")


def _complaint(lines: list[str]) -> str:
    """The text of the last error event, or the last line that is no event, such as that of a traceback."""
    plain = ""
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "error":
                return str(event["text"])
        except ValueError:
            plain = plain or line.strip()
    return plain
