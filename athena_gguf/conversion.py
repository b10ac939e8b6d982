"""`athena-gguf convert`: a model directory becomes a GGUF file of A-type tensors (docs/method.md).

The pipeline, top to bottom: base file, plan, calibration tokens, curvature, allocation of types where a size is asked
for, encoding, writing, summary.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.lock import locked

if TYPE_CHECKING:
    from athena_gguf.allocate import Target
    from athena_gguf.calibration import Curvature
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.model import LinearLayer

CALIBRATION_TOKENS = 98_304
WINDOW = 512  # tokens of a calibration window
TUNE_TOKENS = 524_288
IN_FLIGHT = 1 << 28  # weights that wait for their encoding, at most; a larger tensor waits alone


@dataclass(frozen=True)
class ConvertOptions:
    """`type`: of all linear layers, A3 if no target is given. Targets, of which there can be one: `bpw`, bits a weight;
    `size` of the file; `fit_memory` with `context` tokens; `preset` (athena_gguf.allocate.target). `embedding_type`:
    None for Q8_0, or chosen for the target. `calibration`: text files, or "self" for text that the model writes itself.
    `work_dir` keeps the base file and the curvature for further conversions of the same model; `base` is a base file
    made before. `tune`: train scales and norms after encoding, None for on a GPU only. `dry_run`: print the plan and
    write no result."""

    type: str | None = None
    bpw: float | None = None
    size: str | None = None
    fit_memory: str | None = None
    context: int | None = None
    preset: str | None = None
    calibration: tuple[str, ...] = ("self",)
    calibration_tokens: int | None = None
    embedding_type: str | None = None
    device: str = "auto"
    seed: int = 0
    work_dir: Path | None = None
    base: Path | None = None
    tune: bool | None = None
    dry_run: bool = False

    @property
    def texts(self) -> list[Path]:
        """The files among `calibration`."""
        return [Path(name) for name in self.calibration if name != "self"]


@dataclass
class Stages:
    """Seconds of every stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def convert(model_dir: Path | str, out: Path | str, options: ConvertOptions | None = None) -> None:
    """Quantize the model in `model_dir` and write `out`, which appears only when it is complete.

    Raises AthenaError for a bad model, option or calibration text, non-finite weights, or a full disk.
    """
    from athena_gguf.gguf_file.atomic import require_space
    from athena_gguf.plan import check_finite, make_plan, predicted_bytes
    from athena_gguf.summary import print_plan, print_summary

    model_dir, out, options = Path(model_dir), Path(out), options or ConvertOptions()
    target, device = _target(options), _check(out, options)
    tune = device.type == "cuda" if options.tune is None else options.tune
    options = replace(options, device=device.type, tune=tune)
    if target is None:
        options = replace(options, type=options.type or "A3", embedding_type=options.embedding_type or "Q8_0")
    stages = Stages()
    with _work_dir(options, out) as work:
        with stages.timed("base file"):
            base_path = _base_file(model_dir, work, options)
        with stages.timed("check"):
            plan = make_plan(base_path, options.type, options.embedding_type)
            if not options.dry_run:
                require_space(out.parent, predicted_bytes(base_path, plan), str(out))
            check_finite(base_path)
        measured = _calibration(model_dir, plan, base_path, work, device, options, stages)
        curvatures = measured.curvatures
        for name in sorted(plan.curved - {name for c in curvatures for name in c.tensor_names}):
            plan.keep_standard(name, "no linear layer of the model feeds it")
        metadata = _metadata(curvatures, options, target)
        if target or options.dry_run:
            with stages.timed("allocation"):
                predicted = _allocate(base_path, plan, measured, target, metadata, work, options)
        if options.dry_run:
            print_plan(base_path, plan, metadata, predicted)
            return
        with stages.timed("encoding"):
            encoded = _encode(base_path, plan, curvatures, options)
        norms: dict[str, Any] = {}
        if options.tune:
            with stages.timed("tuning"):
                norms = _tune(model_dir, base_path, plan, encoded, device, options)
        with stages.timed("writing"):
            _write(base_path, out, plan, encoded, norms, metadata)
    print_summary(out, plan, encoded, curvatures, stages.seconds)


