"""What changes in curvature and encoding are worth: the whole model's KL divergence, one change at a time.

    python tools/bench_ablation.py MODEL --text TEXT3 --calibration TEXT1 --calibration TEXT2 [--type A3]
        [--device cuda] [--only CHANGE ...] [--tune] [--results FILE]

All linear layers of the blocks get one type; their decoded weights replace the original ones in torch (embeddings and
activations as they are), and the predictions for the second halves of windows of TEXT3 are compared with the original
model's, as `athena-gguf eval` does. A line of a Markdown table for each change: the tokens of calibration and on how
many of them the curvatures rest (the median over layer inputs of (sum u)^2 / sum u^2); the divergence in nats a token;
its ratio to the default's (of tuned lines to the tuned default's) with the error of the pairs of windows; the seconds
that calibration (0 where it is that of the line before) and encoding took. Changes joined by + go together:
sampled+own. With --results, lines that FILE has are not measured again.
"""

import argparse
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from athena_gguf.calibration import Curvature, measure_curvature, text_windows
from athena_gguf.calibration.precision import measuring
from athena_gguf.calibration.prefix import LocalPart, Prefix, targets
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.calibration.stage import all_of
from athena_gguf.calibration.tokens import file_windows
from athena_gguf.encode import Encoded, EncodeOptions, EncodePool, Metric, layer_metric
from athena_gguf.errors import AthenaError
from athena_gguf.format import TYPES, AType, decode_rows
from athena_gguf.gguf_file.atomic import atomic_write
from athena_gguf.memory import cores, keep_freed_memory
from athena_gguf.model import LinearLayer, load_tokenizer
from athena_gguf.model.blocks import BlockModel, open_blocks
from athena_gguf.tune import Quantized, TuneOptions, tune
from athena_gguf.tune.train import divergence

DEFAULT = "default"
TUNED = "tuned"
TUNED_DEFAULT = f"{DEFAULT}+{TUNED}"


@dataclass(frozen=True)
class Change:
    """What a line does otherwise. `tokens`: times those of the default; `power`: u_t = |g_t|^power; `own`: a curvature
    for every layer, not for every input; `sequential`: layers in order; `correction`: the a of
    athena_gguf.calibration.prefix, None: by its cross-validation; `residual`: with its L."""

    labels: str = "text"
    tokens: float = 1.0
    power: float = 1.0
    seed: int = 0
    own: bool = False
    diagonal: bool = False
    damping: float = EncodeOptions.damping
    sweeps: int = EncodeOptions.sweeps
    sequential: bool = False
    correction: float | None = None
    residual: bool = True
    tuned: bool = False
    repeated: bool = False


# Lines that share their calibration stand together: it is then measured once.
CHANGES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "damping-0.003": {"damping": 0.003},
    "damping-0.03": {"damping": 0.03},
    "diagonal": {"diagonal": True},
    "sweeps-8": {"sweeps": 8},
    "sequential": {"sequential": True},
    "sequential-0": {"sequential": True, "correction": 0.0},
    "sequential-0.35": {"sequential": True, "correction": 0.35},
    "sequential-0.65": {"sequential": True, "correction": 0.65},
    "sequential-1": {"sequential": True, "correction": 1.0},
    "gptaq-0.5": {"sequential": True, "correction": 0.5, "residual": False},
    "gptaq-1": {"sequential": True, "correction": 1.0, "residual": False},
    "default-again": {"repeated": True},
    "own": {"own": True},
    "sampled": {"labels": "sampled"},
    "u-power-0": {"power": 0.0},
    "u-power-0.5": {"power": 0.5},
    "u-power-1.5": {"power": 1.5},
    "u-power-2": {"power": 2.0},
    "tokens-x0.25": {"tokens": 0.25},
    "tokens-x0.5": {"tokens": 0.5},
    "tokens-x2": {"tokens": 2.0},
    "tokens-x4": {"tokens": 4.0},
    "other-windows-1": {"seed": 1},
    "other-windows-2": {"seed": 2},
}
PARTS = CHANGES | {TUNED: {"tuned": True}}
MEANINGS = {
    DEFAULT: "u = \\|g\\|, labels from the text, damping 0.01",
    "diagonal": "the curvature's diagonal only",
    "sequential": "in order, the correction by cross-validation (`--sequential`)",
    "sequential-0": "curvature of the quantized prefix's inputs",
    "sequential-0.35": "in order, 0.35 of the correction everywhere",
    "sequential-0.65": "in order, 0.65 of the correction everywhere",
    "sequential-1": "in order, the whole correction",
    "gptaq-0.5": "half the correction, not for the residual stream's error",
    "gptaq-1": "the correction, not for the residual stream's error (GPTAQ)",
    "own": "a curvature for every layer (q, k, v, gate and up apart)",
    "sampled": "labels sampled from the model",
    "u-power-0": "u = 1 (GPTQ)",
    "u-power-0.5": "u = \\|g\\|^0.5",
    "u-power-1.5": "u = \\|g\\|^1.5",
    "u-power-2": "u = \\|g\\|^2 (Fisher)",
    TUNED: "then tuned",
}


