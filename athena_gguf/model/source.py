"""What a user may name as a model: a folder, a hub id, a GGUF file; and the folder that comes of it."""

from __future__ import annotations

import re
from pathlib import Path

from athena_gguf import progress
from athena_gguf.errors import AthenaError

# Of a model's repository, what transformers and llama.cpp's converter read; nothing in its sub-folders.
_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md", "LICENSE*"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["pytorch_model*.bin"]  # only where there is nothing else
_LEFT_OUT = ["*/*", "consolidated*"]


def is_hub_id(model: Path | str) -> bool:
    """Whether this is `org/name` or `org/name@revision`, and no folder or file of that name is here."""
    text = str(model)
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", text) is not None
        and not text.endswith(".gguf")
        and not Path(text).exists()
        and not Path(text).parent.is_dir()
    )


def local_model(model: Path | str, code: bool = False) -> Path:
    """The folder or GGUF file of a model; a hub id is fetched into the usual cache, the needed files only.

    `code`: fetch its Python files too. The variables of huggingface_hub count (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN,
    HF_ENDPOINT). Raises AthenaError if the hub does not have it or cannot be reached.
    """
    if not is_hub_id(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    name, _, revision = str(model).partition("@")
    disable_progress_bars()

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=_LEFT_OUT)
        )

    try:
        with progress.stage(f"Files of {model} from the hub"):
            folder = fetch([*_FILES, *_WEIGHTS, *(["*.py"] if code else [])])
            if not any(folder.glob(_WEIGHTS[0])):
                folder = fetch(_PICKLES)
    except Exception as error:  # of the hub's client, of HTTP, of the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AthenaError(
            f"{model}: no such folder here, and the hub's files cannot be had: {reason}; check name and network "
            "(and HF_HUB_OFFLINE), `hf auth login` for a gated model, or give a folder"
        ) from error
    return folder


def model_files(model: Path | str) -> list[Path]:
    """The files that a model on this machine has, which no result may replace: the GGUF file, or what is in its folder
    but for GGUF files, which may be earlier results."""
    found = cached_model(model)
    if found is None:
        return []
    if found.is_file():
        return [found]
    return [path for path in found.glob("*") if path.suffix.lower() != ".gguf" and path.is_file()]


def cached_model(model: Path | str) -> Path | None:
    """The folder or file of a model if it is on this machine already, else None."""
    if not is_hub_id(model):
        path = Path(model)
        return path if path.exists() else None
    from huggingface_hub import snapshot_download

    name, _, revision = str(model).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except Exception:  # none of it is here
        return None
