"""Curvature of the loss at the inputs of linear layers, from one forward and one backward pass over calibration tokens.

For a layer input x_t with gradients g_t of the summed token loss at the outputs of the layers that read it,

    H = sum_t u_t x_t x_t^T / sum_t u_t,    u_t = |g_t|

The second-order choice would be u_t = |g_t|^2 (a Kronecker factor of the Fisher matrix, Martens and Grosse 2015;
GuidedQuant, Kim et al. 2025, groups it by output channel), which is so heavy-tailed that H can rest on a handful of
tokens; the square root tempers it (docs/method.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError
from athena_gguf.gpu import mixed
from athena_gguf.model import LinearLayer
from athena_gguf.model.experts import ExpertLayers, Watcher, watched

if TYPE_CHECKING:
    import torch


# A token's |g_t| counts in `gradient_squares` up to this many times the mean of its batch. The few attention sinks
# beyond it own the mean of squares of value layers, but encoding puts next to no error on their few, large inputs.
# Of the rows that embeddings give, one in a hundred tokens owns almost half of the sum.
_CAP = 10.0
_PART = 1 << 26  # numbers of a gradient looked at in one go

# Gives u_t of tokens from |g_t|^2 [tokens]; the tuple names the tensors that read the input.
Weigh = Callable[[tuple[str, ...], "torch.Tensor"], "torch.Tensor"]


def tempered(names: tuple[str, ...], squares: torch.Tensor) -> torch.Tensor:
    """u_t = |g_t|"""
    return squares.sqrt()


@dataclass
class LayerInput:
    """What is known of a layer input beside its curvature."""

    tokens: int
    effective_tokens: float  # (sum u)^2 / sum u^2
    tensor_names: tuple[str, ...]  # that read this input
    # Of each of them, at its own output: mean over tokens of |g_t|^2, capped, where an output counts by the power of
    # its row of weights. Errors are about in proportion to it; the likely tokens of an output layer have small rows.
    gradient_squares: tuple[float, ...]
    columns: int
    mean_diagonal: float  # of the curvature
    unreached: int = 0  # experts that no token was sent to; those of the input have a curvature each
    shares: tuple[float, ...] = ()  # of a block's experts: what each adds to `gradient_squares`, in parts of 1


@dataclass
class Curvature:
    """Of one layer input. `matrix` [columns, columns] float32, normalized by the sum of the token weights u; of the
    inputs of a block's experts [experts, columns, columns]."""

    matrix: torch.Tensor
    about: LayerInput
    weights: torch.Tensor | None = None  # u of all tokens, window by window, where they were asked for


@dataclass
class Lookup:
    """Of the rows that the token embeddings give. `power`: mean over tokens of |g_t|^2 |y_t|^2, capped as
    `gradient_squares`, y_t the row as the model uses it and g_t the gradient of the token loss there; None until it is
    measured."""

    power: float | None = None


@dataclass
class Sums:
    """What the batches of one device came to. Of every input, of experts of each one's: `names` of the tensors that
    read it, the numbers of `_TOTALS`, the `tokens` and, where they are kept, their `weights` u; `expert_tokens`: of
    each of a block's stacked weights."""

    names: list[tuple[str, ...]]
    totals: list[list[torch.Tensor]]
    tokens: list[int]
    weights: list[torch.Tensor | None]
    expert_tokens: list[int]


_TOTALS = ("sum_xx", "sum_u", "sum_uu", "sum_squares")


