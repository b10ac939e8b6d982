"""Count the instructions of a weight in dot products and matrix products on 64-bit ARM, in an emulator.

qemu-aarch64 names every instruction that tools/count_instructions.c executes; what lies between its marks is counted.
Dot products: instructions for a weight. Matrix products: for a weight and a token, all that a ggml graph of one product
does on one thread included (activations to bytes, weights decoded once). Counts say nothing of how many instructions a
processor executes at once.

    scripts/test-arm                                                   # builds the libraries and calls this
    python tools/count_instructions.py BUILD --architecture armv8.2-a+dotprod
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


def compile_program(build: Path, tree: Path, architecture: str, target: Path) -> None:
    command = ["aarch64-linux-gnu-gcc", "-O2", "-std=gnu11", f"-march={architecture}", "-c"]
    command += [f"-I{tree / 'ggml' / 'include'}", str(Path(__file__).with_suffix(".c")), "-o", f"{target}.o"]
    subprocess.run(command, check=True)
    libraries = [str(build / "ggml" / "src" / f"lib{name}.a") for name in ("ggml", "ggml-cpu", "ggml-base")]
    command = ["aarch64-linux-gnu-g++", "-static", f"{target}.o", *libraries, "-o", str(target)]
    subprocess.run(command, check=True)


def between_marks(log: Iterable[bytes]) -> list[int]:
    """The instructions between the first and the second mark, the third and the fourth, and so on."""
    counts, inside, count = [], False, 0
    for line in log:
        if not line.startswith(b"Trace"):
            continue
        count += 1
        if line.endswith(b" count_mark\n"):
            if inside:
                counts.append(count - 1)
            inside, count = not inside, 0
    return counts


def one_instruction_a_block() -> str:
    """What the installed emulator calls it."""
    said = subprocess.run(["qemu-aarch64", "--help"], capture_output=True, text=True).stdout
    return "-one-insn-per-tb" if "-one-insn-per-tb" in said else "-singlestep"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="folder where ggml was built for ARM, statically")
    parser.add_argument("--tree", type=Path, help="patched llama.cpp source (default: the runtime's)")
    parser.add_argument("--architecture", default="armv8.2-a+dotprod+i8mm", help="as GCC's -march")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    if args.tree is None:
        from athena_gguf.runtime import source_tree

        args.tree = source_tree()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "count_instructions")
        compile_program(args.build, args.tree, args.architecture, program)
        command = ["qemu-aarch64", one_instruction_a_block(), "-d", "exec,nochain", str(program)]
        command += [str(n) for n in (args.rows, args.columns, args.tokens)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            counts = between_marks(process.stderr)
            names = process.stdout.read().decode().split("\n")[:-1]
        if process.returncode or len(counts) != len(names):
            raise SystemExit(f"the program ended with status {process.returncode} after {len(counts)} measurements")
    weights = args.rows * args.columns
    print(f"{args.architecture}, {args.rows} rows of {args.columns}, {args.tokens} tokens: instructions a weight")
    print("type      dot product   matrix product, a token")
    measured = dict(zip(names, counts, strict=True))
    for name in dict.fromkeys(name.split()[0] for name in names):
        dot, product = measured[f"{name} dot"] / weights, measured[f"{name} product"] / weights / args.tokens
        print(f"{name:8} {dot:12.3f} {product:25.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
