"""`athena-gguf convert`: a model directory becomes a GGUF file of A-type tensors (docs/method.md).

The pipeline, top to bottom: base file, plan, calibration tokens, curvature, allocation of types where a size is asked
for, encoding, writing, summary.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.errors import AthenaError, UsageError
from athena_gguf.lock import locked
from athena_gguf.memory import short_turns, shortage_explained

if TYPE_CHECKING:
    from athena_gguf.allocate import Target
    from athena_gguf.calibration.stage import Stage
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.encode.finished import FinishedTensors
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.summary import Result

BESIDE = ("cuda",)  # where the curvature begins while the base file is made; on a CPU both would want its cores
_THREADS = 4  # two of the curvature, one that makes kernels, one that keeps the base file
CALIBRATION_TOKENS = 98_304
TOKENS_IN_ORDER = {"cpu": 49_152, "cuda": 262_144}  # the more of them, the more of the errors can be made up for
WINDOW = 512  # tokens of a calibration window
TUNE_TOKENS = 524_288


@dataclass(frozen=True)
class ConvertOptions:
    """`type`: of all linear layers, A3 if no target is given. Targets, of which there can be one: `bpw`, bits a weight;
    `size` of the file; `fit_memory` with `context` tokens; `preset` (athena_gguf.allocate.target). `embedding_type`:
    None for Q8_0, or chosen for the target. `calibration`: text files, or "self" for text that the model writes itself.
    `work_dir` keeps the base file and the curvature for further conversions of the same model; `base` is a base
    file made before. `sequential`: encode layers in order, under the inputs that they have behind those before, None
    for where that is possible. `tune`: train scales and norms after encoding, None for on a GPU only. `dry_run`: print
    the plan and write no result. `report`: folder of a model card (athena_gguf.report.card), `report_text`: to measure
    the KL divergence on for it. `trust_remote_code`: run Python code that comes with the model. `gpu_memory`,
    `host_memory`: what the work may take, None for most of what is free. `ray`: address of a Ray cluster that encodes
    (athena_gguf.cluster.connected)."""

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
    sequential: bool | None = None
    tune: bool | None = None
    dry_run: bool = False
    gpu_memory: str | None = None
    host_memory: str | None = None
    report: Path | None = None
    report_text: Path | None = None
    trust_remote_code: bool = False
    ray: str | None = None

    def __post_init__(self) -> None:
        """Types in capitals, whatever was given; paths as paths, and one calibration text as a tuple of one."""
        for name in ("type", "embedding_type"):
            object.__setattr__(self, name, value.upper() if (value := getattr(self, name)) else None)
        for name in ("work_dir", "base", "report", "report_text"):
            object.__setattr__(self, name, Path(value) if (value := getattr(self, name)) else None)
        given = self.calibration
        texts = (given,) if isinstance(given, str | os.PathLike) else given
        object.__setattr__(self, "calibration", tuple(os.fspath(text) for text in texts))

    @property
    def memory(self) -> tuple[int | None, int | None]:
        """Bytes of `gpu_memory` and `host_memory`. Raises UsageError for what is no size."""
        from athena_gguf.allocate.target import parse_bytes

        given = {"--gpu-memory": self.gpu_memory, "--host-memory": self.host_memory}
        gpu, host = (parse_bytes(option, text) if text else None for option, text in given.items())
        return gpu, host

    @property
    def target(self) -> Target | None:
        """What the file's size is to be, if that is asked for. Raises UsageError as `parse_target`."""
        from athena_gguf.allocate import parse_target

        return parse_target(self.bpw, self.size, self.fit_memory, self.context, self.preset)

    def check(self) -> None:
        """Raise UsageError for values that cannot be and options that exclude each other."""
        from athena_gguf.format import TYPES
        from athena_gguf.gguf_file.standard import STANDARD_TYPES

        types = (*STANDARD_TYPES, *TYPES)
        target = self.target
        if target is not None and self.type is not None:
            raise UsageError(
                f"--type {self.type} gives every linear layer one type, and {target.option} chooses; give one"
            )
        if self.type not in (None, *TYPES):
            raise UsageError(f"--type {self.type}: choose from {', '.join(TYPES)}")
        if self.embedding_type not in (None, *types):
            raise UsageError(f"--embedding-type {self.embedding_type}: choose from {', '.join(types)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device {self.device}: choose from auto, cpu, cuda")
        if self.memory[0] and self.device == "cpu":
            raise UsageError("--gpu-memory is for a GPU; leave it out with --device cpu")
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise UsageError(f"--calibration-tokens {self.calibration_tokens}: give a number of tokens")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give 0 or more")
        if self.sequential and self.ray is not None:
            raise UsageError("--sequential encodes one layer after the other, here; leave --ray out")
        if self.report_text is not None and self.report is None:
            raise UsageError("--report-text is for the model card of --report; give both")

    @property
    def texts(self) -> list[Path]:
        """The files among `calibration`."""
        return [Path(name) for name in self.calibration if name != "self"]


