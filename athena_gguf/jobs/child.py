"""The process of one job: started by `athena_gguf.jobs.process`.

Its first input line is the job as JSON; its output is the conversion's result as JSON, and what it says on stderr is
JSON lines. It ends when its input does, so that it never outlives the batch, however that ends.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict

from athena_gguf import progress
from athena_gguf.errors import INTERRUPTED, AthenaError

_GRACE = 30.0  # seconds to remove temporary files in


# The input is read without Python's buffer: a thread that waits in there would make the interpreter's end fail.
def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (part := os.read(0, 1 << 16)):
        line += part
    return line


def _end_with_input() -> None:
    while os.read(0, 1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    progress.set_form("json")
    try:
        code = _convert()
    except KeyboardInterrupt:
        progress.interrupted(INTERRUPTED)
        code = INTERRUPTED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to interrupt but the interpreter's end
    sys.exit(code)


def _convert() -> int:
    job = json.loads(_first_line())
    threading.Thread(target=_end_with_input, daemon=True).start()
    if job["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cpus"])
    result = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print
    try:
        from athena_gguf import api
        from athena_gguf.memory import keep_freed_memory

        keep_freed_memory()
        made = api.convert(job["model"], job["out"], work_dir=job["work_dir"], **job["settings"])
    except AthenaError as error:
        progress.error(" ".join(str(error).split()), error.exit_code)
        return error.exit_code
    with open(result, "w", encoding="utf-8") as out:
        json.dump(asdict(made), out)
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
