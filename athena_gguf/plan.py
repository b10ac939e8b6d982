"""Which tensor of the base file becomes what."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.format import GROUP, TYPES
from athena_gguf.gguf_file import GGUFFile, Tensor
from athena_gguf.gguf_file.types import row_bytes
from athena_gguf.memory import cores

if TYPE_CHECKING:
    from athena_gguf.model import LinearLayer

EMBEDDINGS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
_BLOCK = 32  # columns of a block of Q8_0 and of every other standard type that is no float
_COLUMNS = 8  # of every tensor, compared with the model's
_CHUNK = 1 << 18  # elements looked at in one go: they stay in a core's cache


@dataclass
class Plan:
    """`encoded`: tensors that become A types, name to type; `standard`: those that become a standard type; all others
    stay as they are. `shapes`, `stored`: shape and type of every matrix in the base file. `fitting`: those that can be
    A types, `curved`: those of them whose curvature is measured. `free`: tensors whose type is still to be chosen for
    a target; the one that they have until then means nothing. `experts_used`: by a token, of those of a
    block; None if the file does not say."""

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str]
    encoded: dict[str, str] = field(default_factory=dict)
    standard: dict[str, str] = field(default_factory=dict)
    fitting: set[str] = field(default_factory=set)
    curved: set[str] = field(default_factory=set)
    free: set[str] = field(default_factory=set)
    experts_used: int | None = None

    def elements(self, name: str) -> int:
        return int(np.prod(self.shapes[name]))

    def keep_standard(self, name: str, reason: str) -> None:
        """No A type for this tensor; says so if it was to have one."""
        self.fitting.discard(name)
        self.curved.discard(name)
        if self.encoded.pop(name, None) is None:
            return
        kind = "Q8_0" if self.shapes[name][-1] % _BLOCK == 0 else "F16"
        self.standard[name] = kind
        what = "cannot be an A type" if name in self.free else f"becomes {kind}"
        progress.note(f"warning: {name} {list(self.shapes[name])} {what}: {reason}")

    def set_type(self, name: str, kind: str) -> None:
        self.free.discard(name)
        self.encoded.pop(name, None)
        self.standard.pop(name, None)
        if kind in TYPES:
            self.encoded[name] = kind
        elif kind != self.stored[name]:
            self.standard[name] = kind

    def kind(self, name: str) -> str:
        """The type that a matrix gets."""
        return self.encoded.get(name) or self.standard.get(name) or self.stored[name]


def make_plan(base: GGUFFile, type_name: str | None, embedding_type: str | None) -> Plan:
    """Linear layers get `type_name`, embeddings and output `embedding_type`; what cannot be encoded a standard type.
    With None for one of them, its tensors are free. Needs no more than the header of the base file.

    Only what llama.cpp's converter wrote as BF16 or F16 is touched: norms, biases, routers and the like are F32.
    """
    metadata = base.metadata
    architecture = str(metadata.get("general.architecture", ""))
    if metadata.get("split.count") not in (None, 0, 1):
        raise AthenaError(f"{base.path} is one part of a split file; join them with llama-gguf-split --merge first")
    matrices = [t for t in base if len(t.shape) > 1 and t.type_name in ("BF16", "F16")]
    big, stored = {t.name: t.shape for t in matrices}, {t.name: t.type_name for t in matrices}
    if not big:
        raise AthenaError(f"{base.path}: no BF16 or F16 matrix in it; give a base file made by `athena-gguf base`")
    used = metadata.get(f"{architecture}.expert_used_count")
    plan = Plan(architecture, big, stored, experts_used=used if isinstance(used, int) and used > 0 else None)
    for name, shape in big.items():
        wanted = embedding_type if name in EMBEDDINGS else type_name
        kind = wanted or "A3"
        if wanted is None:
            plan.free.add(name)
        if kind in TYPES:
            plan.encoded[name] = kind
        elif shape[-1] % _BLOCK and kind not in ("F32", "F16", "BF16"):
            plan.encoded[name] = kind
            plan.keep_standard(name, f"its rows are no multiple of {_BLOCK}, as {kind} needs")
            continue
        else:
            plan.standard[name] = kind
        plan.fitting.add(name)
        plan.curved.add(name)
        if shape[-1] % GROUP:
            plan.keep_standard(name, f"its row width is no multiple of {GROUP}")
        elif lookup_only(name, big):
            plan.curved.discard(name)  # its rows have no input to weight columns by
    return plan


def lookup_only(name: str, matrices: Container[str]) -> bool:
    """Whether a tensor's rows are only looked up, and never multiplied with an input."""
    return (name == "token_embd.weight" and "output.weight" in matrices) or name == "per_layer_token_embd.weight"


