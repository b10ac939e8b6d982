"""Peak memory of loaded models: A2, A3 and A4 against llama.cpp's types of the same shapes.

Makes the files as tools/bench_runtime.py does, lets llama-bench read a prompt and generate, and prints for every type
the file's size, the most memory that the process had at a time (resident, with the mapped file), and the difference:
what it needs beside the file. Types that llama.cpp repacks are copied while they are loaded.

    python tools/bench_memory.py
    python tools/bench_memory.py --shape 1b --layers 4 --types A4,Q4_0 --threads 8
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench_runtime import SHAPES, Ggml, fits, write_model

MIB = 1 << 20


def peak_memory(command: list[str]) -> int:
    """Bytes; of a process that must end well."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{said.read()[-2000:].decode(errors='replace')}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, help="folder of the binaries (default: the runtime's)")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--types", default="A2,A3,A4,IQ3_S,Q4_0,Q4_K,Q8_0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    if args.runtime is None:
        from athena_gguf.runtime import build

        args.runtime = build()
    shape = replace(SHAPES[args.shape], layers=args.layers, vocabulary=args.vocabulary)
    print(f"{args.shape}: {shape}, {args.threads} threads, a prompt of {args.prompt} tokens; MiB")
    print("type       file   mapped: peak, beside the file   read: peak, beside the file")
    ggml = Ggml(args.runtime)
    with tempfile.TemporaryDirectory() as folder:
        for kind in (kind for kind in args.types.split(",") if fits(shape, kind)):
            path = Path(folder, "model.gguf")
            write_model(path, shape, kind, ggml)
            size = path.stat().st_size
            peaks = []
            for mode in ("mmap", "none"):
                command = [args.runtime / "llama-bench", "-m", path, "-p", args.prompt, "-n", 4, "-r", 1]
                command += ["-t", args.threads, "--load-mode", mode]
                peaks.append(peak_memory([str(c) for c in command]))
            columns = "".join(f"{peak / MIB:15.1f} {(peak - size) / MIB:12.1f}" for peak in peaks)
            print(f"{kind:8} {size / MIB:6.1f} {columns}", flush=True)
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
