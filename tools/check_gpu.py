"""Whether conversions on a GPU are what they are on the CPU, and go on after SIGKILL in any stage.

    python tools/check_gpu.py WORK [--device cuda] [--only experts kill] [--jobs 4]

Makes small models of random weights in WORK. `experts`: a Mixtral converted on the GPU and on the CPU, each tensor's
loss on both. `kill`: a Llama's conversion with a work directory, killed at each of the moments below, and the same
command again, which has to end with a file of the same tensors and losses as an undisturbed one. Ends with 1 if
something differs by more than what another order of sums can do. `--jobs` of them go on at once. `--device cpu` tries
the script.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny_model

from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile

CLOSE = 0.1  # of a tensor's squared error, relative
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 256, "intermediate_size": 448}
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
FRESH = "import sys; from athena_gguf.cli import main; main()"

Errors = dict[str, tuple[str, float]]
Moment = Callable[[Path, Path, str], bool]  # of the work directory, the result, and what was said
MOMENTS: dict[str, Moment] = {
    "base file begun": lambda work, out, said: any(work.glob(".base.gguf.*.part")),
    "base file half written": lambda work, out, said: any(p.stat().st_size > 50e6 for p in work.glob(".base.*.part")),
    "forward pass begun": lambda work, out, said: "curvature of the loss" in said,
    "base file complete": lambda work, out, said: (work / "base.gguf").exists(),
    "first curvature": lambda work, out, said: any((work / "curvature").glob("input.*.json")),
    "half of the curvatures": lambda work, out, said: len(list((work / "curvature").glob("input.*.json"))) > 16,
    "first tensor": lambda work, out, said: any((work / "encoded").glob("*.safetensors")),
    "half of the tensors": lambda work, out, said: len(list((work / "encoded").glob("*.safetensors"))) > 28,
    "writing": lambda work, out, said: any(out.parent.glob(f".{out.name}.*.part")),
}
TARGET = {"losses of types begun": lambda work, out, said: "losses of the types" in said}


def command(model: Path, out: Path, text: Path, device: str, *more: object) -> list[str]:
    options = ["--calibration", text, "--calibration-tokens", 16384, "--device", device, "--no-tune", *more]
    return [sys.executable, "-c", FRESH, "convert", *map(str, (model, out, *options))]


def convert(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stderr


def errors(path: Path, base: Path) -> Errors:
    """Type of every tensor, and its squared error over its squared weights."""
    found = {}
    with GGUFFile(path) as file, GGUFFile(base) as original:
        for tensor in file:
            weights = original.tensors[tensor.name].to_float32()
            error = float(((tensor.to_float32() - weights) ** 2).sum() / max(1e-30, (weights**2).sum()))
            found[tensor.name] = tensor.type_name, error
    return found


def same(found: Errors, expected: Errors) -> tuple[bool, float]:
    """Whether both files are as good, and the largest relative difference of a tensor's error."""
    if {n: kind for n, (kind, _) in found.items()} != {n: kind for n, (kind, _) in expected.items()}:
        return False, float("inf")
    coded = [name for name, (kind, _) in expected.items() if kind in TYPES]
    worst = max((abs(found[name][1] / expected[name][1] - 1) for name in coded), default=0.0)
    return worst <= CLOSE, worst


def experts(folder: Path, text: Path, device: str, jobs: int) -> bool:
    model = tiny_model.make(folder / "mixtral", "Mixtral", **EXPERTS)
    work = folder / "mixtral.work"
    convert(command(model, folder / "cpu.gguf", text, "cpu", "--work-dir", work))
    base = work / "base.gguf"
    good = True
    for more in ((), ("--gpu-memory", "4GiB") if device == "cuda" else ("--host-memory", "1KiB")):
        out = folder / "gpu.gguf"
        convert(command(model, out, text, device, "--base", base, *more))
        fine, worst = same(errors(out, base), errors(folder / "cpu.gguf", base))
        said = " ".join(more) or "no limit"
        print(f"experts, {device} ({said}): errors differ by up to {worst:.2%} from the CPU's: {_word(fine)}")
        good &= fine
    return good


def kill(folder: Path, text: Path, device: str, jobs: int) -> bool:
    model = tiny_model.make(folder / "llama", **LLAMA)
    good = []
    for more, moments in (((), MOMENTS), (("--bpw", 4.2), TARGET)):
        whole, base = folder / "whole.gguf", folder / "whole.work" / "base.gguf"
        start = time.perf_counter()
        convert(command(model, whole, text, device, "--work-dir", base.parent, *more))
        print(f"undisturbed{' '.join(map(str, ('', *more)))}: {time.perf_counter() - start:.1f} s", flush=True)

        def start_at(out: Path, more: tuple[object, ...] = more) -> list[str]:
            return command(model, out, text, device, "--work-dir", out.parent / "work", *more)

        again = partial(_again, folder, start_at, whole, base)
        with ThreadPoolExecutor(jobs) as threads:
            good += list(threads.map(again, moments, moments.values()))
    return all(good)


def _again(
    folder: Path, arguments: Callable[[Path], list[str]], whole: Path, base: Path, name: str, moment: Moment
) -> bool:
    """Whether a conversion that was killed at the moment, and started again, ends as the one that made `whole`."""
    own = folder / name.replace(" ", "-")
    work, out = own / "work", own / "out.gguf"
    work.mkdir(parents=True)
    killed = _killed(arguments(out), lambda said: moment(work, out, said), own / "said")
    start = time.perf_counter()
    said = convert(arguments(out))
    seconds = time.perf_counter() - start
    fine, worst = same(errors(out, base), errors(whole, base))
    equal = out.read_bytes() == whole.read_bytes()
    left = [path.name for path in own.rglob(".*") if path.name.endswith((".part", ".work"))]
    taken = [line for line in said.splitlines() if "taken from" in line]
    print(
        f"{name}: {'killed' if killed else 'NOT killed, it ended before'}; again in {seconds:.1f} s; "
        f"{'same bytes' if equal else f'errors within {worst:.2%}'}{f'; left {left}' if left else ''}: "
        f"{_word(fine and not left)} {taken}",
        flush=True,
    )
    shutil.rmtree(own)
    return fine and not left


def _killed(arguments: list[str], moment: Callable[[str], bool], log: Path) -> bool:
    """Whether the process was killed at the moment, rather than ended before it came."""
    with log.open("w") as stderr:
        process = subprocess.Popen(arguments, stderr=stderr, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if moment(log.read_text()):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait() == -signal.SIGKILL


def _word(good: bool) -> str:
    return "good" if good else "WRONG"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=("experts", "kill"), default=("experts", "kill"))
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    try:
        text = args.work / "text.txt"
        text.write_text(tiny_model.words(40_000))
        checks = {"experts": experts, "kill": kill}
        good = [checks[name](args.work, text, args.device, args.jobs) for name in args.only]
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