def block_of(name: str) -> tuple[int, str] | None:
    """The number of the block that a tensor belongs to, and what it is there (`attn_q` of `blk.3.attn_q.weight`); None
    if it belongs to none."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+?)(?:\.weight)?", name)
    return (int(match[1]), match[2]) if match else None


def weight_count(model_dir: Path) -> int:
    """Numbers in the safetensors files of a model directory, from their headers."""
    from safetensors import safe_open

    from athena_gguf.model.checkpoint import weight_files

    count = 0
    for path in weight_files(model_dir):
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def file_type(plan: Plan) -> int:
    """`general.file_type`: that of the A type with most weights, or of the type with most where there is no A type."""
    import gguf

    weights: Counter[str] = Counter()
    for name in plan.encoded or plan.shapes:
        weights[plan.kind(name)] += plan.elements(name)
    kind = max(weights, key=lambda k: (weights[k], k))
    if kind in TYPES:
        return TYPES[kind].file_type
    return int(gguf.LlamaFileType[f"ALL_{kind}" if kind == "F32" else f"MOSTLY_{kind}"])


def predicted_bytes(base_path: Path, plan: Plan) -> int:
    """About the size of the result."""
    kinds = plan.standard | plan.encoded
    with GGUFFile(base_path) as base:
        return base.n_bytes + sum(
            base.tensors[name].n_elements // base.tensors[name].columns * row_bytes(kind, base.tensors[name].columns)
            - base.tensors[name].n_bytes
            for name, kind in kinds.items()
        )


def other_weights(
    base_path: Path, model: Any, architecture: str, columns: Callable[[LinearLayer, list[int]], Any]
) -> dict[str, str]:
    """The matrices of the base file whose shape or weights are not those of the model's linear layer, and what differs.

    Looks at a few columns only, which `columns` gives, and at them sorted, since the base file may permute rows. One
    that permutes columns (as llama.cpp's converter does for some linear attention layers) shows here too.
    """
    import torch

    from athena_gguf.model.linear import named_layers

    found = {}
    with GGUFFile(base_path) as base:
        for layer in named_layers(model, architecture, base.tensors):
            tensor, weight = base.tensors[layer.tensor_name], layer.module.weight
            if tensor.shape != tuple(weight.shape):
                found[tensor.name] = f"is {list(tensor.shape)}, but the model has {list(weight.shape)}"
            elif tensor.type_name in ("BF16", "F16"):
                few = np.linspace(0, tensor.columns - 1, _COLUMNS).astype(int)
                kind = torch.bfloat16 if tensor.type_name == "BF16" else torch.float16
                ours = torch.from_numpy(tensor.data.view(np.int16)[..., few]).view(kind).float()
                theirs = columns(layer, few.tolist()).detach().float().cpu()
                one, other = (np.sort(x.mT.contiguous().numpy()) for x in (ours, theirs))  # faster than torch's sort
                if not np.allclose(one, other, rtol=2**-8, atol=2**-24):
                    found[tensor.name] = "holds other weights than the model"
    return found


def check_finite(base_path: Path) -> None:
    """Raises AthenaError naming the first tensor of the base file that holds NaN or Inf."""
    with GGUFFile(base_path) as base, ThreadPoolExecutor(cores()) as threads:
        for tensor, finite in zip(base, threads.map(_is_finite, base), strict=True):
            if not finite:
                threads.shutdown(cancel_futures=True)
                raise AthenaError(f"{base_path}: tensor {tensor.name} holds NaN or Inf; the model is damaged")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all of its weights are, as far as its type is one that can say otherwise."""
    flat = tensor.data.reshape(-1)
    if tensor.type_name in ("BF16", "F16"):
        mask = np.uint16(0x7F80 if tensor.type_name == "BF16" else 0x7C00)
        bits = flat.view(np.uint16)
        return not any(((bits[a : a + _CHUNK] & mask) == mask).any() for a in range(0, bits.size, _CHUNK))
    return tensor.type_name != "F32" or bool(np.isfinite(flat.view(np.float32)).all())
