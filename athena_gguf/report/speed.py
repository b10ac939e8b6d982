"""How fast files run: llama-bench, read back as numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.runtime.messages import complaint
from athena_gguf.runtime.places import binary

PROMPT, GENERATED = 512, 128  # tokens


@dataclass(frozen=True)
class Speed:
    """Tokens a second with a prompt of 512 tokens, and when writing 128."""

    prompt: float
    generation: float


def measure_speeds(files: Sequence[Path], threads: int | None = None, repetitions: int = 3) -> list[Speed]:
    """The mean of `repetitions` runs for each file. Raises AthenaError if the runtime is not built or a file cannot
    be run."""
    bench = str(binary("llama-bench"))
    speeds = []
    with progress.bar("speed", len(files)) as advance:
        for file in files:
            command = [bench, "-m", str(file), "-p", str(PROMPT), "-n", str(GENERATED), "-r", str(repetitions)]
            command += ["-o", "json", *(["-t", str(threads)] if threads else [])]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
            try:
                found = {(run["n_prompt"], run["n_gen"]): float(run["avg_ts"]) for run in json.loads(done.stdout)}
                speeds.append(Speed(found[PROMPT, 0], found[0, GENERATED]))
            except (ValueError, KeyError, TypeError) as error:
                said = complaint(done.stderr.decode(errors="replace"))
                raise AthenaError(f"llama-bench could not run {file}: {said}") from error
            advance(1)
    return speeds
