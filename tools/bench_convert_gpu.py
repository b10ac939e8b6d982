"""Time and memory of conversions of models of real shapes, with random weights made on the spot.

    python tools/bench_convert_gpu.py TOKENIZER_MODEL WORK --calibration TEXT [--shape 1B 3B 8B] [--blocks N]
        [--tokens 131072] [--window 2048] [--type A3] [--gpus 1 2] [--gpu-memory none 12GiB] [--host-memory 64GiB]
        [--given-base] [--sequential | --no-sequential]

TOKENIZER_MODEL lends its tokenizer; the models and their base files are made in WORK, which needs four times the size
of the model, and removed. With `--blocks N` only N of the shape's blocks are made, and a line scales up what they took.
Every conversion makes its base file, as a user's does; with `--given-base` one is made before, for all of them.
`--sequential` and `--no-sequential` are `athena-gguf convert`'s.
Every stage is the conversion's own: seconds that it alone took, and "beside" those of work that went on meanwhile in
other threads. Curvature and encoding are counted from when the first of them (calibration text and opening the model
included) began, be it beside the base file, to when the last tensor was encoded: with a wait for the base file in
between where there was one. The floor of a stage is its operations (docs/method.md) over what this card was measured to
do in the same run: products of bfloat16, TF32 and float64 numbers, and a sixteenth of its float32 peak for the search.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # hidden, intermediate, blocks, heads, key/value heads, vocabulary
    "tiny": (256, 512, 2, 4, 2, 50_000),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "3B": (3072, 8192, 28, 24, 8, 128_256),
    "8B": (4096, 14336, 32, 32, 8, 128_256),
    "70B": (8192, 28672, 80, 64, 8, 128_256),
}


def make_model(folder: Path, shape: str, blocks: int, tokenizer: Path, device: torch.device) -> int:
    """A Llama of the shape, a file a block; the number of its weights."""
    import transformers
    from safetensors.torch import save_file

    hidden, inner, _, heads, kv_heads, vocabulary = SHAPES[shape]
    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".model", ".txt") and path.name not in ("config.json", "generation_config.json"):
            shutil.copy(path, folder)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, device=device) / size[-1] ** 0.5).to(torch.bfloat16).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    kv = hidden // heads * kv_heads
    files = {"model.embed_tokens.weight": random(vocabulary, hidden), "lm_head.weight": random(vocabulary, hidden)}
    save_file(files | {"model.norm.weight": ones}, folder / "outer.safetensors", {"format": "pt"})
    count = 2 * vocabulary * hidden
    for n in range(blocks):
        weights = {
            "self_attn.q_proj": random(hidden, hidden),
            "self_attn.k_proj": random(kv, hidden),
            "self_attn.v_proj": random(kv, hidden),
            "self_attn.o_proj": random(hidden, hidden),
            "mlp.gate_proj": random(inner, hidden),
            "mlp.up_proj": random(inner, hidden),
            "mlp.down_proj": random(hidden, inner),
            "input_layernorm": ones.clone(),
            "post_attention_layernorm": ones.clone(),
        }
        named = {f"model.layers.{n}.{name}.weight": weight for name, weight in weights.items()}
        save_file(named, folder / f"block{n:03}.safetensors", {"format": "pt"})
        count += sum(weight.numel() for weight in weights.values())
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return count


def ceilings(device: torch.device) -> dict[str, float]:
    """Operations a second, measured."""
    if device.type != "cuda":
        return {}

    def rate(dtype: torch.dtype, tf32: bool = False) -> float:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        n = 8192 if dtype != torch.float64 else 4096
        a = torch.randn(n, n, device=device).to(dtype)
        a @ a
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        torch.cuda.synchronize()
        return 5 * 2 * n**3 / (time.perf_counter() - start)

    found = {"bf16": rate(torch.bfloat16), "tf32": rate(torch.float32, True), "float64": rate(torch.float64)}
    found["float32"] = rate(torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.empty_cache()
    return found


def floors(shape: str, blocks: int, tokens: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of the stages at the measured rates: passes over the tokens (the forward pass runs twice, and the
    backward pass has no weight gradients) and curvature sums; factors and inverses, and products of the encoding."""
    hidden, inner, _, heads, kv_heads, vocabulary = SHAPES[shape]
    widths = {hidden: (hidden + 2 * hidden // heads * kv_heads) + hidden + 2 * inner, inner: hidden}  # rows that read
    weights = blocks * sum(width * rows for width, rows in widths.items())
    passes = 2 * tokens * (3 * weights + 2 * vocabulary * hidden)
    sums = blocks * 2 * tokens * (3 * hidden**2 + inner**2)
    factors = blocks * (3 * hidden**3 + inner**3)
    # One pass and four sweeps, the pull after every refit, half of it again for the normal equations, one target.
    products = blocks * sum(2 * rows * width**2 for width, rows in widths.items()) * (0.5 + 4 + 5 + 2.5 + 1)
    return {
        "curvature": passes / rates["bf16"] + sums / rates["tf32"],
        "encoding": factors / rates["float64"] + products / rates["float32"],
    }


class Peaks:
    """The most memory while it is entered, in bytes: of this process and those of other cards what is no file's; of
    every card beyond the first all that is in use there, which torch knows only of its own process."""

    def __enter__(self) -> Peaks:
        self.host, self.stop = 0, threading.Event()
        self.cards: dict[int, int] = {}
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.1):
            self.host = max(self.host, _anonymous("self") + sum(map(_anonymous, _card_processes())))
            for card in range(1, torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
                free, whole = torch.cuda.mem_get_info(card)
                self.cards[card] = max(self.cards.get(card, 0), whole - free)

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()


def _anonymous(process: str) -> int:
    """Bytes of its memory that are no file's; 0 if it is no more."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _card_processes() -> list[str]:
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for process in children.read_text(encoding="ascii").split():
                if b"athena_gguf.cards" in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
    return found


def convert(args: argparse.Namespace, model: Path, base: Path, out: Path) -> dict[str, Any]:
    """One conversion in this process."""
    from athena_gguf import conversion

    conversion.WINDOW = args.window
    options = conversion.ConvertOptions(
        type=args.type,
        calibration=tuple(map(str, args.calibration)),
        calibration_tokens=args.tokens,
        device=args.device,
        tune=False,
        sequential=args.sequential,
        base=base if args.given_base else None,
        gpu_memory=args.gpu_memory[0],
        host_memory=args.host_memory,
    )
    start = time.perf_counter()
    with Peaks() as peaks:
        result = conversion.convert(model, out, options)
    seconds = time.perf_counter() - start
    cards = range(torch.cuda.device_count()) if args.device == "cuda" else ()
    on_card = [(peaks.cards.get(card) or torch.cuda.max_memory_reserved(card)) / 2**30 for card in cards]
    return {
        "seconds": seconds,
        "stages": result.seconds,
        "beside": result.beside,
        "spans": result.spans,
        "GPU GiB": on_card,
        "host GiB": peaks.host / 2**30,
    }


def measure(args: argparse.Namespace, shape: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """A conversion for every number of cards and every limit of memory, each in a process of its own."""
    from athena_gguf.gguf_file import write_base

    whole = SHAPES[shape][2]
    blocks = args.blocks or whole
    model, base, out = (args.work / f"{shape}-{blocks}{end}" for end in ("", ".base.gguf", ".gguf"))
    rows = []
    try:
        weights = make_model(model, shape, blocks, args.tokenizer, torch.device(args.device))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        print(f"\n{shape}, {blocks} of {whole} blocks, {weights / 1e9:.2f}e9 weights", flush=True)
        if args.given_base:
            start = time.perf_counter()
            write_base(model, base, sync=False)  # as a conversion does
            print(f"  base file through llama.cpp's converter: {time.perf_counter() - start:.1f} s", flush=True)
        for cards in args.gpus:
            for limit in args.gpu_memory:
                row = {"shape": shape, "blocks": blocks, "weights": weights, "cards": cards, "limit": limit}
                row["floors"] = floors(shape, blocks, args.tokens, rates) if rates else {}
                row |= _in_process(args, model, base, out, cards, limit)
                rows.append(row)
                _print(row, whole)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        for path in (base, out):
            path.unlink(missing_ok=True)
    return rows


def _in_process(
    args: argparse.Namespace, model: Path, base: Path, out: Path, cards: int, limit: str | None
) -> dict[str, Any]:
    command = [sys.executable, __file__, str(args.tokenizer), str(args.work), "--calibration"]
    command += [*map(str, args.calibration), "--tokens", str(args.tokens), "--window", str(args.window)]
    command += ["--type", args.type, "--device", args.device, "--one", str(model), str(base), str(out)]
    command += ["--gpu-memory", limit] if limit else []
    command += ["--host-memory", args.host_memory] if args.host_memory else []
    command += ["--given-base"] if args.given_base else []
    if args.sequential is not None:
        command += ["--sequential" if args.sequential else "--no-sequential"]
    environment = dict(os.environ)
    if "CUDA_VISIBLE_DEVICES" not in environment:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(cards)))
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    process = time.perf_counter() - start
    log = out.with_suffix(f".{cards}.{limit}.log")
    log.write_text(done.stderr)
    if done.returncode:
        print(done.stderr[-3000:])
        nothing = {"stages": {}, "beside": {}, "spans": {}, "GPU GiB": [], "host GiB": 0.0}
        return {"seconds": float("nan"), "process": process, **nothing}
    return {"process": process, **json.loads(done.stdout.splitlines()[-1])}


def _work(row: dict[str, Any]) -> tuple[float, float]:
    """From when to when curvature and encoding were worked on."""
    spans = [row["spans"][name] for name in ("calibration text", "curvature", "encoding") if name in row["spans"]]
    return min((first for first, _ in spans), default=0.0), max((last for _, last in spans), default=0.0)


def _print(row: dict[str, Any], whole: int) -> None:
    limit = f", --gpu-memory {row['limit']}" if row["limit"] else ""
    print(
        f"  {row['cards']} GPU{'s' * (row['cards'] > 1)}{limit}: {row['seconds']:.1f} s from end to end, "
        f"{row['process']:.1f} s with the process and its imports"
    )
    for name, took in row["stages"].items():
        beside = f"  beside others {row['beside'][name]:.1f} s" if name in row["beside"] else ""
        first, last = row["spans"][name]
        print(f"    {name:18s} {took:8.1f} s{beside}  (second {first:.1f} to {last:.1f})")
    first, last = _work(row)
    work = last - first
    print(f"    text, curvature and encoding, from second {first:.1f} to {last:.1f}: {work:.1f} s")
    if "base file" in row["spans"]:
        print(f"    of it after the base file was complete: {last - max(first, row['spans']['base file'][1]):.1f} s")
    if row["floors"]:
        floor = sum(row["floors"].values())
        parts = " and ".join(f"{name} {seconds:.1f} s" for name, seconds in row["floors"].items())
        print(f"    floor of curvature and encoding, {parts}: {work / floor:.1f} times")
    peaks = ", ".join(f"{peak:.1f}" for peak in row["GPU GiB"])
    print(f"    peak: GPU {peaks} GiB, host {row['host GiB']:.1f} GiB")
    if row["blocks"] < whole:
        print(
            f"    curvature and encoding of all {whole} blocks: {work * whole / row['blocks'] / 60:.1f} min, scaled up"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--shape", nargs="+", default=["8B"], choices=list(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--type", default="A3")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of cards, one conversion each")
    parser.add_argument(
        "--gpu-memory", nargs="+", default=[None], help="limits, one conversion each; none for no limit"
    )
    parser.add_argument("--host-memory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--given-base", action="store_true", help="made before, once for all conversions of a model")
    parser.add_argument("--sequential", action=argparse.BooleanOptionalAction, help="encode layers in order")
    parser.add_argument("--one", type=Path, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.gpu_memory = [None if limit == "none" else limit for limit in args.gpu_memory]
    if args.one:
        print(json.dumps(convert(args, *args.one)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rates = ceilings(torch.device(args.device))
    for name, rate in rates.items():
        print(f"{name} products: {rate / 1e12:.0f}e12 a second")
    rows = [row for shape in args.shape for row in measure(args, shape, rates)]
    if len(rows) > 1:
        print(
            "\n| shape | weights | GPUs | limit | end to end, s | base file, s | curvature and encoding, s | of it "
            "after the base file, s | s per 1e9 weights | GPU GiB | host GiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            (first, last), base = _work(row), row["stages"].get("base file", 0.0)
            after = last - max(first, row["spans"].get("base file", (0.0, 0.0))[1])
            peak = max(row["GPU GiB"], default=0.0)
            print(
                f"| {row['shape']} | {row['weights'] / 1e9:.2f}e9 | {row['cards']} | {row['limit'] or ''} "
                f"| {row['seconds']:.1f} | {base:.1f} | {last - first:.1f} | {after:.1f} "
                f"| {(last - first) / row['weights'] * 1e9:.1f} | {peak:.1f} | {row['host GiB']:.1f} |"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
