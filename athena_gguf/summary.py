"""What a conversion did, printed at its end, and what one would do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.gguf_file import GGUFFile, result_bytes, tensor_bytes
from athena_gguf.plan import EMBEDDINGS, file_type
from athena_gguf.report.inspection import bits_per_weight

if TYPE_CHECKING:
    from athena_gguf.calibration import Curvature
    from athena_gguf.plan import Plan

# An input whose curvature rests on fewer tokens than this many times its columns has noise in it.
TOKENS_PER_COLUMN = 4


def print_summary(
    out: Path, plan: Plan, encoded: Mapping[str, Any], curvatures: list[Curvature], seconds: Mapping[str, float]
) -> None:
    """Types and losses of tensors, effective tokens of inputs, size, bits a weight, time of every stage, on stderr."""
    if len({plan.kind(name) for name in plan.shapes if name not in EMBEDDINGS}) > 1:
        _grid("types", {name: plan.kind(name) for name in plan.shapes})
    losses = {name: f"{100 * e.loss / e.power if e.power else 0.0:.3f}" for name, e in encoded.items()}
    if losses:
        _grid("loss of the encoding, % of the power under the curvature", losses)
    tokens = {_input_name(c): f"{c.effective_tokens:.0f}" for c in curvatures}
    _grid(f"effective calibration tokens, of {curvatures[0].tokens:,}", tokens)
    few = [
        c
        for c in curvatures
        if c.effective_tokens < TOKENS_PER_COLUMN * len(c.matrix) and not encoded.keys().isdisjoint(c.tensor_names)
    ]
    if few:
        worst = min(few, key=lambda c: c.effective_tokens / len(c.matrix))
        progress.note(
            f"warning: the curvature of {len(few)} of {len(curvatures)} layer inputs rests on fewer than "
            f"{TOKENS_PER_COLUMN} tokens a column; more --calibration-tokens would help. Least has "
            f"{worst.tensor_names[0]}: {worst.effective_tokens:.0f} tokens for {len(worst.matrix)} columns"
        )
    weights = sum(plan.elements(n) for n in encoded)
    bits = 8 * sum(e.data.nbytes for e in encoded.values())
    with GGUFFile(out) as written:
        over_all, predicted = bits_per_weight(written), written.metadata.get("athena.predicted_kld")
    size = out.stat().st_size
    if encoded:
        progress.note(f"encoded: {len(encoded)} tensors, {weights:,} weights at {bits / weights:.3f} bits")
    progress.note(f"types: {_mix(plan)}")
    progress.note(f"{out}: {size / 2**20:.1f} MiB, {over_all:.3f} bits a weight over all")
    if predicted is not None:
        progress.note(f"predicted KL divergence from the base file: {predicted:.4g} nats a token")
    times = ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
    progress.note(f"time: {times}; total {sum(seconds.values()):.1f} s")


def print_plan(base_path: Path, plan: Plan, metadata: Mapping[str, Any], predicted: float) -> None:
    """The type of every matrix, the file's exact size, its bits a weight and predicted KL divergence, on stdout."""
    kinds = plan.encoded | plan.standard
    size = result_bytes(base_path, kinds, metadata, file_type=file_type(plan))
    with GGUFFile(base_path) as base:
        bits = 8 * sum(tensor_bytes(t, kinds.get(t.name, t.type_name)) for t in base) / base.n_elements
    _grid("types", {name: plan.kind(name) for name in plan.shapes}, print)
    print(f"types: {_mix(plan)}")
    print(f"size: {size:,} bytes ({size / 2**20:.1f} MiB), {bits:.3f} bits a weight over all")
    print(f"predicted KL divergence from the base file: {predicted:.4g} nats a token")


def _mix(plan: Plan) -> str:
    """How many matrices and weights get each type, most weights first."""
    tensors, weights = Counter[str](), Counter[str]()
    for name in plan.shapes:
        tensors[plan.kind(name)] += 1
        weights[plan.kind(name)] += plan.elements(name)
    whole = sum(weights.values())
    return ", ".join(f"{kind} {tensors[kind]} tensors, {n / whole:.1%} of weights" for kind, n in weights.most_common())


def _input_name(curvature: Curvature) -> str:
    """The tensors that share an input, as `blk.3.attn_q+k+v`."""
    first, *others = (name.removesuffix(".weight") for name in curvature.tensor_names)
    return first + "".join("+" + other.rsplit("_", 1)[-1] for other in others)


def _grid(title: str, cells: Mapping[str, str], say: Callable[[str], None] = progress.note) -> None:
    """`blk.N.name` cells as a table of N by name; the rest, a line each."""
    rows: dict[str, dict[str, str]] = {}
    single = {}
    for name, text in cells.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+?)(\.weight)?", name)
        if match:
            rows.setdefault(match[1], {})[match[2]] = text
        else:
            single[name] = text
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    say(f"{title}:")
    if rows:
        width = [max(len(c), 8) for c in columns]
        progress.note("  block " + " ".join(c.rjust(w) for c, w in zip(columns, width, strict=True)))
        for number in sorted(rows, key=int):
            row = rows[number]
            say(f"  {number:>5} " + " ".join(row.get(c, "-").rjust(w) for c, w in zip(columns, width, strict=True)))
    for name, text in single.items():
        say(f"  {name} {text}")
