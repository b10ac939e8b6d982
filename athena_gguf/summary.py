"""What a conversion did, printed at its end, and what one would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, result_bytes, tensor_bytes
from athena_gguf.plan import EMBEDDINGS, block_of, file_type
from athena_gguf.report.inspection import bits_per_weight

if TYPE_CHECKING:
    from athena_gguf.calibration import LayerInput
    from athena_gguf.conversion import Stages
    from athena_gguf.plan import Plan

# An input whose curvature rests on fewer tokens than this many times its columns has noise in it.
TOKENS_PER_COLUMN = 4


@dataclass(frozen=True)
class Result:
    """What a conversion made, or would make. `bytes`: of the file, `bpw`: bits of all tensors a weight,
    `predicted_kld`: nats a token, None where nothing was predicted, `types`: of every matrix. Of a file that was
    written also `losses`: of every encoded tensor, as a share (0 to 1) of its power under the curvature, and
    `seconds` of every stage, what was done `beside` them by other threads, and `spans`, from the first beginning of a
    stage to its last end since the conversion began."""

    bytes: int
    bpw: float
    predicted_kld: float | None
    types: dict[str, str]
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)


def print_summary(
    out: Path, plan: Plan, losses: Mapping[str, float], inputs: Sequence[LayerInput], stages: Stages
) -> Result:
    """Types and losses of tensors, effective tokens of inputs, size, bits a weight, time of every stage, on stderr."""
    if len({plan.kind(name) for name in plan.shapes if name not in EMBEDDINGS}) > 1:
        _grid("types", {name: plan.kind(name) for name in plan.shapes})
    if losses:
        cells = {name: f"{100 * loss:.3f}" for name, loss in losses.items()}
        _grid("loss of the encoding, % of the power under the curvature", cells)
    tokens = {_input_name(c): f"{c.effective_tokens:.0f}" for c in inputs}
    _grid(f"effective calibration tokens, of {inputs[0].tokens:,}", tokens)
    weights = sum(plan.elements(n) for n in losses)
    bits = sum(plan.elements(n) * TYPES[plan.encoded[n]].bits_per_weight for n in losses)
    with GGUFFile(out) as written:
        over_all, predicted = bits_per_weight(written), written.metadata.get("athena.predicted_kld")
    _warn_of_noise(inputs, losses.keys(), predicted is not None)
    size = out.stat().st_size
    if losses:
        progress.note(f"encoded: {len(losses)} tensors, {weights:,} weights at {bits / weights:.3f} bits")
    progress.note(f"types: {_mix(plan)}")
    progress.note(f"{out}: {size / 2**20:.1f} MiB, {over_all:.3f} bits a weight over all")
    if predicted is not None:
        progress.note(f"predicted KL divergence from the base file: {predicted:.4g} nats a token")
    times, meanwhile = (
        ", ".join(f"{name} {s:.1f} s" for name, s in of.items()) for of in (stages.seconds, stages.beside)
    )
    beside = f"; beside them {meanwhile}" if meanwhile else ""
    progress.note(f"time: {times}; total {sum(stages.seconds.values()):.1f} s{beside}")
    types = {name: plan.kind(name) for name in plan.shapes}
    return Result(
        size,
        over_all,
        predicted if isinstance(predicted, float) else None,
        types,
        dict(losses),
        stages.seconds,
        stages.beside,
        stages.spans,
    )


def print_plan(
    base_path: Path, plan: Plan, metadata: Mapping[str, Any], predicted: float, inputs: Sequence[LayerInput]
) -> Result:
    """The type of every matrix, the file's exact size, its bits a weight and predicted KL divergence, on stdout; on
    stderr why that prediction may be wrong."""
    kinds = plan.encoded | plan.standard
    with GGUFFile(base_path) as base:
        size = result_bytes(base, kinds, metadata, file_type=file_type(plan))
        bits = 8 * sum(tensor_bytes(t, kinds.get(t.name, t.type_name)) for t in base) / base.n_elements
    types = {name: plan.kind(name) for name in plan.shapes}
    _warn_of_noise(inputs, plan.encoded.keys(), True)
    _grid("types", types, print)
    print(f"types: {_mix(plan)}")
    print(f"size: {size:,} bytes ({size / 2**20:.1f} MiB), {bits:.3f} bits a weight over all")
    print(f"predicted KL divergence from the base file: {predicted:.4g} nats a token")
    return Result(size, bits, predicted, types)


def _warn_of_noise(inputs: Sequence[LayerInput], encoded: Set[str], predicted: bool) -> None:
    """Say for which inputs of `encoded` tensors there were too few tokens; and what that means if a KL divergence was
    `predicted`: an encoding suits the noise in a curvature too, by which its loss is counted."""
    used = [c for c in inputs if not encoded.isdisjoint(c.tensor_names)]
    few = [c for c in used if c.effective_tokens < TOKENS_PER_COLUMN * c.columns]
    if few:
        worst = min(few, key=lambda c: c.effective_tokens / c.columns)
        meaning = "the predicted KL divergence is too low then, and " if predicted else ""
        progress.note(
            f"warning: the curvature of {len(few)} of {len(inputs)} layer inputs rests on fewer than "
            f"{TOKENS_PER_COLUMN} tokens a column; {meaning}more --calibration-tokens would help. Least has "
            f"{worst.tensor_names[0]}: {worst.effective_tokens:.0f} tokens for {worst.columns} columns"
        )
    missed = [c for c in used if c.unreached]
    if missed:
        progress.note(
            f"warning: no calibration token reached {sum(c.unreached for c in missed)} experts of {len(missed)} layer "
            "inputs, which take the curvature of the others there (inside an expert: none); more --calibration-tokens "
            f"would help. Most are in {max(missed, key=lambda c: c.unreached).tensor_names[0]}"
        )


def _mix(plan: Plan) -> str:
    """How many matrices and weights get each type, most weights first."""
    tensors, weights = Counter[str](), Counter[str]()
    for name in plan.shapes:
        tensors[plan.kind(name)] += 1
        weights[plan.kind(name)] += plan.elements(name)
    whole = sum(weights.values())
    return ", ".join(f"{kind} {tensors[kind]} tensors, {n / whole:.1%} of weights" for kind, n in weights.most_common())


def _input_name(about: LayerInput) -> str:
    """The tensors that share an input, as `blk.3.attn_q+k+v`."""
    first, *others = (name.removesuffix(".weight") for name in about.tensor_names)
    return first + "".join("+" + other.rsplit("_", 1)[-1] for other in others)


def _grid(title: str, cells: Mapping[str, str], say: Callable[[str], None] = progress.note) -> None:
    """`blk.N.name` cells as a table of N by name; the rest, a line each."""
    rows: dict[int, dict[str, str]] = {}
    single = {}
    for name, text in cells.items():
        found = block_of(name)
        if found:
            rows.setdefault(found[0], {})[found[1]] = text
        else:
            single[name] = text
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    say(f"{title}:")
    if rows:
        width = [max(len(c), 8) for c in columns]
        say("  block " + " ".join(c.rjust(w) for c, w in zip(columns, width, strict=True)))
        for number in sorted(rows):
            row = rows[number]
            say(f"  {number:>5} " + " ".join(row.get(c, "-").rjust(w) for c, w in zip(columns, width, strict=True)))
    for name, text in single.items():
        say(f"  {name} {text}")
