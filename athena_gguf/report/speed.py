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
    """Tokens a second with a prompt of 512 tokens, and when writing 128; the standard deviation of the runs of each."""

    prompt: float
    generation: float
    prompt_deviation: float
    generation_deviation: float

    @property
    def unsteadiness(self) -> float:
        """The larger of the deviations, as a share of its mean."""
        return max(self.prompt_deviation / self.prompt, self.generation_deviation / self.generation)


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
                found = {
                    (run["n_prompt"], run["n_gen"]): (float(run["avg_ts"]), float(run["stddev_ts"]))
                    for run in json.loads(done.stdout)
                }
                (prompt, prompt_deviation), (generation, generation_deviation) = found[PROMPT, 0], found[0, GENERATED]
                speeds.append(Speed(prompt, generation, prompt_deviation, generation_deviation))
            except (ValueError, KeyError, TypeError) as error:
                said = complaint(done.stderr.decode(errors="replace"))
                raise AthenaError(f"llama-bench could not run {file}: {said}") from error
            advance(1)
    return speeds
