"""Size against quality: a model converted to each of some targets, every file compared with the base file.

    python tools/bench_quality.py MODEL BASE.gguf WORK TARGET [TARGET ...] --text TEXT [--text TEXT ...]

A target is a type (A3), a preset (small), bits a weight (3.4bpw) or the size of a file (71MiB). Any other option goes
to convert. Prints a line of a Markdown table for each: size, types by share of weights, predicted KL divergence, and
for every text the measured one, perplexity ratio and share of tokens with the same most probable successor. WORK keeps
curvature, losses of the types and the base file's logits for further runs, and with --keep the files.
"""

import argparse
import contextlib
import io
import re
import sys
import time
from pathlib import Path

from athena_gguf.allocate import target_settings
from athena_gguf.cli import app
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.memory import keep_freed_memory
from athena_gguf.report.evaluate import evaluate

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument("--text", type=Path, action="append", required=True, help="to evaluate on; repeatable")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", action="store_true", help="keep the files in WORK")
    chosen, rest = parser.parse_known_args()
    keep_freed_memory()
    chosen.work.mkdir(parents=True, exist_ok=True)
    titles = ["target", "MiB", "bits a weight", "types", "predicted KLD"]
    for text in chosen.text:
        titles += [f"KLD, {text.stem}", "perplexity ratio", "same top token"]
    titles.append("conversion, s")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    for target in chosen.targets:
        print("| " + " | ".join(row(target, chosen, rest)) + " |", flush=True)
    return 0


def row(target: str, chosen: argparse.Namespace, rest: list[str]) -> list[str]:
    """Convert, evaluate and describe one file."""
    out = chosen.work / f"{target}.gguf"
    options = ["--base", str(chosen.base), "--work-dir", str(chosen.work), *target_options(target), *rest]
    # A conversion that chooses nothing predicts nothing.
    predicted = dry_run(chosen.model, out, options) if target in TYPES else None
    start = time.monotonic()
    convert(chosen.model, out, options)
    seconds = time.monotonic() - start
    with GGUFFile(out) as file:
        predicted = file.metadata.get("athena.predicted_kld", predicted)
        kinds: dict[str, int] = {}
        for tensor in file:
            if len(tensor.shape) > 1 and tensor.type_name != "F32":
                kinds[tensor.type_name] = kinds.get(tensor.type_name, 0) + tensor.n_elements
    whole = sum(kinds.values())
    mix = ", ".join(f"{kind} {n / whole:.0%}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
    cells = []
    for number, text in enumerate(chosen.text):
        logits = chosen.work / f"logits-{number}"
        found = evaluate(out, chosen.base, text, windows=chosen.windows, base_logits=logits, threads=chosen.threads)
        cells += [f"{found.kld:.4f} ± {found.kld_error:.4f}", f"{found.ppl_ratio:.4f}", f"{found.same_top:.3f}"]
    if not chosen.keep:
        out.unlink()
    size = [f"{found.bytes / MIB:.2f}", f"{found.bpw:.3f}"]
    return [target, *size, mix, f"{predicted:.4f}", *cells, f"{seconds:.0f}"]


def target_options(target: str) -> list[str]:
    ((name, value),) = target_settings(target).items()
    return [f"--{name}", str(value)]


def convert(model: Path, out: Path, options: list[str]) -> None:
    app(["convert", str(model), str(out), *options], standalone_mode=False)


def dry_run(model: Path, out: Path, options: list[str]) -> float:
    """The KL divergence that a conversion predicts."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        convert(model, out, [*options, "--dry-run"])
    return float(re.search(r"predicted KL divergence.*: (\S+) nats", said.getvalue())[1])


if __name__ == "__main__":
    sys.exit(main())
