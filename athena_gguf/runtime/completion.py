"""Answer one prompt with llama-completion: the answer as it comes on stdout, the speed on stderr."""

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from athena_gguf import progress
from athena_gguf.errors import AthenaError, UsageError
from athena_gguf.gguf_file.reader import GGUFFile
from athena_gguf.runtime.messages import complaint
from athena_gguf.runtime.places import binary

_END = b" [end of text]"  # what the tool prints after the answer
_SPEED = re.compile(r"^.*?(prompt eval|eval) time =.*?/\s*(\d+) (?:tokens|runs).*?([\d.]+) tokens per second", re.M)
_TOO_LONG = re.compile(r"prompt is too long \((\d+) tokens, max (\d+)\)")


def complete(
    file: Path,
    prompt: str,
    *,
    tokens: int,
    system: str | None = None,
    raw: bool = False,
    context: int = 4096,
    temperature: float = 0.8,
    seed: int | None = None,
    threads: int | None = None,
) -> None:
    """Answer `prompt` with at most `tokens` tokens; through the file's chat template if it has one and not `raw`.

    Raises AthenaError if the runtime is not built, the file is no model, or the tool fails; UsageError for a system
    prompt without the template.
    """
    if system is not None and raw:
        raise UsageError("--system needs the chat template, which --raw leaves out; give one of them")
    tool = binary("llama-completion")
    with GGUFFile(file) as opened:  # its errors are clearer than the tool's
        chat = "tokenizer.chat_template" in opened.fields and not raw
    if system is not None and not chat:
        raise AthenaError(f"--system needs a chat template, and {file} has none")
    command = [str(tool), "-m", str(file), "-p", prompt, "-n", str(tokens), "-c", str(context)]
    command += [
        "--temp",
        str(temperature),
        "--no-escape",
        "--no-display-prompt",
        "--simple-io",
        "--no-warmup",
        "--perf",
    ]
    command += ["--conversation", "--single-turn"] if chat else ["--no-conversation"]
    command += ["-sys", system] if system is not None else []
    command += ["-s", str(seed)] if seed is not None else []
    command += ["-t", str(threads)] if threads else []
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
            assert isinstance(process.stdout, io.BufferedReader)
            try:
                copy_answer(process.stdout, sys.stdout.buffer)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode and (found := _TOO_LONG.search(said)):
        raise AthenaError(
            f"the prompt has {found[1]} tokens, and a context of {context} takes {found[2]}; give a larger one with -c"
        )
    if process.returncode:
        raise AthenaError(f"llama-completion failed on {file} (exit code {process.returncode}): {complaint(said)}")
    for what, count, speed in _SPEED.findall(said):
        progress.note(f"{'prompt' if what == 'prompt eval' else 'answer'}: {count} tokens, {speed} tokens/s")


def copy_answer(source: io.BufferedReader, target: BinaryIO) -> None:
    """Pass bytes on as they come; the end mark and line ends after the answer become one line end."""
    held = b""
    while piece := source.read1(4096):
        held += piece
        keep = _held_back(held)
        target.write(held[: len(held) - keep])
        target.flush()
        held = held[len(held) - keep :]
    target.write(held.rstrip().removesuffix(_END.strip()).rstrip() + b"\n")
    target.flush()


def _held_back(data: bytes) -> int:
    """How many bytes at the end may belong to the end mark or to the line ends after the answer."""
    body = data.rstrip(b"\n")
    for size in range(min(len(_END), len(body)), 0, -1):
        if body.endswith(_END[:size]) and (size == len(_END) or len(body) == len(data)):
            return len(data) - len(body) + size
    return len(data) - len(body)
