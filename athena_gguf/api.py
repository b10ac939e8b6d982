"""The verbs of the command line as functions (docs/python.md); the package offers them under these names."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Callable, Sequence
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from athena_gguf.conversion import ConvertOptions

if TYPE_CHECKING:
    from athena_gguf.health import Finding
    from athena_gguf.jobs import BatchReport
    from athena_gguf.report.comparison import Comparison
    from athena_gguf.report.evaluate import Evaluation
    from athena_gguf.summary import Result

AnyPath = str | PathLike[str]
Settings = ParamSpec("Settings")


def _with_settings(
    options: Callable[Settings, ConvertOptions],
) -> Callable[
    [Callable[[AnyPath, AnyPath, ConvertOptions], Result]], Callable[Concatenate[AnyPath, AnyPath, Settings], Result]
]:
    """Turn the last parameter, options, into keywords: those of `ConvertOptions`, checked and shown as such."""

    def decorate(
        function: Callable[[AnyPath, AnyPath, ConvertOptions], Result],
    ) -> Callable[Concatenate[AnyPath, AnyPath, Settings], Result]:
        @wraps(function)
        def call(model: AnyPath, out: AnyPath, /, *args: Settings.args, **settings: Settings.kwargs) -> Result:
            return function(model, out, options(*args, **settings))

        signature = python_inspect.signature(function)
        first = list(signature.parameters.values())[:2]
        keywords = python_inspect.signature(options).parameters.values()
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*first, *(p.replace(kind=python_inspect.Parameter.KEYWORD_ONLY) for p in keywords)]
        )
        return call

    return decorate


@_with_settings(ConvertOptions)
def convert(model: AnyPath, out: AnyPath, options: ConvertOptions) -> Result:
    """Quantize `model` (a Hugging Face folder, a hub id or a GGUF file) and write the GGUF file `out`.

    Keywords are the fields of `athena_gguf.conversion.ConvertOptions`, the options of `athena-gguf convert`. `out`
    appears only when it is complete. With `dry_run=True` nothing is written and the plan is printed. Raises AthenaError
    for a bad model, option or calibration text, non-finite weights, or a full disk.
    """
    from athena_gguf.conversion import convert as run

    return run(model if isinstance(model, str) else Path(model), Path(out), options)


def base(model: AnyPath, out: AnyPath, *, trust_remote_code: bool = False) -> None:
    """Write the BF16 GGUF file of a model (a folder, hub id or GGUF file), which conversions start from and are judged
    by. `trust_remote_code`: run Python code that comes with it. Raises AthenaError."""
    from athena_gguf import progress
    from athena_gguf.gguf_file import write_base
    from athena_gguf.gguf_file.atomic import require_no_input
    from athena_gguf.model.from_gguf import write_plain
    from athena_gguf.model.source import local_model, model_files
    from athena_gguf.model.trust import running_code

    require_no_input(Path(out), model_files(str(model)))
    found = local_model(str(model), trust_remote_code)
    with running_code(trust_remote_code), progress.stage("base file"):
        (write_plain if found.is_file() else write_base)(found, Path(out))
    progress.note(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB, BF16, made from {found}")


def inspect(file: AnyPath) -> dict[str, Any]:
    """Metadata, tensors, types and sizes of a GGUF file, as `athena-gguf inspect --json` prints them. Raises
    AthenaError if it cannot be read."""
    from athena_gguf.report.inspection import inspect_file

    return inspect_file(Path(file))


def eval(
    file: AnyPath,
    base: AnyPath,
    text: AnyPath,
    *,
    windows: int = 60,
    base_logits: AnyPath | None = None,
    threads: int | None = None,
) -> Evaluation:
    """KL divergence and perplexity of a file against its base file, over windows of 512 tokens of a text.

    `base_logits`: where the base file's logits are kept for further calls. Raises AthenaError if a file cannot be
    read, the runtime is not built, the text is too short or the disk too full.
    """
    from athena_gguf.report.evaluate import evaluate

    kept = None if base_logits is None else Path(base_logits)
    return evaluate(Path(file), Path(base), Path(text), windows=windows, base_logits=kept, threads=threads)


def batch(jobs: AnyPath, *, workers: int | None = None, ray: str | None = None) -> BatchReport:
    """Make every file that a file of jobs asks for (docs/batch.md), on this machine or on the Ray cluster at the
    address `ray`, `workers` models at a time (by default one here, and as many as a cluster takes). Goes on after a job
    fails: see `ok` and `jobs` of the result. Raises AthenaError if the file of jobs is wrong, or the cluster not there.
    """
    from athena_gguf.jobs import run_batch

    return run_batch(Path(jobs), workers=workers, ray=ray)


def compare(
    files: Sequence[AnyPath],
    base: AnyPath,
    text: AnyPath,
    *,
    windows: int = 60,
    base_logits: AnyPath | None = None,
    threads: int | None = None,
    speed: bool = False,
    report: AnyPath | None = None,
) -> Comparison:
    """`eval` for several files, whose base file's logits are computed once; with `speed` llama-bench runs them too.
    `report`: a folder for pictures, JSON and a page of it. Raises AthenaError as `eval` does, and if `report` cannot be
    written or matplotlib is not installed."""
    from athena_gguf.report import plots
    from athena_gguf.report.comparison import compare as run
    from athena_gguf.report.comparison import write_comparison

    if report is not None:
        plots.require()
    kept = None if base_logits is None else Path(base_logits)
    found = run(
        [Path(file) for file in files],
        Path(base),
        Path(text),
        windows=windows,
        base_logits=kept,
        threads=threads,
        speed=speed,
    )
    if report is not None:
        write_comparison(found, Path(report))
    return found


def doctor(runtime: AnyPath | None = None) -> list[Finding]:
    """What conversions and the runtime need, and whether it is here: see `status`, `detail` and `remedy` of each.
    `runtime`: the runtime's folder, if it is not the usual one."""
    from athena_gguf.health import examine

    return examine(None if runtime is None else Path(runtime))
