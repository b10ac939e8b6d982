"""A GGUF file of any type as a model: a BF16 base file of its weights, and the Hugging Face folder beside it."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from athena_gguf import __version__, progress
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.reader import GGUFFile, Tensor

GGUF_BASE = "from-gguf.gguf"  # in the work directory
_FLOATS = ("F32", "F16", "BF16")
_GEMMA_27B_LAYERS = (46, 62)  # of Gemma 2 and 3
# What llama.cpp's converter writes in F32 although it is a matrix.
_KEPT = ("ffn_gate_inp", "position_embd", "token_types", "ssm_", "altup_", "laurel_", "per_layer_model_proj", "conv1d")


def unpack_gguf(file: Path, work: Path) -> tuple[Path, Path]:
    """The model folder and the base file, in `work`, made of a GGUF file; what is there of the same file is used again.

    Tensors are decoded to BF16 (F16 and BF16 ones stay), with the file's metadata and tokenizer; a warning says what
    was quantized before. The folder is what transformers makes of that. Raises AthenaError if the file cannot be read,
    or transformers does not know its architecture in GGUF files.
    """
    folder, base, mark = work / "model", work / GGUF_BASE, work / "from-gguf.json"
    stat = file.stat() if file.is_file() else None
    if stat is None:
        raise AthenaError(f"{file}: no such file")
    _warn_of_quantized(file)
    key = [__version__, str(file.absolute()), stat.st_size, stat.st_mtime_ns]
    try:
        if json.loads(mark.read_text(encoding="utf-8")) == key and base.exists() and folder.is_dir():
            progress.note("model: taken from the work directory")
            return folder, base
    except (OSError, ValueError):
        pass
    _check_architecture(file)
    mark.unlink(missing_ok=True)
    with progress.stage(f"weights of {file.name}"):
        write_plain(file, base)
    with progress.stage(f"model of {file.name}"):
        _write_folder(file, base, folder)
    mark.write_text(json.dumps(key), encoding="utf-8")
    return folder, base


def write_plain(file: Path, out: Path) -> None:
    """Write a GGUF file with the matrices of `file` in BF16 (those in F16 as they are). Raises AthenaError for a type
    that cannot be decoded, or a part of a split file."""
    from athena_gguf.gguf_file import Replacement, write_quantized

    with GGUFFile(file) as opened:
        if opened.metadata.get("split.count") not in (None, 0, 1):
            raise AthenaError(f"{file} is one part of a split file; join them with llama-gguf-split --merge first")
        # A file of F32 throughout says nothing about what its converter would have rounded.
        plain = all(t.type_name == "F32" for t in opened)
        changed = {
            t.name: Replacement("BF16", partial(_bfloat16, t))
            for t in opened
            if t.type_name not in _FLOATS
            or (plain and len(t.shape) > 1 and t.name.endswith(".weight") and not any(k in t.name for k in _KEPT))
        }
        # What an earlier conversion said of itself is not true of the next.
        ours = dict.fromkeys(key for key in opened.metadata if key.startswith("athena."))
        write_quantized(file, out, changed, ours, file_type=32)  # LLAMA_FTYPE_MOSTLY_BF16


def _warn_of_quantized(file: Path) -> None:
    with GGUFFile(file) as opened:
        types = Counter(t.type_name for t in opened if t.type_name not in _FLOATS)
    if types:
        progress.note(
            f"warning: {file} is quantized already ({', '.join(kind for kind, _ in types.most_common())}): what that "
            "lost is lost, and the result is judged against what is left; the original model gives a better file"
        )


def _bfloat16(tensor: Tensor) -> Any:
    from athena_gguf.gguf_file import quantize

    return quantize(tensor.to_float32(), "BF16")


def _check_architecture(file: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    with GGUFFile(file) as opened:
        name = str(opened.metadata.get("general.architecture"))
    known = {known.replace("_", "").replace("-", "") for known in GGUF_SUPPORTED_ARCHITECTURES}
    if name.replace("_", "").replace("-", "") not in known:
        raise AthenaError(
            f"{file}: transformers cannot load {name} models from GGUF files; give the model's Hugging Face folder "
            f"instead (it can load: {', '.join(sorted(known))})"
        )


def _write_folder(file: Path, base: Path, folder: Path) -> None:
    import torch
    import transformers

    from athena_gguf.model.load import quiet_transformers

    quiet_transformers()
    where: dict[str, Any] = {"gguf_file": base.name, "local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(base.parent, **where)
        _complete(config, _head_width(base))
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base.parent, config=config, dtype=torch.bfloat16, output_loading_info=True, **where
        )
        model, found = loaded
        absent = sorted(found["missing_keys"])
        if absent:
            raise AthenaError(f"{file}: transformers finds no {absent[0]} in it; give the Hugging Face folder instead")
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # a model that was not loaded from a GGUF file, and so may be saved
            plain = transformers.AutoModelForCausalLM.from_config(config)
        plain.save_pretrained(folder, state_dict=model.state_dict())
        transformers.AutoTokenizer.from_pretrained(base.parent, **where).save_pretrained(folder)
    except AthenaError:
        raise
    except ImportError as error:
        raise AthenaError(f"{file}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # whatever transformers raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AthenaError(
            f"{file}: transformers cannot make a model of this GGUF file: {reason}; give the model's Hugging "
            "Face folder"
        ) from error


def _complete(config: Any, head: int | None) -> None:
    """Set what transformers does not take from the file, `head` being the width of a head."""
    if head is not None and hasattr(config, "head_dim"):
        config.head_dim = head
    if head is not None and hasattr(config, "query_pre_attn_scalar"):  # as llama.cpp does, for no file says it
        large = config.num_hidden_layers in _GEMMA_27B_LAYERS
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if large else head


def _head_width(file: Path) -> int | None:
    with GGUFFile(file) as opened:
        width = opened.metadata.get(f"{opened.metadata.get('general.architecture')}.attention.key_length")
    return width if isinstance(width, int) else None
