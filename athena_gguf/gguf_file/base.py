"""The BF16 base file, through llama.cpp's own converter."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.atomic import require_space, temporary_beside
from athena_gguf.gguf_file.reader import GGUFFile
from athena_gguf.model import converter
from athena_gguf.model.load import check_model_dir
from athena_gguf.model.trust import check_model_files, check_model_size, runs_code

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")

_LOOK = 0.05  # seconds between two looks at what the converter has written


def write_base(
    model_dir: Path | str, out_path: Path | str, runtime_dir: Path | None = None, *, sync: bool = True
) -> None:
    """Convert a Hugging Face model directory to a BF16 GGUF with `convert_hf_to_gguf.py` of the runtime's source tree.

    The tree is fetched if it is not there. `out_path` appears only when it is complete and, with `sync`, on the disk.
    Raises AthenaError if the directory is no model, its weights are truncated or corrupt, the disk has no room, or the
    converter does not know the architecture.
    """
    with writing_base(model_dir, out_path, runtime_dir, sync=sync):
        pass


@contextmanager
def writing_base(
    model_dir: Path | str, out_path: Path | str, runtime_dir: Path | None = None, *, sync: bool = True
) -> Iterator[GGUFFile]:
    """As `write_base`; what is done inside goes on while the converter's process writes the tensors. Gives the file's
    header, which is there once the converter has accepted the model. An exception inside ends the converter."""
    model_dir, out_path = Path(model_dir), Path(out_path).absolute()
    check_files(model_dir)
    from athena_gguf.plan import weight_count
    from athena_gguf.runtime import source_tree

    require_space(out_path.parent, 2 * weight_count(model_dir), "the base file")
    tree = source_tree(runtime_dir)
    with temporary_beside(out_path, sync) as temporary, tempfile.TemporaryFile() as said:
        arguments = [str(model_dir.absolute()), "--outtype", "bf16", "--outfile", str(temporary)]
        process = converter.command(tree / "convert_hf_to_gguf.py", runs_code())
        environment = {k: v for k, v in os.environ.items() if k != "NO_LOCAL_GGUF"}
        with subprocess.Popen(
            process + arguments, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment
        ) as running:
            try:
                check_model_size(model_dir)  # while that process imports its libraries, and waits
                assert running.stdin is not None
                with suppress(BrokenPipeError):  # it ended, and has said why
                    running.stdin.write(converter.BEGIN)
                    running.stdin.close()
                header = _header(running, temporary)
                if header is not None:
                    header.path = out_path
                    yield header
                running.wait()
            except BaseException:
                running.kill()
                raise
        if running.returncode:
            said.seek(0)
            raise AthenaError(f"{model_dir} cannot be converted: {_reason(said.read().decode(errors='replace'))}")


def _header(running: subprocess.Popen[bytes], path: Path) -> GGUFFile | None:
    """Of the file that the process writes, as soon as it is whole; None if the process failed before."""
    seen = 0
    while not (status := running.poll()):
        if (size := path.stat().st_size) > seen or status == 0:
            seen = size
            try:
                return GGUFFile(path, unfinished=True)
            except AthenaError:  # some of it is not there yet
                if status == 0:
                    raise
        time.sleep(_LOOK)
    return None


def check_model(model_dir: Path) -> None:
    """Raise AthenaError unless `model_dir` has a config.json, a tokenizer and whole weight files, all harmless."""
    check_files(model_dir)
    check_model_size(model_dir)


def check_files(model_dir: Path) -> None:
    """The part of `check_model` that takes no time."""
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


def _reason(text: str) -> str:
    """The line of the converter's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").partition(":")[2] for line in lines if line.startswith("ERROR:")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)(:|$)", line)]
    return (errors or raised or lines[-1:] or ["the converter said nothing"])[-1].strip()