@dataclass
class Stages:
    """`seconds` of every stage, in order; `beside`: of what other threads did of a stage during others. `spans`: when a
    stage first began and last ended, in seconds since all began."""

    seconds: dict[str, float] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @contextmanager
    def timed(self, name: str, beside: bool = False) -> Iterator[None]:
        start = time.monotonic()
        yield
        end = time.monotonic()
        times = self.beside if beside else self.seconds
        times[name] = times.get(name, 0.0) + end - start
        first, _ = self.spans.get(name, (start - self.begun, 0.0))
        self.spans[name] = min(first, start - self.begun), end - self.begun


def convert(model: Path | str, out: Path | str, options: ConvertOptions | None = None) -> Result:
    """Quantize `model` (a folder, hub id or GGUF file) and write `out`, which appears only when it is complete.

    Raises AthenaError for a bad model, option or calibration text, non-finite weights, or a full disk.
    """
    from athena_gguf.allocate import check_target
    from athena_gguf.calibration.stage import Stage, all_of, wake
    from athena_gguf.cards import Cards
    from athena_gguf.cluster import connected
    from athena_gguf.encode.stage import NOT_FED, encode_tensors
    from athena_gguf.gguf_file.atomic import require_space
    from athena_gguf.model.trust import running_code
    from athena_gguf.plan import check_finite, make_plan, predicted_bytes
    from athena_gguf.report.card import check_report, write_report
    from athena_gguf.summary import print_plan, print_summary
    from athena_gguf.tune.stage import windows_at_once

    out, options = Path(out), options or ConvertOptions()
    options.check()
    target, device = options.target, _check(model, out, options)
    options = replace(options, device=device.type)
    if target is None:
        options = replace(options, type=options.type or "A3", embedding_type=options.embedding_type or "Q8_0")
    check_report(options.report, options.report_text)
    if options.ray is not None and options.dry_run:
        progress.note("--ray does nothing with --dry-run, which encodes samples only, here")
    stages = Stages()
    with (
        shortage_explained(str(out)),
        running_code(options.trust_remote_code),
        _work_dir(options, out) as work,
        nullcontext() if options.ray is None or options.dry_run else connected(options.ray) as cluster,
        ThreadPoolExecutor(_THREADS, "beside") as threads,
        ExitStack() as exits,
    ):
        with stages.timed("base file"):
            found = _found(model, options)  # before anything is started for it
            devices = all_of(device)
            cards = exits.enter_context(Cards(devices[0], devices[1:], options.memory[0]))
            awake = threads.submit(wake, devices[:1], options.memory[0])
            model_dir, options = _model(found, work, options)
            with _base_file(model_dir, work, options, threads) as base:
                plan = make_plan(base.header, options.type, options.embedding_type)
                awake.result()
                stage = Stage(model_dir, base.path, plan, work, devices, options, 0, WINDOW, stages.timed, cards)
                in_order = _in_order(stage)
                usual = TOKENS_IN_ORDER[device.type] if in_order else CALIBRATION_TOKENS
                stage.tokens, stage.with_weights = options.calibration_tokens or usual, in_order
                metadata = _metadata(options, target, stage.tokens)
                if target is not None:
                    check_target(base.header, plan, target, metadata)
                calibration = stage.calibration()
                if device.type in BESIDE and not calibration.complete:
                    exits.enter_context(short_turns())
                    exits.callback(stage.close)
                    stage.begin(threads, base.takes)
                    if device.type == "cuda" and cluster is None:
                        threads.submit(_kernels, stage, target)
        base_path = base.path
        with stages.timed("check"):
            if not options.dry_run:
                require_space(out.parent, predicted_bytes(base_path, plan), str(out))
            check_finite(base_path)
        stage.opened()
        if target or options.dry_run:
            for _ in calibration.stream():  # a choice of types needs them all
                pass
            for name in sorted(calibration.absent):
                plan.keep_standard(name, NOT_FED)
            with stages.timed("allocation"):
                predicted = _allocate(base_path, plan, calibration, target, metadata, work, device, options)
        if options.dry_run:
            return print_plan(base_path, plan, metadata, predicted, calibration.inputs)
        encoded = encode_tensors(
            base_path,
            plan,
            calibration,
            work / "encoded",
            devices[0],
            stages.timed,
            stage.overlap,
            cluster,
            cards,
            stage.prefix if in_order else None,
        )
        cards.close()  # what they hold is of use to tuning
        metadata["athena.calibration_tokens"] = calibration.inputs[0].tokens
        metadata["athena.sequential"] = in_order
        changes: dict[str, tuple[str, Any]] = {}
        at_once = windows_at_once(plan, WINDOW, stage.memory.device) if device.type == "cuda" else None
        if _tunes(options, plan, at_once):
            with stages.timed("tuning"):
                changes = _tune(stage, encoded, at_once)
        metadata["athena.tuned"] = bool(changes)
        with stages.timed("writing"):
            base.kept.result()
            _write(base_path, out, plan, encoded, changes, metadata)
        encoded.remove()
        result = print_summary(out, plan, encoded.losses, calibration.inputs, stages)
        if options.report is not None:
            logits = work / "report-logits" if options.work_dir else None
            write_report(options.report, out, result, base_path, model, model_dir, options.report_text, logits)
    return result


