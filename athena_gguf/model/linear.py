"""Linear layers of a Hugging Face model and the GGUF tensors they become."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError
from athena_gguf.model.experts import ExpertLayers, expert_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose weight is one tensor of the base file. The base file may order the weight's rows
    otherwise than the module (llama.cpp permutes q and k); columns, and so the curvature, agree. Of a block's experts
    `module` is an ExpertLayers, and `module_name` that of the module that holds them all."""

    module_name: str
    tensor_name: str
    module: Any

    @property
    def torch_module(self) -> Any:
        return self.module.owner if isinstance(self.module, ExpertLayers) else self.module

    @property
    def parameter_name(self) -> str:
        """Of the parameter that the weight is, or is some rows of."""
        own = self.module.parameter if isinstance(self.module, ExpertLayers) else "weight"
        return f"{self.module_name}.{own}"

    def rows_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The layer's rows of that parameter [..., rows, columns]."""
        return parameter[:, self.module.rows] if isinstance(self.module, ExpertLayers) else parameter

    def of(self, model: Any) -> LinearLayer:
        """The same layer of a copy of the model; with None, of no model, to be sent to another process."""
        found = None if model is None else model.get_submodule(self.module_name)
        return replace(
            self, module=replace(self.module, owner=found) if isinstance(self.module, ExpertLayers) else found
        )


def linear_layers(model: Any, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> list[LinearLayer]:
    """The linear layers of `model` that feed a tensor of the base file, all experts of a block as one.

    `architecture`: `general.architecture` of the base file; `shapes`: its tensors' shapes, [rows, columns] or [experts,
    rows, columns].
    A module with no tensor of its name and shape is left out. Raises AthenaError if gguf does not know the
    architecture.
    """
    return [
        layer
        for layer in named_layers(model, architecture, shapes)
        if shapes[layer.tensor_name] == tuple(layer.module.weight.shape)
    ]


def named_layers(model: Any, architecture: str, tensors: Container[str]) -> list[LinearLayer]:
    """The linear layers of `model` with a tensor of their name in the base file, whatever its shape."""
    import torch

    name_of = tensor_namer(model, architecture)
    found = []
    head = model.get_output_embeddings()
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            experts = expert_layers(module_name, module, tensors)
            found += [LinearLayer(module_name, name, layers) for name, layers in experts]
            continue
        tensor_name = name_of(module_name)
        if module is head and tensor_name is None:
            tensor_name = "output.weight"  # unknown to gguf where the embeddings are always used for it
        if tensor_name == "output.weight" and tensor_name not in tensors:
            tensor_name = "token_embd.weight"  # tied: the base file holds one tensor for both
        if tensor_name is not None and tensor_name in tensors:
            found.append(LinearLayer(module_name, tensor_name, module))
    return found


def tensor_namer(model: Any, architecture: str) -> Callable[[str], str | None]:
    """What names the tensor of a module's weight, None if gguf knows none. Raises AthenaError for an architecture that
    gguf does not know."""
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in by_name:
        raise AthenaError(f"architecture {architecture!r} is unknown to the installed gguf package; update it")
    names = gguf.get_tensor_name_map(by_name[architecture], model.config.get_text_config().num_hidden_layers)

    def name_of(module_name: str) -> str | None:
        # llama.cpp's converter drops this part of the names of models that also see or hear.
        name = module_name.replace("language_model.", "")
        found: str | None = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        return found

    return name_of
