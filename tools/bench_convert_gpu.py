"""Time and memory of conversions of models of real shapes, with random weights made on the spot.

    python tools/bench_convert_gpu.py TOKENIZER_MODEL WORK --calibration TEXT [--shape 1B 3B 8B] [--blocks N]
        [--tokens 131072] [--window 2048] [--type A3] [--gpu-memory 12GiB] [--host-memory 64GiB] [--device cuda]

TOKENIZER_MODEL lends its tokenizer; the models and their base files are made in WORK, which needs four times the size
of the model, and removed. With `--blocks N` only N of the shape's blocks are made, and a line scales up what they took.
Every stage is the conversion's own. The floor of a stage is its operations (docs/method.md) over what this card was
measured to do in the same run: products of bfloat16, TF32 and float64 numbers, and a sixteenth of its float32 peak for
the search.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
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


class HostPeak:
    """Most memory of this process that is no file's, in bytes, while it is entered."""

    def __enter__(self) -> HostPeak:
        self.most, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.1):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            self.most = max(self.most, next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")))

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()


def measure(args: argparse.Namespace, shape: str, rates: dict[str, float]) -> dict[str, Any]:
    from athena_gguf import conversion

    whole = SHAPES[shape][2]
    blocks = args.blocks or whole
    device = torch.device(args.device)
    model = args.work / f"{shape}-{blocks}"
    out = args.work / f"{shape}-{blocks}.gguf"
    weights = make_model(model, shape, blocks, args.tokenizer, device)
    conversion.WINDOW = args.window
    options = conversion.ConvertOptions(
        type=args.type,
        calibration=tuple(map(str, args.calibration)),
        calibration_tokens=args.tokens,
        device=args.device,
        tune=False,
        gpu_memory=args.gpu_memory,
        host_memory=args.host_memory,
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        with HostPeak() as host:
            result = conversion.convert(model, out, options)
        seconds = time.perf_counter() - start
        size = out.stat().st_size
    finally:
        shutil.rmtree(model)
        out.unlink(missing_ok=True)
    on_card = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    row: dict[str, Any] = {"shape": shape, "blocks": blocks, "weights": weights, "seconds": seconds, "bytes": size}
    row |= {"stages": result.seconds, "GPU GiB": on_card, "host GiB": host.most / 2**30}
    if rates:
        row["floors"] = floors(shape, blocks, args.tokens, rates)
    print(
        f"\n{shape}, {blocks} of {whole} blocks, {weights / 1e9:.2f}e9 weights, {size / 2**30:.2f} GiB: {seconds:.1f} s"
    )
    for name, took in result.seconds.items():
        floor = row.get("floors", {}).get(name)
        note = f", floor {floor:.1f} s, {took / floor:.1f} times" if floor else ""
        print(f"  {name:18s} {took:8.1f} s{note}")
    other = sum(took for name, took in result.seconds.items() if name in ("base file", "check", "writing"))
    print(f"  without base file, check and writing: {seconds - other:.1f} s")
    print(f"  peak: GPU {on_card:.1f} GiB, host {host.most / 2**30:.1f} GiB", flush=True)
    if blocks < whole:
        work = sum(result.seconds.get(name, 0.0) for name in ("curvature", "encoding"))
        print(
            f"  curvature and encoding of all {whole} blocks: {work * whole / blocks / 60:.1f} min, scaled up",
            flush=True,
        )
    return row


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
    parser.add_argument("--gpu-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rates = ceilings(torch.device(args.device))
    for name, rate in rates.items():
        print(f"{name} products: {rate / 1e12:.0f}e12 a second")
    rows = [measure(args, shape, rates) for shape in args.shape]
    if len(rows) > 1:
        print("\n| shape | weights | curvature, s | encoding, s | both, s per 1e9 weights |\n|---|---|---|---|---|")
        for row in rows:
            parts = [row["stages"].get(name, 0.0) for name in ("curvature", "encoding")]
            each = sum(parts) / row["weights"] * 1e9
            print(f"| {row['shape']} | {row['weights'] / 1e9:.2f}e9 | {parts[0]:.1f} | {parts[1]:.1f} | {each:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
