"""Keeps transformers from executing Python code that comes with a model."""

from typing import Any


def forbid() -> None:
    """From now on this process raises ImportError where transformers would run a model's own Python code."""
    from transformers import dynamic_module_utils

    def refuse(class_name: Any, module_path: Any, **_: Any) -> Any:
        raise ImportError(f"{module_path} is Python code that came with the model, which is not run")

    # Every way to such code ends in this function, which its callers look up when they call it.
    dynamic_module_utils.get_class_in_module = refuse
