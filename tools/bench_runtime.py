"""Measure the built runtime: tokens a second of A2, A3 and A4 against llama.cpp's types, with llama-bench.

Makes GGUF files of a real model's shapes, all matrices of one type (as llama-quantize --pure does). Their content is
Gaussian noise in rows of that type, 64 different ones a width and then again: it does not matter for speed. Runs
llama-bench on them in alternation, round by round, prompt and generation apart and for each number of threads; prints
medians of tokens a second, the ratios that count, the read bandwidth of the machine measured between the rounds, and
the share of it that token generation reaches (all tensors are read once a token).

    python tools/bench_runtime.py                             # the runtime's build, 1B shapes, 1 and all threads
    python tools/bench_runtime.py --shape smollm2-135m --threads 2 --layers 8
    python tools/bench_runtime.py --runtime DIR --keep FILES
    python tools/bench_runtime.py --ik BUILD/bin              # with ik_llama.cpp's types, run by its own llama-bench

--ik takes the folder of ik_llama.cpp's llama-bench and llama-quantize; its files are made by that llama-quantize from
the Q8_0 file, without an importance matrix. Files stay in --keep and are used again; without it they are temporary. The
1B shapes take 5 GB for all types. Stopped (Ctrl-C, SIGTERM), it reports the rounds that are complete.
"""

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from athena_gguf.gguf_file import types

DISTINCT_ROWS = 64
TYPES = ("A2", "A3", "A4", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q4_0")
# ours, theirs, wanted at token generation and at prompts (0: nothing is wanted)
RATIOS = (
    ("A3", "IQ3_S", 2.3, 2.0),
    ("A3", "IQ3_XXS", 2.0, 0.0),
    ("A3", "Q3_K", 1.05, 0.0),
    ("A3", "Q4_K", 0.0, 1.0),
    ("A3", "Q4_0", 0.0, 1.0),
    ("A2", "IQ2_XXS", 1.9, 2.0),
    ("A2", "Q4_K", 0.0, 1.0),
    ("A2", "Q4_0", 0.0, 1.0),
    ("A4", "IQ4_XS", 1.2, 0.0),
    ("A4", "Q4_K", 1.05, 1.0),
    ("A4", "Q4_0", 0.0, 1.0),
    ("A2", "ik IQ2_KT", 0.0, 0.0),
    ("A3", "ik IQ3_KT", 0.0, 0.0),
    ("A3", "ik IQ3_K", 0.0, 0.0),
    ("A4", "ik IQ4_KT", 0.0, 0.0),
    ("A4", "ik IQ4_KS", 0.0, 0.0),
)
IK_TYPES = ("IQ2_KT", "IQ3_KT", "IQ3_K", "IQ4_KT", "IQ4_KS")  # all in blocks of 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model whose output matrix is its embedding matrix."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns by tensor name."""
        kv = self.hidden // self.heads * self.kv_heads
        of_layer = {
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.intermediate, self.hidden),
            "ffn_up": (self.intermediate, self.hidden),
            "ffn_down": (self.hidden, self.intermediate),
        }
        names = {"token_embd.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            names |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return names


SHAPES = {
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256),
    "smollm2-135m": Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152),
}


class Ggml:
    """The quantizers of the built libggml."""

    def __init__(self, binaries: Path) -> None:
        found = sorted(path for path in binaries.glob("*ggml-base*") if path.suffix in (".so", ".dylib", ".dll"))
        if not found:
            raise SystemExit(f"no ggml-base library in {binaries}: build the runtime with shared libraries")
        self._quantize = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t

    def random_rows(self, kind: str, columns: int) -> npt.NDArray[np.uint8]:
        """[DISTINCT_ROWS, row bytes] of Gaussian noise."""
        x = np.random.default_rng(columns).normal(0, 0.02, (DISTINCT_ROWS, columns)).astype(np.float32)
        out = np.zeros((DISTINCT_ROWS, types.row_bytes(kind, columns)), np.uint8)
        importance = np.ones(columns, np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, out, importance)]
        sizes = [ctypes.c_int64(n) for n in (0, DISTINCT_ROWS, columns)]
        written = self._quantize(ctypes.c_int(types.type_id(kind)), pointers[0], pointers[1], *sizes, pointers[2])
        if written != out.size:
            raise SystemExit(f"{kind}: libggml made {written} bytes instead of {out.size}")
        return out


