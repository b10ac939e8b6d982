"""The BF16 base file, through llama.cpp's own converter."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.atomic import temporary_beside
from athena_gguf.model import converter
from athena_gguf.model.load import check_model_dir
from athena_gguf.model.trust import check_model_files, check_model_size, runs_code

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def write_base(
    model_dir: Path | str, out_path: Path | str, runtime_dir: Path | None = None, *, sync: bool = True
) -> None:
    """Convert a Hugging Face model directory to a BF16 GGUF with `convert_hf_to_gguf.py` of the runtime's source tree.

    The tree is fetched if it is not there. `out_path` appears only when it is complete and, with `sync`, on the disk.
    Raises AthenaError if the directory is no model, its weights are truncated or corrupt, or the converter does not
    know the architecture.
    """
    model_dir, out_path = Path(model_dir), Path(out_path).absolute()
    check_model(model_dir)
    from athena_gguf.runtime import source_tree

    tree = source_tree(runtime_dir)
    with temporary_beside(out_path, sync) as temporary, tempfile.TemporaryFile() as said:
        arguments = [str(model_dir.absolute()), "--outtype", "bf16", "--outfile", str(temporary)]
        process = converter.command(tree / "convert_hf_to_gguf.py", runs_code())
        environment = {k: v for k, v in os.environ.items() if k != "NO_LOCAL_GGUF"}
        result = subprocess.run(process + arguments, stdout=said, stderr=said, env=environment)
        if result.returncode:
            said.seek(0)
            raise AthenaError(f"{model_dir} cannot be converted: {_reason(said.read().decode(errors='replace'))}")


def check_model(model_dir: Path) -> None:
    """Raise AthenaError unless `model_dir` has a config.json, a tokenizer and whole weight files, all harmless."""
    check_model_dir(model_dir)
    check_model_files(model_dir)
    if not any(path for pattern in _TOKENIZERS for path in model_dir.glob(pattern)):
        raise AthenaError(f"{model_dir} has no tokenizer (tokenizer.json or tokenizer.model)")
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights and not any(model_dir.glob("pytorch_model*.bin")):
        raise AthenaError(f"{model_dir} has no weights (*.safetensors)")
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise AthenaError(f"{path} is truncated or corrupt ({error}); download it again") from error
    check_model_size(model_dir)


def _reason(text: str) -> str:
    """The line of the converter's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").partition(":")[2] for line in lines if line.startswith("ERROR:")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)(:|$)", line)]
    return (errors or raised or lines[-1:] or ["the converter said nothing"])[-1].strip()
