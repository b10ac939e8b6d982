"""Scales and norms of a quantized model, trained so that it predicts what the original model predicts.

Distillation on the model's own distribution, as LLM-QAT (Liu et al. 2023) does for all weights; only the scales of a
quantized model learn in PEQA (Kim et al. 2023). Symbols stay as they were encoded, so nothing grows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from athena_gguf.errors import AthenaError
from athena_gguf.format import AType, decode_rows

if TYPE_CHECKING:
    import torch

_ELEMENTS = 1 << 28  # logits of a part of a batch, at most, if that is a window or more: larger ones are no faster


@dataclass(frozen=True)
class TuneOptions:
    """`steps` of Adam on `batch` windows each; `scale_rate`, `norm_rate`: its first step sizes, of the logarithm of a
    scale and of a norm's weight; both warm up over a tenth of the steps and fall as a cosine. `held_out`: share of the
    windows that judge the result."""

    steps: int = 150
    batch: int = 32
    scale_rate: float = 4e-3
    norm_rate: float = 1e-3
    held_out: float = 0.05


@dataclass
class Tuned:
    """`data`: new bytes of A-type tensors; `norms`: what is to be added to norm weights; `before`, `after`: mean KL
    divergence (nats a token) on the held-out windows. Empty if it did not fall."""

    before: float
    after: float
    data: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    norms: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantized:
    """A matrix of the file. `kind` None: of a standard type, and `data` its decoded weights; else its bytes. `rows`:
    the original weights as the file has them, float32 [rows, columns]."""

    kind: AType | None
    data: npt.NDArray[Any]
    rows: npt.NDArray[np.float32]

    def decoded(self) -> npt.NDArray[np.float32]:
        """[rows, columns]"""
        if self.kind is None:
            return self.data
        return decode_rows(self.kind, self.data, self.rows.shape[1])


def tune(
    model: Any,
    matrices: Mapping[str, str],
    norms: Mapping[str, str],
    quantized: Callable[[str], Quantized | None],
    windows: torch.Tensor,
    options: TuneOptions,
    seed: int = 0,
    advance: Callable[[int], None] = lambda windows: None,
    at_once: int | None = None,
) -> Tuned:
    """Tune the scales and norms of a quantized `model` on `windows` [n, length] of token ids.

    `matrices`, `norms`: module name to tensor name, of linear layers and embeddings (of modules that share a weight
    only the embeddings), and of norms that may learn.
    `quantized` gives a tensor as the file has it, None if it is not quantized. `advance` is called with the windows
    done. `at_once`: windows that memory is enough for (`window_bytes`). Raises AthenaError if there are too few windows
    or the loss is not finite.
    """
    import torch

    from athena_gguf.tune.graph import gradients
    from athena_gguf.tune.student import ScaledLinear

    held = max(1, round(options.held_out * len(windows)))
    if len(windows) < 2 * held:
        raise AthenaError(f"tuning needs more than {len(windows)} windows of text; give more, or --no-tune")
    device = next(model.parameters()).device
    student = _student(model, matrices, quantized)
    scaled = {n: m for n, m in student.named_modules() if isinstance(m, ScaledLinear)}
    learning = {name: student.get_submodule(name).weight for name in norms}
    rates = ((options.scale_rate, [m.log_scale for m in scaled.values()]), (options.norm_rate, [*learning.values()]))
    groups: list[dict[str, Any]] = [{"params": p, "first": rate} for rate, p in rates if p]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    old_norms = {name: weight.detach().clone() for name, weight in learning.items()}
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    judges, pupils = windows[order[:held]], windows[order[held:]]
    most = max(1, _ELEMENTS // (windows.shape[1] * model.config.get_text_config().vocab_size))
    most = most if at_once is None else max(1, min(most, at_once))
    part = max(size for size in range(1, options.batch + 1) if size <= most and options.batch % size == 0)

    def mean_loss() -> float:
        with torch.no_grad():
            losses = [divergence(model, student, w.to(device)).mean(1) for w in judges.split(part)]
        return float(torch.cat(losses).mean())

    def loss_of(some: torch.Tensor) -> torch.Tensor:
        return divergence(model, student, some).mean(1).sum() / options.batch

    before = mean_loss()
    step_loss = gradients(loss_of, pupils[:1].repeat(part, 1).to(device), parameters)
    queue = torch.empty(0, dtype=torch.long)
    for step in range(options.steps):
        share = min(1.0, 10 * (step + 1) / options.steps) * (1 + math.cos(math.pi * step / options.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = share * group["first"]
        while len(queue) < options.batch:
            queue = torch.cat([queue, torch.randperm(len(pupils), generator=generator)])
        batch, queue = pupils[queue[: options.batch]], queue[options.batch :]
        loss = torch.zeros((), device=device)
        for some in batch.split(part):
            loss += step_loss(some.to(device))
            advance(len(some))
        if not torch.isfinite(loss):
            raise AthenaError("tuning: the loss is not finite; try --no-tune")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    after = mean_loss()
    if not after < before:
        return Tuned(before, before)
    moved = {norms[n]: (w.detach() - old_norms[n]).float().cpu().numpy() for n, w in learning.items()}
    return Tuned(before, after, {matrices[n]: m.data() for n, m in scaled.items()}, moved)


def window_bytes(length: int, vocabulary: int, blocks: int, hidden: int, inner: int) -> int:
    """Memory of a GPU that a window takes while it is learned from, about; 13 GiB for 8 windows of 512 tokens of
    SmolLM2-135M were measured. `inner`: columns of the widest layer input."""
    return length * (32 * vocabulary + blocks * (60 * hidden + 24 * inner))


def _student(model: Any, matrices: Mapping[str, str], quantized: Callable[[str], Quantized | None]) -> Any:
    """A copy of the model with quantized weights, nothing in it learning yet."""
    import torch

    from athena_gguf.model.rows import rows_in_file
    from athena_gguf.tune.student import ScaledLinear

    student = copy.deepcopy(model)
    for name, tensor_name in matrices.items():
        tensor = quantized(tensor_name)
        if tensor is None:
            continue
        module = student.get_submodule(name)
        weight = module.weight.detach()
        places = rows_in_file(torch.from_numpy(tensor.rows).to(weight.device), weight.float())
        if places is None:
            raise AthenaError(f"tuning: {tensor_name} holds other rows than the model; use --no-tune")
        order = places.cpu().numpy()
        if tensor.kind is None or not isinstance(module, torch.nn.Linear):
            weight.copy_(torch.from_numpy(tensor.decoded()[order]))
        else:
            new = ScaledLinear(tensor.kind, tensor.data, order, module.bias).to(weight.device)
            parent, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(parent), leaf, new)
    return student.requires_grad_(False)


def divergence(teacher: Any, student: Any, windows: torch.Tensor) -> torch.Tensor:
    """KL divergence of the student's predictions from the teacher's, [windows, length]."""
    import torch

    with torch.no_grad():
        wanted = teacher(input_ids=windows, use_cache=False).logits.float().log_softmax(-1)
    found = student(input_ids=windows, use_cache=False).logits.float().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)