def _target(options: ConvertOptions) -> Target | None:
    from athena_gguf.allocate import parse_target

    target = parse_target(options.bpw, options.size, options.fit_memory, options.context, options.preset)
    if target is not None and options.type is not None:
        raise AthenaError(
            f"--type {options.type} gives every linear layer one type, and {target.option} chooses; give one"
        )
    return target


def _check(out: Path, options: ConvertOptions) -> Any:
    """The torch device. Raises AthenaError for options that cannot work, before any work is done."""
    import torch

    from athena_gguf.format import TYPES
    from athena_gguf.gguf_file.standard import STANDARD_TYPES

    if options.type not in (None, *TYPES):
        raise AthenaError(f"--type {options.type}: choose from {', '.join(TYPES)}")
    if options.embedding_type not in (None, *STANDARD_TYPES, *TYPES):
        raise AthenaError(
            f"--embedding-type {options.embedding_type}: choose from {', '.join((*STANDARD_TYPES, *TYPES))}"
        )
    if options.device not in ("auto", "cpu", "cuda"):
        raise AthenaError(f"--device {options.device}: choose from auto, cpu, cuda")
    for path in options.texts:
        if not path.is_file():
            raise AthenaError(f"--calibration {path}: no such file")
        if not path.stat().st_size:
            raise AthenaError(f"--calibration {path}: the file is empty")
    if out.is_dir():
        raise AthenaError(f"{out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise AthenaError(f"{out} cannot be written: the folder {out.parent} does not exist")
    kept = [options.base] if options.base else [options.work_dir / "base.gguf"] if options.work_dir else []
    if any(
        out.absolute() == path.absolute() or (out.exists() and path.exists() and out.samefile(path)) for path in kept
    ):
        raise AthenaError(f"{out} is the base file; write the result elsewhere")
    if not os.access(out.parent, os.W_OK):
        raise AthenaError(f"{out} cannot be written: no permission in its folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise AthenaError("--device cuda: torch sees no CUDA device; use --device cpu")
    name = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def _work_dir(options: ConvertOptions, out: Path) -> Iterator[Path]:
    if options.work_dir is not None:
        with locked(options.work_dir, "--work-dir"):
            yield options.work_dir
        return
    try:
        # Beside the result: the base file is as large as the model, and /tmp may be small.
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise AthenaError(f"{out} cannot be written: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def _base_file(model_dir: Path, work: Path, options: ConvertOptions) -> Path:
    from athena_gguf.calibration import store
    from athena_gguf.gguf_file import write_base
    from athena_gguf.gguf_file.atomic import require_space
    from athena_gguf.gguf_file.base import check_model
    from athena_gguf.plan import weight_count

    check_model(model_dir)
    if options.base is not None:
        return options.base
    path, mark = work / "base.gguf", work / "base.model"
    key = store.model_fingerprint(model_dir)
    if path.exists() and mark.exists() and mark.read_text() == key:
        progress.note("base file: taken from the work directory")
        return path
    require_space(work, 2 * weight_count(model_dir), "the base file")
    mark.unlink(missing_ok=True)
    with progress.stage("base file through llama.cpp's converter"):
        write_base(model_dir, path)
    mark.write_text(key)
    return path


def _calibration(
    model_dir: Path, plan: Any, base_path: Path, work: Path, device: Any, options: ConvertOptions, stages: Stages
) -> Calibration:
    """The curvature of every input of the planned layers, from the work directory if it was measured before."""
    import torch

    from athena_gguf.calibration import Lookup, measure_curvature, store
    from athena_gguf.model import load_model

    tokens = options.calibration_tokens or CALIBRATION_TOKENS
    files = [*options.texts, *([options.base] if options.base else [])]
    key = store.fingerprint(
        model_dir, files, list(options.calibration), tokens, WINDOW, options.seed, str(device), sorted(plan.curved)
    )
    path = work / "curvature.pt"
    kept = store.load(path, key)
    if kept is not None:
        progress.note("curvature: taken from the work directory")
        return kept
    model = load_model(model_dir, device, torch.float32)
    layers = _layers(model, plan, base_path, options.base is not None)
    lookup = Lookup()
    with stages.timed("calibration text"):
        windows = _windows(model_dir, model, tokens, options)
    batch = 2 if device.type == "cpu" else 16
    bar = progress.bar("curvature of the loss", windows.numel())
    with _bfloat16_products(), stages.timed("curvature"), bar as advance:
        try:
            curvatures = measure_curvature(model, layers, windows, batch, advance=advance, lookup=lookup)
        except torch.OutOfMemoryError as error:
            raise AthenaError(
                f"{model_dir}: the GPU's memory is too small to measure the curvature: {error}; use --device cpu"
            ) from error
    measured = store.Calibration(key, curvatures, lookup)
    if options.work_dir is not None:
        store.save(path, measured)
    return measured


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Products of bfloat16 numbers with sums in float32, where the processor has them: twice as fast, and accurate
    enough for a sum over many tokens. Not for encoding, nor for single tokens, whose products take gigabytes then."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _layers(model: Any, plan: Any, base_path: Path, given: bool) -> list[LinearLayer]:
    from athena_gguf.model import linear_layers
    from athena_gguf.plan import other_weights

    differences = other_weights(base_path, model, plan.architecture)
    for name, what in differences.items():
        if given:
            raise AthenaError(f"{base_path}: tensor {name} {what}; give the base file of this model")
        if name in plan.fitting:
            plan.keep_standard(name, f"llama.cpp's converter rearranges it: it {what}")
    layers = [
        layer for layer in linear_layers(model, plan.architecture, plan.shapes) if layer.tensor_name in plan.curved
    ]
    if not layers:
        raise AthenaError(f"no linear layer of this {plan.architecture} model can become an A type; see the warnings")
    return layers


def _windows(model_dir: Path, model: Any, tokens: int, options: ConvertOptions) -> Any:
    import torch

    from athena_gguf.calibration import self_generated_windows, text_windows
    from athena_gguf.model import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    files = options.texts
    share = tokens // 2 if files and "self" in options.calibration else tokens
    parts = []
    if files:
        parts.append(text_windows(tokenizer, files, share, WINDOW, options.seed))
    if "self" in options.calibration:
        # Few threads on the CPU, since each holds the keys and values of a batch of windows.
        batch, threads = (32, min(4, cores())) if model.device.type == "cpu" else (128, 1)
        with progress.bar("calibration text, written by the model", share) as advance:
            parts.append(
                self_generated_windows(model, tokenizer, share, WINDOW, options.seed, batch, threads, advance=advance)
            )
    windows = torch.cat(parts)
    if windows.numel() < tokens // 2:
        progress.note(f"warning: the calibration text has only {windows.numel():,} tokens of {tokens:,}")
    return windows


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allocate(
    base_path: Path,
    plan: Any,
    measured: Calibration,
    target: Target | None,
    metadata: dict[str, Any],
    work: Path,
    options: ConvertOptions,
) -> float:
    """Choose the types of the plan's free tensors for the target; the predicted KL divergence."""
    from athena_gguf.allocate import choose_types, kept_losses, predicted_kld
    from athena_gguf.encode import EncodeOptions

    losses = kept_losses(
        work if options.work_dir else None, base_path, plan, measured, EncodeOptions(), cores(), options.seed
    )
    if target is not None:
        metadata["athena.predicted_kld"] = 0.0  # counts for the size
        choose_types(base_path, plan, losses, target, metadata)
    predicted = predicted_kld(plan, losses)
    if target is not None:
        metadata["athena.predicted_kld"] = predicted
    return predicted


def _encode(base_path: Path, plan: Any, curvatures: list[Curvature], options: ConvertOptions) -> dict[str, Any]:
    """Encoded tensors by name. Works off one layer input after the other, a few of them in flight."""
    from collections import deque

    import torch

    from athena_gguf.encode import EncodeOptions, EncodePool, layer_metric
    from athena_gguf.encode.pool import PIECE
    from athena_gguf.format import TYPES
    from athena_gguf.gguf_file import GGUFFile

    threads = cores()
    done: dict[str, Any] = {}
    groups: list[tuple[Any, list[str]]] = [
        (c.matrix, [n for n in c.tensor_names if n in plan.encoded]) for c in curvatures
    ]
    groups += [(None, [n]) for n in plan.encoded if n not in plan.curved]  # embeddings that only look up rows
    total = sum(plan.elements(n) for _, names in groups for n in names)
    settings = EncodeOptions()
    with (
        GGUFFile(base_path) as base,
        progress.bar("encoding", total) as advance,
        EncodePool(settings, threads) as pool,
    ):
        waiting: deque[tuple[str, Any]] = deque()

        def collect(elements: int) -> None:
            """Wait until at most so many elements are in flight."""
            while sum(plan.elements(name) for name, _ in waiting) > elements:
                name, result = waiting.popleft()
                done[name] = result()
                advance(plan.elements(name))

        for matrix, names in groups:
            if not names:
                continue
            columns = base.tensors[names[0]].columns
            metric = layer_metric(matrix, columns, settings.damping, names[0])
            for name in names:
                weight = torch.from_numpy(base.tensors[name].to_float32())
                waiting.append((name, pool.submit(weight, metric, TYPES[plan.encoded[name]])))
                # Enough that no thread waits; weights in float32 and their layers' curvatures in five forms are held.
                collect(min(4 * threads * PIECE * columns, IN_FLIGHT))
        collect(0)
    return done


def _tune(
    model_dir: Path, base_path: Path, plan: Any, encoded: dict[str, Any], device: Any, options: ConvertOptions
) -> dict[str, Any]:
    """Put tuned scales into `encoded`; the tuned norms by tensor name."""
    import torch

    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.model import load_model
    from athena_gguf.tune.stage import tune_encoded

    model = load_model(model_dir, device, torch.float32)
    # Other windows than the curvature's where the model writes them, more of the same text where files are given.
    windows = _windows(model_dir, model, TUNE_TOKENS, replace(options, seed=options.seed + 1))
    with GGUFFile(base_path) as base, _bfloat16_products():
        try:
            found = tune_encoded(model, base, plan, encoded, windows, options.seed)
        except torch.OutOfMemoryError as error:
            raise AthenaError(f"{model_dir}: the GPU's memory is too small to tune: {error}; use --no-tune") from error
    for name, data in found.data.items():
        encoded[name] = replace(encoded[name], data=data)
    return found.norms


def _write(
    base_path: Path, out: Path, plan: Any, encoded: dict[str, Any], norms: dict[str, Any], metadata: dict[str, Any]
) -> None:
    from athena_gguf.gguf_file import Replacement, quantize, write_quantized
    from athena_gguf.plan import file_type, standard_replacements

    changed = standard_replacements(base_path, plan)
    for name, result in encoded.items():
        changed[name] = Replacement(plan.encoded[name], partial(getattr, result, "data"))
    for name, weight in norms.items():
        changed[name] = Replacement("F32", partial(quantize, weight, "F32"))
    write_quantized(base_path, out, changed, metadata, file_type=file_type(plan))


def _metadata(curvatures: list[Curvature], options: ConvertOptions, target: Target | None) -> dict[str, Any]:
    """The settings and versions that made a file; nothing in it depends on the clock or a path's folder."""
    from importlib.metadata import version

    from athena_gguf import __version__
    from athena_gguf.encode import EncodeOptions
    from athena_gguf.format import FORMAT_VERSION

    settings = EncodeOptions()
    kinds = {"athena.type": options.type or "mixed"}
    if target is not None:
        kinds["athena.target"] = target.name
    if options.embedding_type is not None:
        kinds["athena.embedding_type"] = options.embedding_type
    return {
        "athena.format_version": FORMAT_VERSION,
        "athena.version": __version__,
        **kinds,
        "athena.calibration": [name if name == "self" else Path(name).name for name in options.calibration],
        "athena.calibration_tokens": curvatures[0].tokens,
        "athena.calibration_window": WINDOW,
        "athena.seed": options.seed,
        "athena.device": options.device,
        "athena.damping": settings.damping,
        "athena.passes": settings.passes,
        "athena.sweeps": settings.sweeps,
        "athena.tuned": bool(options.tune),
        "athena.made_with": [f"{name} {version(name)}" for name in ("torch", "transformers", "numba", "numpy", "gguf")],
    }
