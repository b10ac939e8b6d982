"""What a directory made by a stranger may hold: no code, no files from elsewhere, no sizes that it cannot fill."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from athena_gguf.errors import AthenaError

MODEL_FILES = (
    ".json",
    ".safetensors",
    ".bin",
    ".model",
    ".txt",
    ".jinja",
    ".tiktoken",
)  # by the converter or transformers
_LARGEST_JSON = {"config.json": 1 << 24, "generation_config.json": 1 << 24}
_LARGEST_INDEX = 1 << 28
_WEIGHTS_A_BYTE = 2  # at most, in any checkpoint: four bits a weight
_LARGEST_COUNT = 4096  # of layers, heads, experts and the like
_LARGEST_NUMBER = 1 << 32  # of anything else, such as positions

_code = ContextVar("code", default=False)


@contextmanager
def running_code(allowed: bool) -> Iterator[None]:
    """Inside, Python code that comes with a model is run if `allowed`: `--trust-remote-code`."""
    token = _code.set(allowed)
    try:
        yield
    finally:
        _code.reset(token)


def runs_code() -> bool:
    """Whether the user allowed it, which nobody else can."""
    return _code.get()


def check_model_files(model_dir: Path) -> None:
    """Raise AthenaError naming the first file of the directory that is no plain file, leads out of it, or is a broken
    config or shard index.

    Links are followed only within the directory and to where the Hugging Face cache keeps the files of its snapshots:
    a link to anything else would carry that into the converted file.
    """
    home = model_dir.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for path in sorted(p for p in model_dir.iterdir() if p.suffix in MODEL_FILES):
        if path.is_symlink():
            _check_link(path, allowed)
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise AthenaError(f"{path} is no regular file; download the model again")
    for path in sorted(model_dir.glob("*.index.json")):
        _check_index(path)
    for name, most in _LARGEST_JSON.items():
        if (model_dir / name).exists():
            read_json(model_dir / name, most)


def _check_link(path: Path, allowed: list[Path]) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AthenaError(f"{path} is a link to nothing; download the model again") from error
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise AthenaError(
            f"{path} is a link out of the model's folder, to {target}; put the file itself there if you trust it"
        )


def _check_index(path: Path) -> None:
    """Every shard that it names is a file beside it."""
    names = read_json(path, _LARGEST_INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise AthenaError(f"{path} has no weight_map; download it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise AthenaError(f"{path}: tensor {tensor} is said to be in {name!r}, which is no file beside it")
        if not (path.parent / name).is_file():
            raise AthenaError(f"{path.parent} lacks the file {name} that {path.name} names; download it")


def read_json(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes. Raises AthenaError naming the file."""
    try:
        if path.stat().st_size > most:
            raise AthenaError(f"{path} is larger than {most >> 20} MiB; that is no such file of a model")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AthenaError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise AthenaError(f"{path} is no JSON object; download it again")
    return found


def check_model_size(model_dir: Path) -> None:
    """Raise AthenaError if the config describes a model that its own code is needed for, or one that is larger than the
    weights beside it could be: memory for it would be asked for before anything notices that they are missing.

    A config that transformers does not know is left to whoever reads it next.
    """
    import torch
    import transformers

    raw = read_json(model_dir / "config.json", _LARGEST_JSON["config.json"])
    files = [p for p in model_dir.iterdir() if p.suffix in (".safetensors", ".bin") and p.is_file()]
    most = _WEIGHTS_A_BYTE * sum(p.stat().st_size for p in files)
    try:
        config = transformers.AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=runs_code()
        )
    except Exception as error:  # whatever a bad config makes transformers raise
        if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
            raise AthenaError(
                f"{model_dir}: transformers knows this model only by the Python code in its folder, which is not run; "
                "look at it, and give --trust-remote-code if it may be"
            ) from error
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        _check_numbers(model_dir, part, most)
    try:
        with torch.device("meta"):
            # float32: another type would be torch's default meanwhile, for other threads too
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=runs_code()
            )
    except Exception:  # no language model, or a config that does not fit together: the loader says so
        return
    count = sum(p.numel() for p in model.parameters())
    if count > most:
        raise AthenaError(
            f"{model_dir}: config.json describes {count:,} weights, more than its files can hold; download them again"
        )


def _check_numbers(model_dir: Path, config: Any, most: int) -> None:
    """Numbers that would take long, or much, before the weights can be counted."""
    for name, value in config.to_dict().items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        count = name.startswith(("num_", "n_"))
        if value > (_LARGEST_COUNT if count else max(most, _LARGEST_NUMBER)):
            raise AthenaError(f"{model_dir}: config.json has {name} {value:,}, more than its files can hold")
