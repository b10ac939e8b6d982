"""Loads a model directory through transformers, from local files only and without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf.errors import AthenaError
from athena_gguf.memory import is_shortage
from athena_gguf.model.trust import runs_code

if TYPE_CHECKING:
    import torch


def check_model_dir(model_dir: Path) -> None:
    """Raises AthenaError unless `model_dir` is a directory with a config.json."""
    if not model_dir.is_dir():
        raise AthenaError(
            f"{model_dir}: no such folder; give a Hugging Face model: its folder, its name on the hub (org/name) or a "
            "GGUF file"
        )
    if not (model_dir / "config.json").is_file():
        raise AthenaError(f"{model_dir}: no config.json in it; give the folder of a Hugging Face model")


def load_model(model_dir: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal language model of a directory, frozen, in evaluation mode. Raises AthenaError naming the directory."""
    import transformers

    check_model_dir(model_dir)
    quiet_transformers()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, trust_remote_code=runs_code(), output_loading_info=True
        )
    except Exception as e:  # whatever a bad file makes transformers raise
        if is_shortage(e):
            raise
        raise AthenaError(f"{model_dir}: transformers cannot load this model: {_brief(e)}") from e
    model, found = loaded
    absent = sorted(found["missing_keys"])  # transformers would fill them with random numbers
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise AthenaError(f"{model_dir}: its files lack the tensor {absent[0]}{more}; download the model again")
    return model.to(device).eval().requires_grad_(False)


def quiet_transformers() -> None:
    """No warnings and no progress bars of its own."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a model directory. Raises AthenaError naming the directory."""
    import transformers

    check_model_dir(model_dir)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=runs_code()
        )
    except Exception as e:
        raise AthenaError(f"{model_dir}: transformers cannot load the tokenizer: {_brief(e)}") from e


def _brief(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
