"""Measure A2, A3 and A4 against llama.cpp's types in the same build, on one core: dot products, and matrix products.

A matrix product is one matrix times one token through a ggml graph, as when text is generated, or times 512, as when a
prompt is read. llama.cpp's types then lie in the memory type that llama.cpp itself would choose for them (plain,
repacked, AMX), which is printed beside them.

The types run in alternation and the medians of many repeats count, so that other load on the machine does little harm.
Prints weights per second (10^9; for matrix products weights times tokens), and the ratios to llama.cpp's types.

    python tools/bench_kernels.py                     # the runtime's build
    python tools/bench_kernels.py --tree SRC --build DIR --core 1
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SHAPES = (
    (4096, 11008, 0),
    (576, 49152, 0),
    (4096, 11008, 1),
    (576, 49152, 1),
    (4096, 2048, 512),
    (576, 1536, 512),
)  # columns, rows, tokens; 0: dot products
DOT_RATIOS = (("a3", "iq3_xxs", 2.2), ("a3", "iq3_s", 2.7), ("a2", "iq2_xxs", 1.9), ("a4", "iq4_xs", 1.1))
PRODUCT_RATIOS = (
    *((ours, theirs, 1.0) for ours in ("a2", "a3", "a4") for theirs in ("q4_K", "q4_0")),
    ("a3", "iq3_s", 2.0),
    ("a2", "iq2_xxs", 2.0),
)

Times = dict[str, list[float]]


def compile_benchmark(tree: Path, build: Path, target: Path) -> None:
    libraries = build / "bin"
    command = ["cc", "-O2", "-std=gnu11", f"-I{tree / 'ggml' / 'include'}", str(Path(__file__).with_suffix(".c"))]
    command += ["-o", str(target), f"-L{libraries}", "-lggml-cpu", "-lggml-base", "-lm", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True)


def measure(program: Path, columns: int, rows: int, tokens: int, repeats: int) -> tuple[Times, dict[str, str]]:
    """Seconds of every repeat by type; memory types by type (of matrix products)."""
    command = [str(x) for x in (program, rows, columns, tokens, repeats)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    times: Times = defaultdict(list)
    for line in result.stdout.splitlines():
        name, _, seconds = line.split()
        times[name].append(float(seconds))
    memory = [line.split(": ") for line in result.stderr.splitlines() if line.count(": ") == 1]
    return times, {name: kind for name, kind in memory if name in times}


def report(times: Times, memory: dict[str, str], columns: int, rows: int, tokens: int) -> None:
    print(f"{rows} rows of {columns}, {f'{tokens} tokens' if tokens else 'dot products'}")
    for name, seconds in times.items():
        speed = rows * columns * max(tokens, 1) / statistics.median(seconds) / 1e9
        print(f"  {name:8} {speed:7.2f} Gweights/s  {memory.get(name, '')}".rstrip())
    for ours, theirs, wanted in PRODUCT_RATIOS if tokens > 1 else DOT_RATIOS:
        if theirs in times:
            ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))
            print(f"  {ours} / {theirs}: {ratio:.2f} (wanted: at least {wanted})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="patched llama.cpp source (default: the runtime's)")
    parser.add_argument("--build", type=Path, help="its build folder (default: the runtime's)")
    parser.add_argument("--core", type=int, default=0, help="the core to run on (default 0)")
    parser.add_argument("--repeats", type=int, default=15, help="repeats of every type (default 15)")
    args = parser.parse_args()
    if (args.tree is None) != (args.build is None):
        parser.error("--tree and --build go together")
    if args.tree is None:
        from athena_gguf.runtime import build, source_tree

        args.tree, args.build = source_tree(), build().parent
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "bench_kernels")
        compile_benchmark(args.tree, args.build.absolute(), program)
        for columns, rows, tokens in SHAPES:
            repeats = max(3, args.repeats // 3) if tokens > 1 else args.repeats
            report(*measure(program, columns, rows, tokens, repeats), columns, rows, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
