"""Runs a Python script while transformers is kept from executing code that comes with a model:

    python -m athena_gguf.model.no_code SCRIPT ARGUMENT ...

llama.cpp's converter loads some tokenizers with `trust_remote_code=True`.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def forbid() -> None:
    """From now on this process raises ImportError where transformers would run a model's own Python code."""
    from transformers import dynamic_module_utils

    def refuse(class_name: Any, module_path: Any, **_: Any) -> Any:
        raise ImportError(f"{module_path} is Python code that came with the model, which is not run")

    # Every way to such code ends in this function, which its callers look up when they call it.
    dynamic_module_utils.get_class_in_module = refuse


def main() -> None:
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)
    forbid()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
