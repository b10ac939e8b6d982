"""A Llama model with more channels and heads, all zero, that computes the same as before.

    python tools/pad_model.py MODEL OUT

Types with blocks of 256 weights cannot hold the rows of the demo model (hidden size 576): llama.cpp puts larger types
in their place. With zeros at the end of rows (768) every type can be compared at its own size. Norms divide by the
root mean square over all channels, the new ones too; their weights and epsilon make up for that.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

MULTIPLE = 256


def padded_config(config: dict[str, Any]) -> dict[str, Any]:
    """More key heads, with their query heads, and as many more channels, up to a hidden size of a multiple of 256."""
    width, heads, keys = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    more = next(n for n in range(keys, (MULTIPLE + 1) * keys) if n * width % (keys * MULTIPLE) == 0)
    if n_lost := heads * more % keys:
        raise ValueError(f"{n_lost} query heads are left over")
    return config | {
        "hidden_size": more * width // keys,
        "num_attention_heads": more * heads // keys,
        "num_key_value_heads": more,
        "rms_norm_eps": config["rms_norm_eps"] * keys / more,
    }


def shape(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """Of the tensor `name` of a Llama model."""
    size, hidden = config["head_dim"], config["hidden_size"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    inner = config["intermediate_size"]
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        return (hidden,)
    return {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }[kind]


def pad(model: Path, out: Path) -> None:
    """Write the model directory `out`, which must not exist."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    wide = padded_config(config)
    weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        assert tuple(weight.shape) == shape(name, config), name
        padded = torch.zeros(shape(name, wide))
        scale = (config["hidden_size"] / wide["hidden_size"]) ** 0.5 if weight.ndim == 1 else 1.0
        padded[tuple(map(slice, weight.shape))] = weight.float() * scale
        weights[name] = padded.to(weight.dtype)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (out / "config.json").write_text(json.dumps(wide, indent=2) + "\n")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Llama model's directory with one safetensors file")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"pad_model: {args.out} exists; name another directory")
    pad(args.model, args.out)


if __name__ == "__main__":
    main()
