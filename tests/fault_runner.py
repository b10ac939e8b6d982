"""Runs the command line in processes of its own that start at once, since everything large is imported here before.

Reads one JSON object a line, {"arguments": [...]} and what is to happen to the process: "after" so many seconds of
processor time (which other programs do not change much), or when it has said the text "at", the "signal"; "limit":
{"RLIMIT_...": bytes}, of which RLIMIT_AS counts from the address space that it starts with. Answers with {"status",
"seconds", "said"}, seconds of processor time; a negative status is a signal.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

import athena_gguf.calibration.stage
import athena_gguf.conversion
import athena_gguf.encode.stage
import athena_gguf.gguf_file
import athena_gguf.plan
import athena_gguf.summary  # noqa: F401
from athena_gguf import cli
from athena_gguf.encode import EncodeOptions
from athena_gguf.encode.matrix import encode_matrix
from athena_gguf.format import TYPES


def child(arguments: list[str], limits: dict[str, int], said: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in limits.items():
        if name == "RLIMIT_AS":
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv = ["athena-gguf", *arguments]
    status = 99
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(task: dict) -> dict:
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            child(task["arguments"], task.get("limit", {}), said.fileno())
        sent, status = "signal" not in task, None
        while status is None:
            done, found, usage = os.wait4(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(found)
            elif not sent and (
                processor_seconds(pid) > task["after"]
                if "after" in task
                else task["at"].encode() in os.pread(said.fileno(), 1 << 16, 0)
            ):
                os.kill(pid, task["signal"])
                sent = True
            else:
                time.sleep(0.005)
        text = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
        return {"status": status, "seconds": usage.ru_utime + usage.ru_stime, "said": text}


def processor_seconds(pid: int) -> float:
    """That a running child has used: fields 14 and 15 of proc(5)'s stat, the name in parentheses being the second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compile_kernels() -> None:
    """As children would, each of them again."""
    weight = torch.randn(32, 128)
    encode_matrix(weight, torch.eye(128), TYPES["A3"], EncodeOptions())


if __name__ == "__main__":
    torch.set_num_threads(1)  # no threads are running when children are made
    compile_kernels()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
