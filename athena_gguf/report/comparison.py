"""Several files against one base file: `compare`, as a table, JSON, pictures and a page."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.report.evaluate import DEFAULT_WINDOWS, Evaluation, evaluate
from athena_gguf.report.speed import Speed, measure_speeds

HEADINGS = ("file", "MiB", "bits a weight", "KLD", "perplexity ratio", "same top token")
SPEED_HEADINGS = ("prompt tokens/s", "tokens/s")
UNSTEADY = 0.1  # a deviation of speeds, as a share of their mean, that deserves a word


@dataclass(frozen=True)
class Row:
    """A file; `name` is short. `speed`: None unless it was measured."""

    name: str
    file: str
    evaluation: Evaluation
    speed: Speed | None = None

    def cells(self) -> list[str]:
        found = self.evaluation
        cells = [
            self.name,
            f"{found.bytes / 2**20:.1f}",
            f"{found.bpw:.3f}",
            f"{found.kld:.4f} ± {found.kld_error:.4f}",
        ]
        cells += [f"{found.ppl_ratio:.4f}", f"{100 * found.same_top:.2f}%"]
        if (speed := self.speed) is None:
            return cells
        prompt = f"{speed.prompt:.1f} ± {speed.prompt_deviation:.1f}"
        return [*cells, prompt, f"{speed.generation:.1f} ± {speed.generation_deviation:.1f}"]


@dataclass(frozen=True)
class Comparison:
    """`rows` in the order of the files; all windows have 512 tokens."""

    base: str
    text: str
    rows: tuple[Row, ...]

    @property
    def headings(self) -> list[str]:
        return [*HEADINGS, *(SPEED_HEADINGS if any(row.speed for row in self.rows) else ())]

    @property
    def doubt(self) -> str:
        """Which speeds differed too much from run to run to be relied on; nothing if none did."""
        unsteady = [row.name for row in self.rows if row.speed and row.speed.unsteadiness > UNSTEADY]
        if not unsteady:
            return ""
        return (
            f"runs of {', '.join(unsteady)} differed in speed by more than {UNSTEADY:.0%} (±, the standard deviation): "
            "measure again when the machine does nothing else"
        )

    def table(self) -> str:
        cells = [self.headings, *(row.cells() for row in self.rows)]
        width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = []
        for line in cells:
            first, *others = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, width, strict=True))]
            lines.append("  ".join([first, *others]))
        return "\n".join([*lines, *([f"note: {self.doubt}"] if self.doubt else [])])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None instead."""
        return _finite(asdict(self))


def compare(
    files: Sequence[Path],
    base: Path,
    text: Path,
    *,
    windows: int = DEFAULT_WINDOWS,
    base_logits: Path | None = None,
    threads: int | None = None,
    speed: bool = False,
) -> Comparison:
    """Evaluate every file against `base` on the first windows of `text` (athena_gguf.report.evaluate); with `speed`
    run them through llama-bench too. The base file's logits are computed once.

    Raises AthenaError if a file cannot be read or run, the runtime is not built, or the text is too short.
    """
    if not files:
        raise AthenaError("give at least one file to compare with the base file")
    for file in (base, *files):  # before the first is measured, which takes minutes
        GGUFFile(file).close()
    with tempfile.TemporaryDirectory(prefix="athena-compare-") as scratch:
        logits = base_logits or Path(scratch, "logits")
        found = [evaluate(f, base, text, windows=windows, base_logits=logits, threads=threads) for f in files]
    speeds: list[Speed] | list[None] = measure_speeds(files, threads) if speed else [None] * len(files)
    names = _names(files)
    rows = (Row(n, str(f), e, s) for n, f, e, s in zip(names, files, found, speeds, strict=True))
    return Comparison(str(base), str(text), tuple(rows))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """`comparison.json`, `kld.png`, with speeds `speed.png`, and `index.html` with all of it, in `folder`.
    Raises AthenaError if it cannot be written or matplotlib is not installed."""
    from athena_gguf.report import page, plots

    plots.require()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1), encoding="utf-8")
        drawn = [plots.Picture("kld", "KL divergence and size", *_points(comparison, "kld"))]
        if any(row.speed for row in comparison.rows):
            drawn.append(plots.Picture("speed", "Speed and size", *_points(comparison, "speed")))
        for picture in drawn:
            picture.write_png(folder / f"{picture.name}.png")
        (folder / "index.html").write_text(page.comparison_page(comparison, drawn), encoding="utf-8")
    except OSError as error:
        raise AthenaError(
            f"{error.filename or folder}: {error.strerror}; choose another folder with --report"
        ) from error


def _points(comparison: Comparison, what: str) -> tuple[list[tuple[str, float, float]], str, bool]:
    """Names, MiB and values; what the values are; whether their axis is logarithmic."""
    rows = comparison.rows
    sizes = [row.evaluation.bytes / 2**20 for row in rows]
    if what == "kld":
        points = [(row.name, size, row.evaluation.kld) for row, size in zip(rows, sizes, strict=True)]
        return points, "KL divergence, nats a token", True
    points = [(row.name, size, row.speed.generation) for row, size in zip(rows, sizes, strict=True) if row.speed]
    return points, "tokens a second", False


def _names(files: Sequence[Path]) -> list[str]:
    stems = [file.stem for file in files]
    return [stem if stems.count(stem) == 1 else str(file) for stem, file in zip(stems, files, strict=True)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
