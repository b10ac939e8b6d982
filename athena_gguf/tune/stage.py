"""The tuning stage of a conversion: which modules and tensors take part, and what becomes of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf import progress
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, Tensor, quantize
from athena_gguf.plan import Plan, block_of
from athena_gguf.tune.train import Quantized, Tuned, TuneOptions, tune, window_bytes

if TYPE_CHECKING:
    import torch

_WEIGHT = 10  # bytes: in float32 in the original and its copy, and what learns


def tune_encoded(
    model: Any,
    base: GGUFFile,
    plan: Plan,
    encoded: Mapping[str, Any],
    windows: torch.Tensor,
    seed: int,
    at_once: int | None = None,
) -> Tuned:
    """Tune what `encode` made of the matrices of `base`, `at_once` windows at a time at most; the norms of the result
    are whole new tensors."""
    from athena_gguf.model.linear import named_layers

    def quantized(name: str) -> Quantized | None:
        rows = base.tensors[name].to_float32()
        if name in plan.encoded:
            return Quantized(TYPES[plan.encoded[name]], encoded[name].data, rows)
        if name in plan.standard:
            kind = plan.standard[name]
            return Quantized(None, Tensor("", rows.shape, kind, quantize(rows, kind)).to_float32(), rows)
        return None

    embeddings = model.get_input_embeddings()
    matrices = {
        layer.module_name: layer.tensor_name
        for layer in named_layers(model, plan.architecture, base.tensors)
        if layer.module.weight is not embeddings.weight
    }
    names = {id(module): name for name, module in model.named_modules()}
    matrices[names[id(embeddings)]] = "token_embd.weight"
    options = TuneOptions()
    with progress.bar("tuning scales and norms", options.steps * options.batch) as advance:
        found = tune(model, matrices, _norms(model, plan, base), quantized, windows, options, seed, advance, at_once)
    progress.note(f"tuning: KL divergence on text held out {found.before:.4f} -> {found.after:.4f}")
    for name, change in found.norms.items():
        found.norms[name] = base.tensors[name].to_float32() + change
    return found


def windows_at_once(plan: Plan, length: int, memory: int) -> int:
    """Windows of `length` tokens that a GPU with `memory` bytes can learn from at a time, beside the model."""
    weights = sum(map(plan.elements, plan.shapes))
    blocks = len({found[0] for name in plan.shapes if (found := block_of(name))})
    vocabulary, hidden = plan.shapes["token_embd.weight"]
    inner = max(shape[-1] for shape in plan.shapes.values())
    room = memory - _WEIGHT * weights
    return max(0, room) // window_bytes(length, vocabulary, blocks, hidden, inner)


def _norms(model: Any, plan: Plan, base: GGUFFile) -> dict[str, str]:
    """Modules with one weight a column that the file holds as they are or plus one (as Gemma's), by module name."""
    from athena_gguf.model.linear import tensor_namer

    name_of = tensor_namer(model, plan.architecture)
    found = {}
    for module_name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 1:
            continue
        tensor_name = name_of(module_name)
        if tensor_name not in base.tensors or base.tensors[tensor_name].type_name != "F32":
            continue
        ours, theirs = base.tensors[tensor_name].to_float32(), weight.detach().float().cpu().numpy()
        if ours.shape == theirs.shape and any(np.allclose(ours, theirs + add, rtol=0, atol=1e-5) for add in (0, 1)):
            found[module_name] = tensor_name
    return found
