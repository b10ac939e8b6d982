"""How large the result may be: what `--bpw`, `--size`, `--fit-memory` and `--preset` ask for, as bytes of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from athena_gguf.errors import UsageError
from athena_gguf.format import TYPES

# Bits a weight over all tensors.
PRESETS = {"tiny": 2.5, "small": 3.0, "medium": 3.5, "large": 4.25, "best": 5.5}
CONTEXT = 4096  # tokens of the KV cache that --fit-memory makes room for by default
BATCH = 512  # tokens that llama.cpp computes at a time
PROGRAM = 128 << 20  # bytes for the program, its libraries and the tokenizer

_PLAIN = 100_000  # bytes: a smaller number without a unit has lost it

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True)
class Target:
    """One of `bpw`, bits of all tensors by the number of all weights; `size`, bytes of the file; `memory`, bytes that
    running it may take with a context of `context` tokens. `name`: what the user asked for, `option`: where."""

    option: str
    name: str
    bpw: float | None = None
    size: int | None = None
    memory: int | None = None
    context: int = CONTEXT


def parse_target(
    bpw: float | None = None,
    size: str | None = None,
    fit_memory: str | None = None,
    context: int | None = None,
    preset: str | None = None,
) -> Target | None:
    """The target that the options ask for, None if none of them was given. Raises UsageError for more than one, or a
    value that means nothing."""
    given = {"--bpw": bpw, "--size": size, "--fit-memory": fit_memory, "--preset": preset}
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other; give one of them")
    if context is not None and fit_memory is None:
        raise UsageError("--context says how large the KV cache of --fit-memory is; give both")
    if context is not None and context < 1:
        raise UsageError(f"--context {context}: give a number of tokens")
    if bpw is not None:
        if not 0 < bpw < 64:
            raise UsageError(f"--bpw {bpw}: give bits a weight, such as 3.4")
        return Target("--bpw", f"{bpw:g} bits a weight", bpw=bpw)
    if size is not None:
        return Target("--size", f"file of {size}", size=parse_bytes("--size", size))
    if fit_memory is not None:
        tokens = context or CONTEXT
        return Target(
            "--fit-memory",
            f"{fit_memory} of memory with {tokens} tokens of context",
            memory=parse_bytes("--fit-memory", fit_memory),
            context=tokens,
        )
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
        return Target("--preset", f"preset {preset}", bpw=PRESETS[preset])
    return None


def target_settings(name: str) -> dict[str, Any]:
    """The settings of a conversion that a short name asks for: a type (A3), a preset (small), bits a weight over all
    (3.4bpw) or the size of the file (71MiB). Raises UsageError for anything else."""
    if name.upper() in TYPES:
        return {"type": name.upper()}
    if name in PRESETS:
        return {"preset": name}
    if match := re.fullmatch(r"(\d+\.?\d*|\.\d+) ?bpw", name):
        return {"bpw": float(match[1])}
    try:
        parse_bytes("", name)
    except UsageError:
        raise UsageError(
            f"target {name}: give a type ({', '.join(TYPES)}), a preset ({', '.join(PRESETS)}), bits a weight such as "
            "3.4bpw, or a size such as 5.5GiB"
        ) from None
    return {"size": name}


def parse_bytes(option: str, text: str) -> int:
    """`5.5GiB` (1024^3), `5.5GB` (1000^3), other letters alike, or plain bytes, as a number of bytes. Raises UsageError
    naming the `option` for anything else, and for so few plain bytes that a unit must be missing."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]):
        raise UsageError(f"{option} {text}: give a size such as 5.5GiB, 800MiB, 6GB or a number of bytes")
    if not match[2] and float(match[1]) < _PLAIN:
        raise UsageError(f"{option} {match[1]}: {match[1]} bytes? say {match[1]}GiB or {match[1]}MiB")
    return int(float(match[1]) * units[match[2].lower()])


def runtime_bytes(metadata: Mapping[str, Any], context: int) -> int:
    """Bytes that llama.cpp needs beside the file: the KV cache in F16 and a margin.

    The margin is `PROGRAM`, and for every token of a batch of `BATCH` float32 logits, two feed-forward rows and eight
    rows of the hidden size. Layers with a sliding window are counted as full ones.
    """
    return kv_cache_bytes(metadata, context) + _margin(metadata)


def kv_cache_bytes(metadata: Mapping[str, Any], context: int) -> int:
    """Keys and values of all layers, two bytes a number; 0 for architectures without attention."""
    arch = metadata.get("general.architecture", "")

    def get(key: str, default: Any = 0) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    heads = get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    layers = int(get("block_count"))
    total_heads = sum(kv_heads) if isinstance(kv_heads, list) else int(kv_heads) * layers
    most_heads = max(heads) if isinstance(heads, list) else heads
    width = int(get("embedding_length")) // most_heads if most_heads else 0
    return context * total_heads * (get("attention.key_length", width) + get("attention.value_length", width)) * 2


def _margin(metadata: Mapping[str, Any]) -> int:
    arch = metadata.get("general.architecture", "")
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    forward = metadata.get(f"{arch}.feed_forward_length", 0)
    widest = max(forward) if isinstance(forward, list) else int(forward)
    hidden = int(metadata.get(f"{arch}.embedding_length", 0))
    logits = len(vocabulary) if isinstance(vocabulary, list) else 0
    return PROGRAM + 4 * BATCH * (logits + 2 * widest + 8 * hidden)