def _check(model: Path | str, out: Path, options: ConvertOptions) -> Any:
    """The torch device. Raises AthenaError for files and devices that cannot be used, before any work is done."""
    import torch

    from athena_gguf.gguf_file.atomic import require_no_input
    from athena_gguf.model.from_gguf import GGUF_BASE
    from athena_gguf.model.source import model_files

    for path in options.texts:
        if not path.is_file():
            raise AthenaError(f"--calibration {path}: no such file")
        if not path.stat().st_size:
            raise AthenaError(f"--calibration {path}: the file is empty")
    if out.is_dir():
        raise AthenaError(f"{out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise AthenaError(f"{out} cannot be written: the folder {out.parent} does not exist")
    given = [path for path in (options.base, options.report_text, *options.texts) if path is not None]
    kept = [options.work_dir / name for name in ("base.gguf", GGUF_BASE)] if options.work_dir else []
    require_no_input(out, [*model_files(model), *given, *kept])
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
            for left in options.work_dir.glob("shelf*"):  # of a conversion that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield options.work_dir
        return
    from athena_gguf.gguf_file.atomic import folder_beside

    # Beside the result: the base file is as large as the model, and /tmp may be small.
    with folder_beside(out) as folder:
        yield folder


def _found(model: Path | str, options: ConvertOptions) -> Path:
    """The model's folder or GGUF file, fetched if need be. Raises AthenaError if a short look shows that it is none."""
    from athena_gguf.gguf_file.base import check_files
    from athena_gguf.model.source import local_model

    found = local_model(model, options.trust_remote_code)
    if not found.is_file():
        check_files(found)
    elif options.base is not None:
        raise AthenaError(f"--base {options.base}: {found} is a GGUF file, and so its own base; leave --base out")
    return found


def _model(found: Path, work: Path, options: ConvertOptions) -> tuple[Path, ConvertOptions]:
    """The model's folder; that of a GGUF file comes with its base file."""
    from athena_gguf.model.from_gguf import unpack_gguf

    if not found.is_file():
        return found, options
    folder, base = unpack_gguf(found, work)
    return folder, replace(options, base=base)


@dataclass
class _Base:
    """The base file, at `path`; its `header`. `takes`: bytes of memory that making it takes. `kept` raises AthenaError
    if a file for further conversions did not get to the disk."""

    path: Path
    header: GGUFFile
    takes: int = 0
    kept: Future[None] = field(default_factory=Future)


@contextmanager
def _base_file(model_dir: Path, work: Path, options: ConvertOptions, aside: Executor) -> Iterator[_Base]:
    """What is done inside goes on while the file is made, which is complete afterwards. `aside` brings one that is kept
    to the disk, after which further conversions believe it."""
    from athena_gguf.calibration import store
    from athena_gguf.gguf_file import GGUFFile, writing_base
    from athena_gguf.gguf_file.base import check_model
    from athena_gguf.model.lazy_tensors import most_bytes

    path, mark = options.base or work / "base.gguf", work / "base.model"
    key = store.model_fingerprint(model_dir)
    there = options.base is not None
    if not there and path.exists() and mark.exists() and mark.read_text() == key:
        progress.note("base file: taken from the work directory")
        there = True
    if there:
        check_model(model_dir)
        with GGUFFile(path) as header:
            base = _Base(path, header)
            yield base
        base.kept.set_result(None)
        return
    mark.unlink(missing_ok=True)
    with (
        progress.stage("base file through llama.cpp's converter"),
        writing_base(model_dir, path, sync=False) as header,
    ):
        base = _Base(path, header, most_bytes())
        yield base
    if options.work_dir is None:
        base.kept.set_result(None)
    else:
        base.kept = aside.submit(_keep, path, mark, key)


def _kernels(stage: Stage, target: Target | None) -> None:
    """Make what encodes on GPUs while there is time; other cards load it. Errors are left to the encoding, which does
    the same."""
    import torch

    from athena_gguf.encode.stage import make_kernels
    from athena_gguf.format import TYPES

    if not stage.has_model():  # while it is opened, torch's default type of numbers is another one
        return
    kinds = set(TYPES) if target else set(stage.plan.encoded.values())
    make_kernels(stage.device, torch.cuda.Stream(stage.device), kinds)


def _keep(path: Path, mark: Path, key: str) -> None:
    from athena_gguf.gguf_file.atomic import to_disk

    try:
        to_disk(path)
        mark.write_text(key)
    except OSError as error:
        raise AthenaError(f"{path} cannot be written: {error}") from error


def _allocate(
    base_path: Path,
    plan: Any,
    calibration: Calibration,
    target: Target | None,
    metadata: dict[str, Any],
    work: Path,
    device: Any,
    options: ConvertOptions,
) -> float:
    """Choose the types of the plan's free tensors for the target; the predicted KL divergence."""
    from athena_gguf.allocate import choose_types, kept_losses, predicted_kld
    from athena_gguf.encode import EncodeOptions

    losses = kept_losses(
        work if options.work_dir else None, base_path, plan, calibration, EncodeOptions(), device, options.seed
    )
    if target is not None:
        choose_types(base_path, plan, losses, target, metadata)
    predicted = predicted_kld(plan, losses)
    if target is not None:
        metadata["athena.predicted_kld"] = predicted
    return predicted


def _in_order(stage: Stage) -> bool:
    """Whether to encode blocks in order: if not said otherwise, where that is possible."""
    from athena_gguf.calibration.prefix import possible

    options = stage.options
    if options.sequential is False or options.ray is not None:
        return False
    if not stage.fits_in_order:
        asked = "warning: --sequential is not possible: " if options.sequential else ""
        progress.note(f"{asked}layers are encoded on their own, not in order: the GPU's memory is too small for that")
        return False
    found = possible(stage.model_dir, stage.plan)
    if options.sequential and not found:
        progress.note("warning: --sequential is not possible with this model: layers are encoded on their own")
    return found


def _tunes(options: ConvertOptions, plan: Any, at_once: int | None) -> bool:
    """Whether to tune: if not said otherwise, on a GPU that holds the model twice in float32 and what training adds.
    `at_once`: windows that a GPU can learn from at a time, None without one."""
    if any(len(shape) > 2 for shape in plan.shapes.values()):
        if options.tune:
            progress.note("warning: scales and norms are not tuned: that is not possible with a mixture of experts")
        return False
    if options.tune is not None:
        return options.tune
    if at_once == 0:
        progress.note("scales and norms are not tuned: the GPU's memory is too small for this model twice in float32")
    return bool(at_once)


def _tune(stage: Stage, encoded: FinishedTensors, at_once: int | None) -> dict[str, tuple[str, Any]]:
    """Type and data of the tensors that tuning changes. `at_once`: as of `_tunes`."""
    import torch

    from athena_gguf.calibration.precision import measuring
    from athena_gguf.gguf_file import GGUFFile, quantize
    from athena_gguf.gpu import repeated
    from athena_gguf.model import load_model
    from athena_gguf.tune.stage import tune_encoded

    # Other windows than the curvature's where the model writes them, more of the same text where files are given.
    seed = stage.options.seed
    windows = stage.windows(TUNE_TOKENS, seed + 1)
    model = load_model(stage.model_dir, stage.device, torch.float32)
    with GGUFFile(stage.base_path) as base, measuring():
        try:
            found = repeated(lambda: tune_encoded(model, base, stage.plan, encoded, windows, seed, at_once))
        except torch.OutOfMemoryError as error:
            raise AthenaError(
                f"{stage.model_dir}: the GPU's memory is too small to tune: {error}; use --no-tune"
            ) from error
    norms = {name: ("F32", quantize(weight, "F32")) for name, weight in found.norms.items()}
    return norms | {name: (stage.plan.encoded[name], data) for name, data in found.data.items()}


def _write(
    base_path: Path,
    out: Path,
    plan: Any,
    encoded: FinishedTensors,
    changes: dict[str, tuple[str, Any]],
    metadata: dict[str, Any],
) -> None:
    import numpy as np

    from athena_gguf.gguf_file import Replacement, write_quantized
    from athena_gguf.plan import file_type

    changed = {name: Replacement(plan.kind(name), partial(encoded.data, name)) for name in encoded}
    for name, (kind, data) in changes.items():
        changed[name] = Replacement(kind, partial(np.asarray, data))
    write_quantized(base_path, out, changed, metadata, file_type=file_type(plan))


def _metadata(options: ConvertOptions, target: Target | None, tokens: int) -> dict[str, Any]:
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
    predicted = {} if target is None else {"athena.predicted_kld": 0.0}  # counts for the size before it is known
    return {
        "athena.format_version": FORMAT_VERSION,
        "athena.version": __version__,
        **kinds,
        "athena.calibration": [name if name == "self" else Path(name).name for name in options.calibration],
        "athena.calibration_tokens": tokens,
        "athena.calibration_window": WINDOW,
        "athena.seed": options.seed,
        "athena.device": options.device,
        "athena.damping": settings.damping,
        "athena.passes": settings.passes,
        "athena.sweeps": settings.sweeps,
        "athena.sequential": False,
        "athena.tuned": False,
        "athena.made_with": [f"{name} {version(name)}" for name in ("torch", "transformers", "numba", "numpy", "gguf")],
        **predicted,
    }
