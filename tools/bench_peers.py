"""Other programs' types, every linear layer at one type, compared with the base file as `athena-gguf eval` does it.

    python tools/bench_peers.py BASE.gguf WORK --text TEXT --calibration TEXT [--calibration TEXT]
        [--curvature DIR] [--ik BUILD/bin] [--files A3.gguf ...] [--types IQ3_S ...]
    python tools/bench_peers.py BASE.gguf WORK --text TEXT --types --files A3.gguf autoround-Q3_K.gguf

Token embeddings are Q8_0 throughout. llama.cpp's types are made by its llama-quantize (built by `athena-gguf runtime
build`) with an importance matrix of the calibration texts, which its llama-imatrix measures; with --curvature also with
the diagonal of the curvature that `athena-gguf convert --work-dir DIR` left in DIR, in place of the mean squares of the
inputs. --ik: the folder of ik_llama.cpp's llama-quantize and llama-perplexity, for its own types. --files: others to
compare, made by `athena-gguf convert --type` or by other programs, named in the table; `--types` without any compares
only these, and needs no calibration text. Made files are removed after they were measured; results stay in WORK, and
the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from athena_gguf.gguf_file import GGUFFile
from athena_gguf.report.evaluate import Evaluation, evaluate, parse_statistics
from athena_gguf.runtime import binary

MIB = 2**20
TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q4_0", "Q4_1")
IK_TYPES = ("IQ2_KT", "IQ2_KS", "IQ2_K", "IQ3_KT", "IQ3_K", "IQ4_KT", "IQ4_KS", "IQ4_K")
CHOICES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S"}  # llama-quantize's names for whole files


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL, capture_output=True)
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{said[-2000:]}")
    return said


def measured_importance(base: Path, texts: list[Path], tokens: int, work: Path) -> Path:
    """Mean squares of the inputs, by llama-imatrix, over the same number of tokens of every text."""
    name = hashlib.sha256(f"{base} {base.stat().st_mtime_ns} {texts} {tokens}".encode()).hexdigest()[:8]
    out = work / f"inputs-{name}.imatrix"
    if not out.exists():
        parts = []
        for number, text in enumerate(texts):
            parts.append(work / f"inputs-{name}.{number}.imatrix")
            chunks = tokens // len(texts) // 512
            command = [binary("llama-imatrix"), "-m", base, "-f", text, "-c", 512, "--chunks", chunks]
            print(f"importance by llama-imatrix, {chunks} windows of {text.name} ...", file=sys.stderr, flush=True)
            run(*command, "--output-format", "dat", "-o", parts[-1])
        sources = [option for part in parts for option in ("--in-file", part)]
        run(binary("llama-imatrix"), "-m", base, *sources, "--output-format", "dat", "-o", out)
    return out


def curvature_importance(folder: Path, work: Path) -> Path:
    """The diagonal of our curvature as an importance matrix."""
    from athena_gguf.calibration.store import kept_curvatures

    out = work / "curvature.imatrix"
    write_importance(
        out,
        (
            (name, curvature.matrix.diagonal().numpy())
            for curvature in kept_curvatures(folder / "curvature")
            for name in curvature.about.tensor_names
        ),
    )
    return out


def write_importance(path: Path, entries: Iterable[tuple[str, npt.NDArray[np.float32]]]) -> None:
    """llama.cpp's older format: for every tensor its name, a count of calls, and a number a column."""
    packed = []
    for name, values in entries:
        head = struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values))
        packed.append(head + values.astype("<f4").tobytes())
    if not packed:
        sys.exit(f"{path}: no curvature was kept; run convert with --work-dir")
    path.write_bytes(struct.pack("<i", len(packed)) + b"".join(packed))


def quantize(quantizer: Path, base: Path, out: Path, kind: str, importance: Path) -> None:
    options = ["--imatrix", importance, "--pure", "--token-embedding-type", "q8_0"]
    run(quantizer, *options, base, out, CHOICES.get(kind, kind))


