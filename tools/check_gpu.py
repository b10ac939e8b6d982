"""Whether conversions on a GPU are what they are on the CPU, always the same, and go on after SIGKILL in any stage.

    python tools/check_gpu.py WORK [--device cuda] [--only kill experts target] [--jobs 6]

Makes small models of random weights in WORK, and prints a line for every conversion that is compared.

`kill`: a Llama's conversion with a work directory, a second one undisturbed, and one killed at each of the moments
below and started again with the same command: all have to end with the same bytes. Where they do not, it says how many
curvatures and tensors differ, and the largest relative difference of a tensor's squared error. `target`: likewise with
a size asked for, killed while the types' losses are measured; the kernels of all types are compiled for it, which takes
more than a minute where they are not kept yet. `experts`: a Mixtral converted on the GPU and on the CPU, each tensor's
loss on both; they differ by what another order of sums can do.

Ends with 1 if something differs. `--jobs` conversions go on at once. `--device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny_model

from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile

CLOSE = 0.1  # of a tensor's squared error, relative
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 256, "intermediate_size": 448}
LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL = {"hidden_size": 128, "intermediate_size": 384}  # of the Llama on the CPU
INPUTS, TENSORS = 4 * 8, 7 * 8  # of the Llama's blocks
FRESH = "import sys; from athena_gguf.cli import main; main()"

Errors = dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Moment:
    """`come`: whether it has, of the work directory, the result, and what was said. `based`: the base file was made
    before, to save time."""

    come: Callable[[Path, Path, str], bool]
    based: bool = True


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


MOMENTS = {
    "base file begun": Moment(lambda work, out, said: any(work.glob(".base.gguf.*.part")), False),
    "base file half written": Moment(
        lambda work, out, said: any(2 * size(p) > base_size(work) for p in work.glob(".base.*.part")), False
    ),
    "forward pass begun": Moment(lambda work, out, said: "curvature of the loss" in said, False),
    "base file complete": Moment(lambda work, out, said: (work / "base.gguf").exists(), False),
    "first curvature": Moment(lambda work, out, said: count(work / "curvature", "input.*.json") > 0),
    "half of the curvatures": Moment(lambda work, out, said: count(work / "curvature", "input.*.json") > INPUTS // 2),
    "first tensor": Moment(lambda work, out, said: count(work / "encoded", "*.safetensors") > 0),
    "half of the tensors": Moment(lambda work, out, said: count(work / "encoded", "*.safetensors") > TENSORS // 2),
    "writing": Moment(lambda work, out, said: any(out.parent.glob(f".{out.name}.*.part"))),
}
TARGET = {"losses of types begun": Moment(lambda work, out, said: "losses of the types" in said)}


def size(path: Path) -> int:
    """0 if it has gone meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def base_size(work: Path) -> int:
    """Of the undisturbed conversion's base file."""
    return size(work.parents[1] / "whole" / "work" / "base.gguf")


def command(model: Path, out: Path, text: Path, device: str, *more: object) -> list[str]:
    options = ["--calibration", text, "--calibration-tokens", 8192, "--device", device, "--no-tune", *more]
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


def same_errors(found: Errors, expected: Errors) -> tuple[bool, float]:
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
        fine, worst = same_errors(errors(out, base), errors(folder / "cpu.gguf", base))
        said = " ".join(more) or "no limit"
        print(f"experts, {device} ({said}): errors differ by up to {worst:.2%} from the CPU's: {_word(fine)}")
        good &= fine
    return good


