"""Time by stage, peak memory and file size of one conversion: `athena-gguf convert` runs as a child.

    python tools/bench_convert.py MODEL [OUT.gguf] --calibration FILE [--type A4] [any option of convert] [--json]

Without OUT.gguf the file goes to a temporary folder. Peak memory is the resident memory of the child and its children
together, looked at twice a second (Linux), or that of the largest of them as the kernel counted it, if that is more.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    chosen, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as folder:
        out = chosen.out or Path(folder, "out.gguf")
        code, result = measure(chosen.model, out, options)
    if code:
        return code
    if chosen.json:
        print(json.dumps(result))
        return 0
    for stage, seconds in result["stages"].items():
        print(f"{stage:>20} {seconds:8.1f} s")
    print(f"{'in all, by the clock':>20} {result['seconds']:8.1f} s")
    print(f"{'peak memory':>20} {result['peak_bytes'] / MIB:8.1f} MiB")
    print(f"{'file':>20} {result['file_bytes'] / MIB:8.1f} MiB")
    return 0


def measure(model: Path, out: Path, options: list[str]) -> tuple[int, dict]:
    """Exit code, and seconds by stage and in all, peak memory and file size in bytes."""
    command = [sys.executable, "-c", "from athena_gguf.cli import main; main()", "convert", str(model), str(out)]
    start = time.monotonic()
    child = subprocess.Popen(command + options, stderr=subprocess.PIPE, text=True)
    peak = [0]
    sampler = threading.Thread(target=_sample, args=(child.pid, peak), daemon=True)
    sampler.start()
    stages: dict[str, float] = {}
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        if line.startswith("time: "):
            stages = {name: float(s) for name, s in re.findall(r"([a-z][a-z -]*) ([\d.]+) s", line[6:])}
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if child.returncode:
        return 1, {}
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stages.pop("total", None)
    result = {"stages": stages, "seconds": seconds, "peak_bytes": max(peak[0], largest)}
    return 0, result | {"file_bytes": out.stat().st_size}


def _sample(pid: int, peak: list[int]) -> None:
    """Keep the largest sum of resident memory of a process and its descendants, until it has ended (Linux)."""
    while total := sum(_resident(p) for p in _family(pid)):
        peak[0] = max(peak[0], total)
        time.sleep(0.5)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(descendant for child in children for descendant in _family(int(child)))]


def _resident(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