def ik_compare(tools: Path, file: Path, logits: Path) -> Evaluation:
    said = run(tools / "llama-perplexity", "-m", file, "--kl-divergence", "--kl-divergence-base", logits, "-c", 512)
    found = parse_statistics(said)
    if found is None:
        sys.exit(f"ik_llama.cpp's llama-perplexity could not compare {file}:\n{said[-2000:]}")
    return Evaluation(bytes=file.stat().st_size, bpw=0.0, windows=0, seconds=0.0, **found)


def linear_bits(file: Path) -> tuple[float, set[str]]:
    """Bits a weight of the linear layers, and their types."""
    with GGUFFile(file) as opened:
        chosen = [t for t in opened if t.name.startswith("blk.") and len(t.shape) > 1]
        return 8 * sum(t.n_bytes for t in chosen) / sum(t.n_elements for t in chosen), {t.type_name for t in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to evaluate on")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=98304)
    parser.add_argument("--curvature", type=Path)
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--ik", type=Path)
    parser.add_argument("--ik-types", nargs="*", default=list(IK_TYPES))
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    made = bool(args.types or args.ik)
    if made and not args.calibration:
        parser.error("--calibration is needed to make files of other types")
    args.work.mkdir(parents=True, exist_ok=True)
    logits = args.work / "logits"
    importances = {}
    if made:
        importances["inputs"] = measured_importance(args.base, args.calibration, args.calibration_tokens, args.work)
    if made and args.curvature:
        importances["curvature"] = curvature_importance(args.curvature, args.work)
    print("| type | weighted by | bits a weight, linear layers | MiB | KLD | perplexity ratio | same top token |")
    print("|---|---|---|---|---|---|---|", flush=True)

    def compare(file: Path) -> Evaluation:
        return evaluate(file, args.base, args.text, windows=args.windows, base_logits=logits)

    def line(label: str, weights: str, bits: float, found: Evaluation) -> None:
        numbers = f"{found.bytes / MIB:.1f} | {found.kld:.4f} ± {found.kld_error:.4f} | {found.ppl_ratio:.4f}"
        print(f"| {label} | {weights} | {bits:.3f} | {numbers} | {found.same_top:.3f} |", flush=True)

    inputs = [args.windows, args.calibration_tokens, str(args.curvature)]
    inputs += [(str(path), path.stat().st_mtime_ns) for path in (args.base, args.text, *args.calibration)]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]

    def peer(label: str, quantizer: Path, kind: str, weights: str, tools: Path | None) -> None:
        done = args.work / f"{label}-{weights}-{key}.json".replace(" ", "-")
        if not done.exists():
            file = done.with_suffix(".gguf")
            print(f"{label}, weighted by {weights} ...", file=sys.stderr, flush=True)
            quantize(quantizer, args.base, file, kind, importances[weights])
            bits = ik_bits(file, args.base) if tools else linear_bits(file)[0]
            found = ik_compare(tools, file, logits) if tools else compare(file)
            file.unlink()
            done.write_text(json.dumps({"bits": bits, "found": asdict(found)}))
        kept = json.loads(done.read_text())
        line(label, weights, kept["bits"], Evaluation(**kept["found"]))

    for file in args.files:
        bits, kinds = linear_bits(file)
        line(f"{file.stem}: {' and '.join(sorted(kinds))}", "", bits, compare(file))
    for kind in args.types:
        for weights in importances:
            peer(kind, binary("llama-quantize"), kind, weights, None)
    for kind in args.ik_types if args.ik else []:
        for weights in importances:
            peer(f"ik {kind}", args.ik / "llama-quantize", kind, weights, args.ik)


def ik_bits(file: Path, base: Path) -> float:
    """Of the linear layers of a file with types that only ik_llama.cpp knows: the file but for all else in it."""
    with GGUFFile(base) as opened:
        linear = sum(t.n_elements for t in opened if t.name.startswith("blk.") and len(t.shape) > 1)
        embeddings = sum(t.n_elements for t in opened if not t.name.startswith("blk.") and len(t.shape) > 1)
        norms = sum(4 * t.n_elements for t in opened if len(t.shape) == 1)
        head = base.stat().st_size - sum(t.n_bytes for t in opened)
    return 8 * (file.stat().st_size - head - norms - embeddings * 34 // 32) / linear


if __name__ == "__main__":
    main()
