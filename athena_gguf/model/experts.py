"""The linear layers inside a mixture of experts, which transformers (from version 5) computes from stacked weights.

A module there holds `gate_up_proj` [experts, 2 * inner, hidden] and `down_proj` [experts, hidden, inner]; how it
multiplies with them is chosen by name from a table that takes further entries. Ours goes from expert to expert and
shows every product to whoever watches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NAME = "athena_watched"
_TENSORS = {  # of a block, and the part of a stacked weight's rows that each holds, in halves
    "ffn_gate_exps": ("gate_up_proj", 0, 1),
    "ffn_up_exps": ("gate_up_proj", 1, 2),
    "ffn_gate_up_exps": ("gate_up_proj", 0, 2),
    "ffn_down_exps": ("down_proj", 0, 2),
}

# Called before the products of a batch with its number of tokens, and then for every product: the name of the stacked
# weight, the expert, its input [tokens, columns] and output [tokens, rows].
Watcher = Callable[[int, "tuple[str, int, torch.Tensor, torch.Tensor] | None"], None]


@dataclass(frozen=True, eq=False)
class ExpertLayers:
    """The linear layers of all experts that one tensor of the base file holds: rows of a stacked weight of `owner`."""

    owner: Any
    parameter: str
    rows: slice

    @property
    def weight(self) -> torch.Tensor:
        """[experts, rows, columns], a view."""
        found: torch.Tensor = getattr(self.owner, self.parameter)[:, self.rows]
        return found


def expert_layers(module_name: str, module: Any, tensors: Container[str]) -> Iterator[tuple[str, ExpertLayers]]:
    """Those of a module, by tensor name; none if it is no such module, or of an unknown layout."""
    block = re.search(r"\.layers\.(\d+)\.", module_name)
    if block is None or not _is_known(module):
        return
    for name, (parameter, first, last) in _TENSORS.items():
        tensor = f"blk.{block[1]}.{name}.weight"
        if tensor in tensors:
            half = getattr(module, parameter).shape[1] // 2
            yield tensor, ExpertLayers(module, parameter, slice(first * half, last * half if last == 1 else None))


def _is_known(module: Any) -> bool:
    """Whether a module's experts are what `_forward` computes."""
    return (
        hasattr(module, "_apply_gate")
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not module.is_transposed
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
    )


@contextmanager
def watched(watchers: Mapping[Any, Iterable[Watcher]]) -> Iterator[None]:
    """The experts of the modules among the keys are computed one by one, and their products shown to the watchers."""
    if not watchers:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    before = {id(module.config): (module.config, module.config._experts_implementation) for module in watchers}
    try:
        for module, those in watchers.items():
            module.athena_watchers = list(those)
            module.config._experts_implementation = _NAME
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation = implementation
        for module in watchers:
            del module.athena_watchers


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Hidden states [tokens, hidden] through the experts that `top_k_index` [tokens, k] names, weighted and summed."""
    import torch

    watchers = getattr(self, "athena_watchers", ())
    for watch in watchers:
        watch(len(hidden_states), None)

    def product(parameter: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, getattr(self, parameter)[expert])
        for watch in watchers:
            watch(len(hidden_states), (parameter, expert, x, y))
        return y

    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        inner = self._apply_gate(product("gate_up_proj", expert, hidden_states[token]))
        y = product("down_proj", expert, inner) * top_k_weights[token, place, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out
