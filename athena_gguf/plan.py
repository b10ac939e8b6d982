"""Which tensor of the base file becomes what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.format import GROUP, TYPES
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize
from athena_gguf.gguf_file.types import row_bytes

EMBEDDINGS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
_BLOCK = 32  # columns of a block of Q8_0 and of every other standard type that is no float
_COLUMNS = 4  # of every tensor, compared with the model's
_CHUNK = 1 << 24  # elements looked at in one go


@dataclass
class Plan:
    """`encoded`: tensors that become A types, name to type; `standard`: those that become a standard type; all others
    stay as they are. `curved`: those of `encoded` whose curvature is measured. `shapes`: of every matrix."""

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    encoded: dict[str, str] = field(default_factory=dict)
    standard: dict[str, str] = field(default_factory=dict)
    curved: set[str] = field(default_factory=set)

    def elements(self, name: str) -> int:
        return int(np.prod(self.shapes[name]))

    def keep_standard(self, name: str, reason: str) -> None:
        """Take a tensor out of the encoding, and say so."""
        self.encoded.pop(name, None)
        self.curved.discard(name)
        kind = "Q8_0" if self.shapes[name][-1] % _BLOCK == 0 else "F16"
        self.standard[name] = kind
        progress.note(f"warning: {name} {list(self.shapes[name])} becomes {kind}: {reason}")


def make_plan(base_path: Path, type_name: str, embedding_type: str) -> Plan:
    """Linear layers get `type_name`, embeddings and output `embedding_type`; what cannot be encoded a standard type.

    Only what llama.cpp's converter wrote as BF16 or F16 is touched: norms, biases, routers and the like are F32.
    """
    with GGUFFile(base_path) as base:
        architecture = str(base.metadata.get("general.architecture", ""))
        big = {t.name: t.shape for t in base if len(t.shape) > 1 and t.type_name in ("BF16", "F16")}
    if not big:
        raise AthenaError(f"{base_path}: no BF16 or F16 matrix in it; give a base file made by `athena-gguf base`")
    plan = Plan(architecture, big)
    for name, shape in big.items():
        kind = embedding_type if name in EMBEDDINGS else type_name
        if kind not in TYPES:
            if shape[-1] % _BLOCK and kind not in ("F32", "F16", "BF16"):
                plan.keep_standard(name, f"its rows are no multiple of {_BLOCK}, as {kind} needs")
            else:
                plan.standard[name] = kind
            continue
        plan.encoded[name] = kind
        plan.curved.add(name)
        if shape[-1] % GROUP:
            plan.keep_standard(name, f"its row width is no multiple of {GROUP}")
        elif len(shape) > 2:
            plan.keep_standard(name, "experts are not encoded yet")
        elif (name == "token_embd.weight" and "output.weight" in big) or name == "per_layer_token_embd.weight":
            plan.curved.discard(name)  # only looked up, so its rows have no input to weight columns by
    return plan


def weight_count(model_dir: Path) -> int:
    """Numbers in the safetensors files of a model directory, from their headers."""
    from safetensors import safe_open

    count = 0
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def predicted_bytes(base_path: Path, plan: Plan) -> int:
    """About the size of the result."""
    kinds = plan.standard | plan.encoded
    with GGUFFile(base_path) as base:
        return base.n_bytes + sum(
            base.tensors[name].n_elements // base.tensors[name].columns * row_bytes(kind, base.tensors[name].columns)
            - base.tensors[name].n_bytes
            for name, kind in kinds.items()
        )


def check_same_model(base_path: Path, model: Any, architecture: str) -> None:
    """Raises AthenaError naming a tensor of the base file whose shape or weights are not the model's.

    Looks at a few columns only, and at them sorted, since the base file may permute rows.
    """
    import torch

    from athena_gguf.model.linear import named_layers

    with GGUFFile(base_path) as base:
        pairs = [
            (base.tensors[x.tensor_name], x.module.weight) for x in named_layers(model, architecture, base.tensors)
        ]
        for tensor, weight in pairs:
            if tensor.shape != tuple(weight.shape):
                raise AthenaError(
                    f"{base_path}: tensor {tensor.name} is {list(tensor.shape)}, but the model has "
                    f"{list(weight.shape)}; give the base file of this model"
                )
        for tensor, weight in pairs:
            if tensor.type_name not in ("BF16", "F16"):
                continue
            width = tensor.data.shape[-1] // tensor.columns
            few = np.ascontiguousarray(tensor.data[:, : _COLUMNS * width]).view(np.int16)
            kind = torch.bfloat16 if tensor.type_name == "BF16" else torch.float16
            ours = torch.from_numpy(few).view(kind).float().sort(0).values
            theirs = weight[:, :_COLUMNS].detach().float().cpu().sort(0).values
            if not torch.allclose(ours, theirs, rtol=2**-8, atol=2**-24):
                raise AthenaError(
                    f"{base_path}: tensor {tensor.name} holds other weights than the model; give the base file of "
                    "this model"
                )


def check_finite(base_path: Path) -> None:
    """Raises AthenaError naming the first tensor of the base file that holds NaN or Inf."""
    with GGUFFile(base_path) as base:
        for tensor in base:
            flat = tensor.data.reshape(-1)
            if tensor.type_name in ("BF16", "F16"):
                mask = np.uint16(0x7F80 if tensor.type_name == "BF16" else 0x7C00)
                bits = flat.view(np.uint16)
                bad = any(((bits[a : a + _CHUNK] & mask) == mask).any() for a in range(0, bits.size, _CHUNK))
            else:
                bad = tensor.type_name == "F32" and not np.isfinite(flat.view(np.float32)).all()
            if bad:
                raise AthenaError(f"{base_path}: tensor {tensor.name} holds NaN or Inf; the model is damaged")


def standard_replacements(base_path: Path, plan: Plan) -> dict[str, Replacement]:
    """The tensors of `plan.standard`, quantized when they are written."""

    def make(name: str, kind: str) -> Replacement:
        def data() -> np.ndarray:
            with GGUFFile(base_path) as base:
                return quantize(base.tensors[name].to_float32(), kind)

        return Replacement(kind, data)

    kinds: Mapping[str, str] = plan.standard
    return {name: make(name, kind) for name, kind in kinds.items()}