def change_of(name: str) -> Change:
    """Of names of CHANGES joined by +."""
    return replace(Change(), **{key: value for part in name.split("+") for key, value in PARTS[part].items()})


@dataclass
class Measured:
    """`weights`: u_t of all tokens, window by window, by the first tensor of an input."""

    curvatures: list[Curvature]
    windows: torch.Tensor
    weights: dict[str, torch.Tensor]
    seconds: float


@dataclass
class Line:
    """`klds`: of the windows, nats a token; `detail`: of the calibration; seconds of both parts of the work."""

    klds: list[float]
    detail: str
    calibration: float
    encoding: float


@dataclass
class Bench:
    """A model and what the lines have in common. `layers`: those to be quantized."""

    blocks: BlockModel
    open_copy: Callable[[], BlockModel]
    layers: Sequence[LinearLayer]
    kind: AType
    calibration: Callable[[float, int], torch.Tensor]  # windows [n, length], by `Change.tokens` and seed
    tuning: Callable[[], torch.Tensor]
    evaluation: torch.Tensor
    tune_options: TuneOptions = field(default_factory=TuneOptions)
    kept: tuple[Any, Measured] | None = None  # the last calibration, with what of the change it depends on
    encoded: tuple[Change, dict[str, Encoded], float] | None = None

    @property
    def model(self) -> Any:
        return self.blocks.model

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def line(self, change: Change) -> Line:
        measured = self.measure(change)
        encoded, seconds = self.encode(replace(change, tuned=False), measured)
        if change.tuned:
            start = time.monotonic()
            decoded, norms = self.tune(encoded)
            seconds += time.monotonic() - start
        else:
            decoded, norms = self.decode({name: e.data for name, e in encoded.items()}), {}
        klds = self.compare(decoded, norms)
        effective = [c.about.effective_tokens for c in measured.curvatures]
        detail = f"{measured.windows.numel():,}, {np.median(effective):,.0f}"
        return Line(klds, detail, measured.seconds, seconds)

    def measure(self, change: Change) -> Measured:
        """The curvatures of the inputs, in the forward pass's order."""
        key = (change.labels, change.tokens, change.power, change.seed, change.own, change.repeated)
        if self.kept is not None and self.kept[0] == key:
            return replace(self.kept[1], seconds=0.0)
        self.kept = None
        start = time.monotonic()
        windows = self.calibration(change.tokens, change.seed)

        def weigh(names: tuple[str, ...], squares: torch.Tensor) -> torch.Tensor:
            return squares ** (change.power / 2)

        def measured(layers: Sequence[LinearLayer], some: torch.Tensor) -> list[Curvature]:
            batch = 2 if self.device.type == "cpu" else 16
            return measure_curvature(self.model, layers, some, batch, change.labels, weigh=weigh, with_weights=True)

        with measuring():
            if change.own:
                # Layers that read one input share its curvature, so they are measured one after the other.
                together = [c.about.tensor_names for c in measured(self.layers, windows[:1])]
                by_name = {layer.tensor_name: layer for layer in self.layers}
                found: list[Curvature] = []
                for place in range(max(map(len, together))):
                    found += measured([by_name[names[place]] for names in together if len(names) > place], windows)
                order = list(by_name)
                found.sort(key=lambda c: order.index(c.about.tensor_names[0]))
            else:
                found = measured(self.layers, windows)
        weights = {c.about.tensor_names[0]: c.weights for c in found if c.weights is not None}
        result = Measured(found, windows, weights, time.monotonic() - start)
        self.kept = key, result
        return result

    def encode(self, change: Change, measured: Measured) -> tuple[dict[str, Encoded], float]:
        """By tensor name, and the seconds it took."""
        if self.encoded is None or self.encoded[0] != change:
            self.encoded = None
            start = time.monotonic()
            if change.sequential:
                found = self.encode_in_order(change, measured)
            else:
                found = self.encode_under(change, measured.curvatures)
            self.encoded = change, found, time.monotonic() - start
        return self.encoded[1], self.encoded[2]

    def encode_under(self, change: Change, curvatures: Sequence[Curvature]) -> dict[str, Encoded]:
        by_name = {layer.tensor_name: layer for layer in self.layers}
        found = {}
        with self.pool(change) as pool:
            for curvature in curvatures:
                names = curvature.about.tensor_names
                metric = self.metric(change, curvature.matrix, names[0])
                weights = [by_name[name].module.weight for name in names]
                found |= dict(zip(names, pool.submit_together(weights, metric, self.kind)(), strict=True))
        return found

    def encode_in_order(self, change: Change, measured: Measured) -> dict[str, Encoded]:
        """As athena_gguf.encode.in_order, of a model in memory."""
        batch, memory = 2 if self.device.type == "cpu" else 16, Shelf(self.device, 1 << 62, 0, Path())
        prefix = Prefix(self.layers, LocalPart(self.blocks, self.open_copy(), measured.windows, batch, memory))
        by_name = {layer.tensor_name: layer for layer in self.layers}
        by_block: dict[int, list[tuple[str, ...]]] = {}
        for curvature in measured.curvatures:
            names = curvature.about.tensor_names
            by_block.setdefault(prefix.places[names[0]][0], []).append(names)
        found: dict[str, Encoded] = {}
        prefix.begin()
        for index in range(max(by_block) + 1):
            with prefix.block(index) as anatomy:
                for names in by_block.get(index, []):
                    modules = [prefix.places[name][1] for name in names]
                    place = anatomy.streams.get(modules[0]) if change.residual else None
                    halves = prefix.moments(index, modules[0], measured.weights[names[0]], place)
                    weights = [by_name[n].module.weight.float() for n in names]
                    h, wanted = targets(weights, halves, change.damping, change.correction)
                    with self.pool(change) as pool:
                        metric = self.metric(change, h, names[0])
                        encoded = pool.submit_together(wanted, metric, self.kind)()
                    found |= dict(zip(names, encoded, strict=True))
                    decoded = self.decode({name: found[name].data for name in names})
                    for name, module in zip(names, modules, strict=True):
                        prefix.put(index, module, decoded[name])
                prefix.go_on(index)
        return found

    def pool(self, change: Change) -> EncodePool:
        return EncodePool(EncodeOptions(change.damping, sweeps=change.sweeps), cores(), self.device)

    def metric(self, change: Change, matrix: torch.Tensor, name: str) -> Metric:
        matrix = torch.diag(matrix.diagonal()) if change.diagonal else matrix
        return layer_metric(matrix, len(matrix), change.damping, name, self.device)

    def decode(self, data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        columns = {layer.tensor_name: layer.module.weight.shape[1] for layer in self.layers}
        return {
            name: torch.from_numpy(decode_rows(self.kind, rows, columns[name])).to(self.device)
            for name, rows in data.items()
        }

    def tune(self, encoded: dict[str, Encoded]) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
        """Decoded weights after tuning, and what is to be added to the norms."""
        by_name = {layer.tensor_name: layer for layer in self.layers}

        def quantized(name: str) -> Quantized:
            return Quantized(self.kind, encoded[name].data, by_name[name].module.weight.float().cpu().numpy())

        norms = {
            name.removesuffix(".weight"): name.removesuffix(".weight")
            for name, weight in self.model.named_parameters()
            if weight.ndim == 1 and name.endswith(".weight")
        }
        matrices = {layer.module_name: layer.tensor_name for layer in self.layers}
        with measuring():
            found = tune(self.model, matrices, norms, quantized, self.tuning(), self.tune_options)
        return self.decode({name: e.data for name, e in encoded.items()} | found.data), found.norms

    def compare(self, decoded: dict[str, torch.Tensor], norms: dict[str, np.ndarray]) -> list[float]:
        """The divergence of every window."""
        student = self.open_copy().model
        for layer in self.layers:
            student.get_submodule(layer.module_name).weight.copy_(decoded[layer.tensor_name])
        for name, change in norms.items():
            student.get_submodule(name).weight.add_(torch.from_numpy(change).to(self.device))
        length, found = self.evaluation.shape[1], []
        with torch.no_grad():
            for windows in self.evaluation.split(2):
                # As llama-perplexity: predictions of the tokens after the middle one, without that after the last.
                whole = divergence(self.model, student, windows.to(self.device))
                found += whole[:, length // 2 : length - 1].double().mean(1).tolist()
        return found


def opened(model_dir: Path, device: torch.device) -> BlockModel:
    """The model in float32, all of it loaded."""
    found = open_blocks(model_dir, device, torch.float32, resident=1 << 62)
    if found is None:
        raise AthenaError(f"{model_dir}: this model cannot be run block by block")
    for index in range(len(found.blocks)):
        with found.loaded(index):
            pass
    return found


def block_layers(blocks: BlockModel, chosen: Sequence[int] | None) -> list[LinearLayer]:
    """The linear layers of the blocks, called by their modules' names."""
    found = []
    for index, block in enumerate(blocks.blocks):
        if chosen is None or index in chosen:
            inside = ((blocks.names[id(m)], m) for m in block.modules() if isinstance(m, torch.nn.Linear))
            found += [LinearLayer(name, name, module) for name, module in inside]
    return found


def ratio(these: Sequence[float], those: Sequence[float]) -> tuple[float, float]:
    """Of the means of two measurements of the same windows, and its standard error."""
    a, b = np.array(these), np.array(those)
    value = a.mean() / b.mean()
    return float(value), standard_error(a - value * b) / float(b.mean())


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def cells(name: str, line: Line, default: Line | None) -> str:
    meaning = [MEANINGS[part] for part in name.split("+") if part in MEANINGS]
    shown = [f"{name}: {', '.join(meaning)}" if meaning else name, line.detail]
    shown.append(f"{np.mean(line.klds):.4f} ± {standard_error(np.array(line.klds)):.4f}")
    shown.append("{:.4f} ± {:.4f}".format(*ratio(line.klds, default.klds)) if default else "")
    return "| " + " | ".join([*shown, f"{line.calibration:.1f}", f"{line.encoding:.1f}"]) + " |"


class Results:
    """Lines measured before, under the same settings; in a file if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.lines: dict[str, Line] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise AthenaError(f"{path} is of other settings: {kept['settings']}")
            self.lines = {name: Line(**line) for name, line in kept["lines"].items()}

    def reference(self, name: str) -> Line | None:
        """What a line is compared with."""
        default = self.lines.get(DEFAULT)
        if change_of(name).tuned and name != TUNED_DEFAULT:
            return self.lines.get(TUNED_DEFAULT, default)
        return default

    def put(self, name: str, line: Line) -> None:
        self.lines[name] = line
        if self.path is not None:
            kept = {"settings": self.settings, "lines": {name: vars(line) for name, line in self.lines.items()}}
            with atomic_write(self.path) as out:
                out.write(json.dumps(kept, indent=1).encode())


@contextmanager
def freed() -> Iterator[None]:
    """What the block has left behind on the device is given back."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(bench: Bench, names: Sequence[str], results: Results) -> int:
    """Print the lines as they are measured; the number of those that failed."""
    titles = ["change", "tokens, effective", "KLD", "ratio to the default", "calibration, s", "encoding, s"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    failed = 0
    for name in names:
        try:
            if name not in results.lines:
                with freed():
                    results.put(name, bench.line(change_of(name)))
            print(cells(name, results.lines[name], results.reference(name)), flush=True)
        except Exception as error:  # the other lines go on
            failed += 1
            traceback.print_exc()
            message = str(error).splitlines() or [""]
            print(f"| {name} | failed: {type(error).__name__}: {message[0][:200]} | | | | |", flush=True)
            bench.kept = bench.encoded = None
    return failed


def chosen_names(given: Sequence[str] | None, tuned: bool) -> list[str]:
    names = list(given or CHANGES)
    for name in names:
        for part in name.split("+"):
            if part not in PARTS:
                raise AthenaError(f"no change is called {part}; there are {', '.join(PARTS)}")
    return [line for name in names for line in ([name, f"{name}+{TUNED}"] if tuned else [name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to evaluate on")
    parser.add_argument("--calibration", type=Path, action="append", required=True, help="text file; repeatable")
    parser.add_argument("--type", default="A3", choices=list(TYPES))
    parser.add_argument("--tokens", type=int, default=98_304, help="of calibration in the default")
    parser.add_argument("--windows", type=int, default=60, help="of the evaluation")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--blocks", type=int, nargs="+", help="quantize only these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="CHANGE", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--tune", action="store_true", help="every line once more after tuning")
    parser.add_argument("--tune-tokens", type=int, default=524_288)
    parser.add_argument("--tune-steps", type=int, default=TuneOptions.steps)
    parser.add_argument("--results", type=Path, help="JSON file that keeps the lines")
    args = parser.parse_args()
    names = chosen_names(args.only, args.tune)
    free = {"device", "only", "tune", "results"}
    results = Results(args.results, {k: str(v) for k, v in sorted(vars(args).items()) if k not in free})
    keep_freed_memory()
    device = all_of(torch.device(args.device))[0]
    tokenizer, blocks = load_tokenizer(args.model), opened(args.model, device)

    def windows(tokens: float, seed: int) -> torch.Tensor:
        return text_windows(tokenizer, args.calibration, round(tokens), args.window, seed)

    bench = Bench(
        blocks,
        lambda: opened(args.model, device),
        block_layers(blocks, args.blocks),
        TYPES[args.type],
        lambda tokens, seed: windows(tokens * args.tokens, seed),
        lambda: windows(args.tune_tokens, 1),
        file_windows(tokenizer, args.text, args.window)[: args.windows],
        replace(TuneOptions(), steps=args.tune_steps),
    )
    return 1 if report(bench, names, results) else 0


if __name__ == "__main__":
    sys.exit(main())