def write_model(path: Path, shape: Shape, kind: str, ggml: Ggml) -> None:
    """A GGUF file that llama.cpp runs: no tokenizer, norms of 1, every matrix of one type."""
    types.register()
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name("benchmark")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    norms = ["output_norm.weight"]
    norms += [f"blk.{layer}.{name}_norm.weight" for layer in range(shape.layers) for name in ("attn", "ffn")]
    matrices = shape.matrices()
    dtype = gguf.GGMLQuantizationType(types.type_id(kind))
    for name, (rows, columns) in matrices.items():
        size = types.row_bytes(kind, columns)
        writer.add_tensor_info(name, (rows, size), np.dtype(np.uint8), rows * size, dtype)
    for name in norms:
        writer.add_tensor_info(name, (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    made = {columns: ggml.random_rows(kind, columns) for columns in {columns for _, columns in matrices.values()}}
    for rows, columns in matrices.values():
        distinct = made[columns]
        writer.write_tensor_data(np.resize(distinct, (rows, distinct.shape[1])))
    for _ in norms:
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    writer.close()
    unfinished.replace(path)


def fits(shape: Shape, kind: str) -> bool:
    block, _ = types.block_size(kind)
    return all(columns % block == 0 for _, columns in shape.matrices().values())


def tensor_bytes(shape: Shape, kind: str) -> int:
    """What a token reads."""
    return sum(rows * types.row_bytes(kind, columns) for rows, columns in shape.matrices().values())


def tool(binaries: Path, name: str) -> Path:
    found = [path for path in (binaries / name, binaries / f"{name}.exe") if path.exists()]
    if not found:
        raise SystemExit(f"no {name} in {binaries}")
    return found[0]


def quantize_with_ik(binaries: Path, source: Path, target: Path, kind: str) -> None:
    unfinished = target.with_suffix(".part")
    command = [str(tool(binaries, "llama-quantize")), "--pure", "--allow-requantize", "--ignore-imatrix-rules"]
    command += [str(source), str(unfinished), kind]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise SystemExit(f"{command[0]} failed at {kind}:\n{(result.stdout + result.stderr)[-2000:]}")
    unfinished.replace(target)


def llama_bench(binaries: Path, model: Path, threads: int, prompt: int, generate: int) -> dict[str, float]:
    """Tokens a second of "pp" and "tg"."""
    command = [
        tool(binaries, "llama-bench"),
        "-m",
        model,
        "-p",
        prompt,
        "-n",
        generate,
        "-t",
        threads,
        "-r",
        1,
        "-o",
        "json",
    ]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"llama-bench failed on {model.name}:\n{result.stderr[-2000:]}")
    return {"pp" if test["n_prompt"] else "tg": float(test["avg_ts"]) for test in json.loads(result.stdout)}


def bandwidth(program: Path, threads: int, mebibytes: int) -> float:
    """Bytes a second."""
    command = [str(program), str(threads), str(mebibytes), "5"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compile_bandwidth(target: Path) -> None:
    source = Path(__file__).with_name("bench_bandwidth.c")
    subprocess.run(["cc", "-O3", "-march=native", "-pthread", str(source), "-o", str(target)], check=True)


class Candidate(NamedTuple):
    """A file, what runs it, and the bytes of it that a token reads."""

    path: Path
    binaries: Path
    bytes: int


@contextmanager
def said(what: str) -> Iterator[None]:
    """Tells on the error stream what is done, and how long it took."""
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def ik_candidates(binaries: Path, source: Path, shape: Shape) -> dict[str, Candidate]:
    """ik_llama.cpp's types, made from the Q8_0 file `source`; none where the shape's rows are no multiple of 256."""
    made = {}
    if all(columns % 256 == 0 for _, columns in shape.matrices().values()):
        for kind in IK_TYPES:
            path = source.with_name(source.name.replace("-Q8_0", f"-ik-{kind}"))
            if not path.exists():
                with said(f"file of ik_llama.cpp's {kind}"):
                    quantize_with_ik(binaries, source, path, kind)
            made[f"ik {kind}"] = Candidate(path, binaries, path.stat().st_size)
    return made


def report(speeds: dict[tuple[str, str], list[float]], read: list[float], candidates: dict[str, Candidate]) -> None:
    available = statistics.median(read)
    print(f"  read bandwidth {available / 1e9:.1f} GB/s")
    for kind, candidate in candidates.items():
        pp, tg = (statistics.median(speeds[kind, test]) for test in ("pp", "tg"))
        share = tg * candidate.bytes / available
        print(f"  {kind:9} pp {pp:8.1f} t/s   tg {tg:7.2f} t/s, {100 * share:.0f}% of the bandwidth")
    for ours, theirs, *wanted in RATIOS:
        if ours not in candidates or theirs not in candidates:
            continue
        texts = []
        for test, least in zip(("tg", "pp"), wanted, strict=True):
            pairs = zip(speeds[ours, test], speeds[theirs, test], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            texts.append(f"{test} {ratio:.2f}" + (f" (wanted: {least})" if least else ""))
        print(f"  {ours} / {theirs}: {', '.join(texts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, help="folder of the binaries (default: the runtime's)")
    parser.add_argument("--ik", type=Path, help="folder of ik_llama.cpp's binaries, to measure its types too")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look (default: the model's)")
    parser.add_argument("--vocabulary", type=int, help="a smaller vocabulary (default: the model's)")
    parser.add_argument("--types", default=",".join(TYPES), help=f"default {','.join(TYPES)}")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of threads (default: 1 and all)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every file (default 3)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--generate", type=int, default=128, help="tokens to generate (default 128)")
    parser.add_argument("--keep", type=Path, help="where to keep the files")
    parser.add_argument("--mebibytes", type=int, default=1024, help="memory to measure bandwidth with (default 1024)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    if args.runtime is None:
        from athena_gguf.runtime import build

        args.runtime = build()
    shape = SHAPES[args.shape]
    if args.layers:
        shape = replace(shape, layers=args.layers)
    if args.vocabulary:
        shape = replace(shape, vocabulary=args.vocabulary)
    chosen = args.types.split(",")
    kinds = [kind for kind in chosen if fits(shape, kind)]
    if len(kinds) < len(chosen):
        print(f"rows of this shape do not fit: {', '.join(k for k in chosen if k not in kinds)}")
    print(f"{args.shape}: {shape}")

    ggml = Ggml(args.runtime)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        candidates = {}
        for kind in [*kinds, *(["Q8_0"] if args.ik else [])]:
            path = folder / f"{args.shape}-{shape.layers}-{shape.vocabulary}-{kind}.gguf"
            if not path.exists():
                with said(f"file of {kind}"):
                    write_model(path, shape, kind, ggml)
            candidates[kind] = Candidate(path, args.runtime, tensor_bytes(shape, kind))
        if args.ik:
            candidates |= ik_candidates(args.ik, candidates["Q8_0"].path, shape)
        program = Path(temporary, "bench_bandwidth")
        compile_bandwidth(program)
        for threads in dict.fromkeys(int(t) for t in args.threads.split(",")):
            speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
            read = []
            cut_off = False
            try:
                for number in range(args.rounds):
                    measured = bandwidth(program, threads, args.mebibytes)
                    runs = {}
                    for kind, (path, binaries, _) in candidates.items():
                        with said(f"{threads} threads, round {number + 1}, {kind}"):
                            runs[kind] = llama_bench(binaries, path, threads, args.prompt, args.generate)
                    read.append(measured)
                    for kind, run in runs.items():
                        for test, speed in run.items():
                            speeds[kind, test].append(speed)
            except KeyboardInterrupt:  # whole rounds count
                cut_off = True
                if not read:
                    return 1
            print(f"{threads} thread{'s' if threads > 1 else ''}" + (f", {len(read)} rounds" if cut_off else ""))
            report(speeds, read, candidates)
            if cut_off:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