class _Input:
    """Collects one layer input and the squared gradient norms of its readers over a batch, then adds to the sums."""

    def __init__(self, layers: Sequence[LinearLayer], matrix: torch.Tensor, weigh: Weigh, weights_of: int = 0) -> None:
        """`matrix` [columns, columns]: zeros, where the sum goes. `weights_of`: tokens whose u is kept."""
        import torch

        device = matrix.device
        self.names = tuple(layer.tensor_name for layer in layers)
        self.readers = len(layers)
        sizes = [torch.linalg.vector_norm(layer.module.weight, dim=1, dtype=torch.float32) for layer in layers]
        self.row_sizes = [size / size.square().mean().sqrt() for size in sizes]
        self.sum_xx, self.weigh = matrix, weigh
        self.sum_u = torch.zeros((), dtype=torch.float64, device=device)
        self.sum_uu = torch.zeros((), dtype=torch.float64, device=device)
        self.sum_squares = torch.zeros(self.readers, dtype=torch.float64, device=device)
        self.tokens = 0
        # Made once: small tensors that stay, between large ones that come and go, would tear the heap to pieces.
        self.weights = torch.empty(weights_of, device=device) if weights_of else None
        self.clear()

    def clear(self) -> None:
        self.x: Any = None
        self.norms: Any = None
        self.arrived = 0

    def gradient(self, reader: int, g: torch.Tensor) -> None:
        import torch

        # A norm makes no copy of the gradient, which at the output is as large as the logits.
        squares = torch.linalg.vector_norm(g.detach(), dim=-1, dtype=torch.float32).square().reshape(-1)
        # In parts, for the same reason.
        parts = g.detach().flatten(0, -2).split(max(1, _PART // g.shape[-1]))
        weighted = [torch.linalg.vector_norm(part.float() * self.row_sizes[reader], dim=-1) for part in parts]
        norms = torch.cat(weighted)
        self.sum_squares[reader] += norms.minimum(_CAP * norms.mean()).double().square().sum()
        self.norms = squares if self.norms is None else self.norms + squares
        self.arrived += 1
        if self.arrived == self.readers:
            self.add()

    def add(self) -> None:
        u = self.weigh(self.names, self.norms)
        add_products(self.sum_xx, self.x.reshape(-1, self.x.shape[-1]).float() * u.sqrt()[:, None])
        if self.weights is not None:
            self.weights[self.tokens : self.tokens + u.numel()] = u
        self.sum_u += u.double().sum()
        self.sum_uu += u.double().square().sum()
        self.tokens += u.numel()
        self.clear()


def add_products(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """To `total` [rows, columns], the sum over tokens of x_t y_t^T, `x` [tokens, rows] and `y` [tokens, columns] in
    float32; without `y` of x_t x_t^T.

    On a GPU both are rounded to bfloat16, the products are added up in float32. That is the sum for inputs that are off
    by up to 1/256 of themselves: of x_t x_t^T a positive semidefinite matrix, whose errors are far below the damping.
    """
    import torch

    if mixed(x.device):
        x, y = x.bfloat16(), None if y is None else y.bfloat16()
        torch.addmm(total, x.T, x if y is None else y, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(x.T, x if y is None else y)


class _ExpertInputs:
    """The inputs of one of the stacked weights of a mixture of experts: those that each expert was sent."""

    def __init__(self, layers: Sequence[LinearLayer], weigh: Weigh) -> None:
        import torch

        first = layers[0].module
        self.layers, self.parameter = layers, first.parameter
        self.names = tuple(layer.tensor_name for layer in layers)
        experts, _, columns = first.weight.shape
        self.matrices = torch.zeros(experts, columns, columns, device=first.weight.device)
        self.parts = []
        for expert in range(experts):
            those = [replace(layer, module=SimpleNamespace(weight=layer.module.weight[expert])) for layer in layers]
            self.parts.append(_Input(those, self.matrices[expert], weigh))
        self.tokens = 0
        self.clear()

    def clear(self) -> None:
        self.x: Any = None
        for part in self.parts:
            part.clear()

    def watch(self, tokens: int, product: tuple[str, int, torch.Tensor, torch.Tensor] | None) -> None:
        if product is None:
            self.tokens += tokens
        elif product[0] == self.parameter and product[3].requires_grad:
            _, expert, x, y = product
            self.x = x.detach()
            self.parts[expert].x = self.x
            y.register_hook(partial(self.gradient, expert))

    def gradient(self, expert: int, g: torch.Tensor) -> None:
        for reader, layer in enumerate(self.layers):
            self.parts[expert].gradient(reader, g[..., layer.module.rows])

    def finish(self) -> Curvature:
        """An expert that no token was sent to gets the curvature of all inputs of the others, if they share their
        columns; inner columns have nothing to do with each other, so there it gets the identity."""
        import torch

        totals = torch.stack([part.sum_u for part in self.parts])
        whole, reached = float(totals.sum()), totals > 0
        if whole == 0:
            raise _no_gradient(self.names[0])
        if not bool(reached.all()):
            pooled = self.matrices.sum(0) / whole
            if self.parameter == "down_proj":
                pooled = torch.eye(len(pooled), device=pooled.device) * pooled.diagonal().mean()
            self.matrices[~reached] = pooled
        self.matrices[reached] /= totals[reached, None, None].float()
        squares = torch.stack([part.sum_squares for part in self.parts]) / self.tokens
        effective = [float(part.sum_u) ** 2 / float(part.sum_uu) for part in self.parts if float(part.sum_uu)]
        return _checked(
            self.matrices,
            self.names,
            tokens=self.tokens,
            effective_tokens=sum(effective) / len(effective),
            gradient_squares=tuple(squares.sum(0).tolist()),
            shares=tuple((squares.sum(1) / squares.sum()).tolist()),
            unreached=int((~reached).sum()),
        )


class Collector:
    """Sums up the curvatures of the inputs of `layers` while it is entered and batches run forward and backward.

    Layers that read the same tensor share one curvature. `probe` runs a few tokens through the layers without
    gradients; those that do not run in it, or several times, get no curvature. `weights_of`: so many tokens run, whose
    weights u the curvatures have, but for experts' inputs; 0 for none.
    """

    def __init__(
        self,
        layers: Sequence[LinearLayer],
        probe: Callable[[], object],
        weigh: Weigh = tempered,
        weights_of: int = 0,
    ) -> None:
        single = [layer for layer in layers if not isinstance(layer.module, ExpertLayers)]
        self.inputs = _group(single, probe, weigh, weights_of)
        experts: dict[tuple[int, str], list[LinearLayer]] = {}
        for layer in layers:
            if isinstance(layer.module, ExpertLayers):
                experts.setdefault((id(layer.module.owner), layer.module.parameter), []).append(layer)
        self.experts = [_ExpertInputs(found, weigh) for found in experts.values()]
        self.by_module = {id(layer.module): (group, i) for group, found in self.inputs for i, layer in enumerate(found)}
        self.exits = ExitStack()

    def __enter__(self) -> Collector:
        watchers: dict[Any, list[Watcher]] = {}
        for group in self.experts:
            watchers.setdefault(group.layers[0].module.owner, []).append(group.watch)
        self.exits.enter_context(watched(watchers))
        members = [layer for _, found in self.inputs for layer in found]
        for layer in members:
            self.exits.callback(layer.module.register_forward_hook(self._watch).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.exits.close()

    def _watch(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            group, reader = self.by_module[id(module)]
            group.x = args[0].detach()
            output.register_hook(partial(group.gradient, reader))

    def clear(self) -> None:
        """Before every batch."""
        for group in self._all():
            group.clear()

    def _all(self) -> list[_Input | _ExpertInputs]:
        return [*(group for group, _ in self.inputs), *self.experts]

    def not_finite(self) -> str | None:
        """A tensor that the batch gave an input with NaN or Inf."""
        import torch

        seen = (group for group in self._all() if group.x is not None)
        return next((group.names[0] for group in seen if not torch.isfinite(group.x).all()), None)

    def sums(self) -> Sums:
        parts = self._parts()
        return Sums(
            [part.names for part in parts],
            [[getattr(part, total) for total in _TOTALS] for part in parts],
            [part.tokens for part in parts],
            [part.weights for part in parts],
            [group.tokens for group in self.experts],
        )

    def add(self, other: Collector | Sums) -> None:
        """Of the same layers in a copy of the model on another device, for the windows after those so far."""
        import torch

        other = other.sums() if isinstance(other, Collector) else other
        parts = self._parts()
        assert [part.names for part in parts] == other.names
        for part, totals, tokens, weights in zip(parts, other.totals, other.tokens, other.weights, strict=True):
            for name, theirs in zip(_TOTALS, totals, strict=True):
                ours = getattr(part, name)
                ours += theirs.to(ours.device)
            part.tokens += tokens
            if part.weights is not None and weights is not None:
                part.weights = torch.cat([part.weights, weights.to(part.weights.device)])
        for group, tokens in zip(self.experts, other.expert_tokens, strict=True):
            group.tokens += tokens

    def _parts(self) -> list[_Input]:
        return [*(group for group, _ in self.inputs), *(part for group in self.experts for part in group.parts)]

    def finish(self) -> list[Curvature]:
        """Raises AthenaError naming the tensor if a curvature is not finite or there was no gradient."""
        found = [_finish(group) for group, _ in self.inputs]
        self.inputs = []
        while self.experts:
            found.append(self.experts.pop(0).finish())
        return found


def measure_curvature(
    model: Any,
    layers: Sequence[LinearLayer],
    windows: Any,
    batch_windows: int,
    labels: str = "text",
    seed: int = 0,
    advance: Callable[[float], None] = lambda tokens: None,
    lookup: Lookup | None = None,
    weigh: Weigh = tempered,
    with_weights: bool = False,
) -> list[Curvature]:
    """Curvatures of the inputs of `layers`, over `windows` [windows, length] of token ids; `lookup` is filled in too.

    `labels`: "text" takes the next token of the window as the label of the loss, "sampled" draws it from the model's
    own prediction. `advance` is called with the tokens done; `weigh` gives the u_t of a batch's tokens, window by
    window; `with_weights`: the curvatures have them. Raises AthenaError naming the tensor if a curvature is not finite.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    probe = windows[:1, :8].to(device)
    collector = Collector(
        layers, lambda: model(input_ids=probe, use_cache=False), weigh, windows.numel() if with_weights else 0
    )
    rows = RowPower(device)
    handle = require_gradients(model, rows)
    try:
        with collector:
            for start in range(0, len(windows), batch_windows):
                batch = windows[start : start + batch_windows].to(device)
                collector.clear()
                logits = model(input_ids=batch, use_cache=False).logits
                try:
                    loss(logits, batch, labels, generator).backward()
                except FloatingPointError as error:
                    raise not_finite(collector) from error
                advance(batch.numel())
    finally:
        handle.remove()
    if lookup is not None:
        lookup.power = float(rows.sum) / windows.numel()
    return collector.finish()


def not_finite(collector: Collector | None) -> AthenaError:
    name = (collector.not_finite() if collector else None) or "the output"
    return AthenaError(f"{name}: NaN or Inf in the activations; check the model's weights")


def _finish(group: _Input) -> Curvature:
    total = float(group.sum_u)
    if total == 0:
        raise _no_gradient(group.names[0])
    found = _checked(
        group.sum_xx.div_(total),
        group.names,
        tokens=group.tokens,
        effective_tokens=total**2 / float(group.sum_uu),
        gradient_squares=tuple((group.sum_squares / group.tokens).tolist()),
    )
    return replace(found, weights=None if group.weights is None else group.weights.cpu())


def _no_gradient(name: str) -> AthenaError:
    return AthenaError(f"{name}: the loss has no gradient here; give other calibration text")


def _checked(matrix: torch.Tensor, names: tuple[str, ...], **about: Any) -> Curvature:
    """The curvature of an input. Raises AthenaError naming the tensor if it is not finite."""
    import torch

    mean_diagonal = float(matrix.diagonal(dim1=-2, dim2=-1).mean())
    if not math.isfinite(mean_diagonal) or not torch.isfinite(matrix).all():
        raise AthenaError(
            f"{names[0]}: the curvature is not finite (NaN or Inf in the activations or gradients); "
            "check the model's weights, or calibrate in float32 with --device cpu"
        )
    return Curvature(
        matrix, LayerInput(tensor_names=names, columns=matrix.shape[-1], mean_diagonal=mean_diagonal, **about)
    )


def loss(logits: torch.Tensor, tokens: torch.Tensor, labels: str, generator: Any) -> torch.Tensor:
    """Summed cross entropy of the predictions `logits` [windows, length, vocabulary] of `tokens`; raises
    FloatingPointError if there is NaN or Inf in them."""
    import torch

    flat = logits[:, :-1].float().flatten(0, 1)
    if not torch.isfinite(flat).all():
        raise FloatingPointError
    if labels == "sampled":
        with torch.no_grad():
            target = torch.multinomial(flat.softmax(-1), 1, generator=generator)[:, 0]
    else:
        target = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(flat, target, reduction="sum")


class RowPower:
    """Sums |g_t|^2 |y_t|^2 over the rows y_t that the embeddings give, each as far as the cap of its batch."""

    def __init__(self, device: Any) -> None:
        import torch

        self.sum = torch.zeros((), dtype=torch.float64, device=device)

    def gradient(self, y: torch.Tensor, g: torch.Tensor) -> None:
        found = g.detach().float().square().sum(-1) * y.float().square().sum(-1)
        self.sum += found.minimum(_CAP * found.mean()).double().sum()


def require_gradients(model: Any, rows: RowPower) -> Any:
    """Weights are frozen, so gradients start at the embeddings: no weight gradient is ever computed."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output.requires_grad_(True).register_hook(partial(rows.gradient, output.detach()))
        return output

    return model.get_input_embeddings().register_forward_hook(hook)


def _group(
    layers: Sequence[LinearLayer], probe: Callable[[], object], weigh: Weigh, weights_of: int
) -> list[tuple[_Input, list[LinearLayer]]]:
    """Layers that read the same tensor, found by running a few tokens; without those that run more than once."""
    import torch

    seen: dict[tuple[int, Any], tuple[Any, list[LinearLayer]]] = {}
    runs: Counter[str] = Counter()
    handles = []
    for layer in layers:

        def watch(module: Any, args: tuple[Any, ...], layer: LinearLayer = layer) -> None:
            runs[layer.module_name] += 1
            # The tensor is kept alive, so no other one can be given its address.
            seen.setdefault((args[0].data_ptr(), args[0].shape), (args[0], []))[1].append(layer)

        handles.append(layer.module.register_forward_pre_hook(watch))
    try:
        with torch.no_grad():
            probe()
    finally:
        for handle in handles:
            handle.remove()
    groups = [(x, [m for m in members if runs[m.module_name] == 1]) for x, members in seen.values()]
    return [
        (_Input(members, torch.zeros(x.shape[-1], x.shape[-1], device=x.device), weigh, weights_of), members)
        for x, members in groups
        if members
    ]