@dataclass(frozen=True)
class Llama:
    """Conversions of the Llama, one of which, undisturbed, is in `folder` / "whole"."""

    folder: Path
    text: Path
    device: str
    more: tuple[object, ...] = ()

    def command(self, name: str) -> list[str]:
        own = self.folder / name.replace(" ", "-")
        own.mkdir(parents=True, exist_ok=True)
        options = ("--work-dir", own / "work", *self.more)
        return command(self.folder.parent / "llama", own / "out.gguf", self.text, self.device, *options)

    def compare(self, name: str, note: str = "") -> bool:
        """Convert, print a line of the table, and tell whether the result has the bytes of the undisturbed one."""
        own, whole = self.folder / name.replace(" ", "-"), self.folder / "whole"
        start = time.perf_counter()
        said = convert(self.command(name))
        seconds = time.perf_counter() - start
        equal = (own / "out.gguf").read_bytes() == (whole / "out.gguf").read_bytes()
        result = "same bytes" if equal else f"WRONG: {difference(own, whole)}"
        left = [path.name for path in own.rglob(".*") if path.name.endswith((".part", ".work"))]
        taken = re.search(r"(\d+) finished tensors", said)
        line(name, note, f"{seconds:.1f}", taken[1] if taken else "", result + (f"; left {left}" if left else ""))
        shutil.rmtree(own)
        return equal and not left

    def disturbed(self, name: str, moment: Moment) -> bool:
        """As `compare`, of a conversion that was killed at the moment before."""
        own = self.folder / name.replace(" ", "-")
        arguments = self.command(name)
        (own / "work").mkdir()
        if moment.based:
            for kept in ("base.gguf", "base.model"):
                shutil.copy(self.folder / "whole" / "work" / kept, own / "work")
        killed = _killed(arguments, lambda said: moment.come(own / "work", own / "out.gguf", said), own / "said")
        return self.compare(name, "killed" if killed else "MISSED") and killed


def difference(own: Path, whole: Path) -> str:
    """What is different: curvatures, tensors' bytes, and the tensors' errors."""
    curvatures = sorted(path.name for path in (whole / "work" / "curvature").glob("*.safetensors"))
    same = [name for name in curvatures if _data(own, name) == _data(whole, name)]
    with GGUFFile(own / "out.gguf") as file, GGUFFile(whole / "out.gguf") as expected:
        others = [t.name for t in expected if file.tensors[t.name].data.tobytes() != t.data.tobytes()]
        tensors = len(expected.tensors)
    base = whole / "work" / "base.gguf"
    _, worst = same_errors(errors(own / "out.gguf", base), errors(whole / "out.gguf", base))
    return (
        f"{len(curvatures) - len(same)} of {len(curvatures)} curvatures and {len(others)} of {tensors} tensors differ "
        f"({', '.join(others[:3])}), errors by up to {worst:.2%}"
    )


def _data(folder: Path, name: str) -> bytes:
    path = folder / "work" / "curvature" / name
    return path.read_bytes() if path.exists() else b""


def line(*cells: str) -> None:
    widths = (24, 7, 8, 6, 0)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


def kill(folder: Path, text: Path, device: str, jobs: int) -> bool:
    return interrupted(Llama(folder / "kill", text, device), MOMENTS, jobs)


def target(folder: Path, text: Path, device: str, jobs: int) -> bool:
    return interrupted(Llama(folder / "target", text, device, ("--bpw", 4.2)), TARGET, jobs)


def interrupted(llama: Llama, moments: dict[str, Moment], jobs: int) -> bool:
    model = llama.folder.parent / "llama"
    if not model.exists():
        tiny_model.make(model, **(LLAMA | SMALL if llama.device == "cpu" else LLAMA))
    start = time.perf_counter()
    convert(llama.command("whole"))  # alone, so that others find its kernels
    line("conversion", "", "seconds", "kept", "result")
    line("undisturbed", "", f"{time.perf_counter() - start:.1f}", "", "")
    with ThreadPoolExecutor(jobs) as threads:
        again = threads.submit(llama.compare, "undisturbed again")
        good = list(threads.map(llama.disturbed, moments, moments.values()))
        return again.result() and all(good)


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
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=("kill", "experts", "target"), default=("kill", "experts"))
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    try:
        text = args.work / "text.txt"
        text.write_text(tiny_model.words(40_000))
        checks = {"kill": kill, "experts": experts, "target": target}
        good = [checks[name](args.work, text, args.device, args.jobs) for name in args.only]
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
