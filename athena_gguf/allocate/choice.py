"""The types of a plan for a target: losses measured or kept, sizes counted, the best choice taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.allocate.losses import METHOD, Losses, candidates, measure_losses
from athena_gguf.allocate.solve import choose
from athena_gguf.allocate.target import Target, runtime_bytes
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile, result_bytes, tensor_bytes

if TYPE_CHECKING:
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.plan import Plan


def kept_losses(
    work: Path | None, base_path: Path, plan: Plan, measured: Calibration, settings: Any, device: Any, seed: int
) -> Losses:
    """`measure_losses`, or what it found before for the same inputs, kept in the folder `work`."""
    from athena_gguf.calibration import store
    from athena_gguf.gguf_file.atomic import atomic_write

    kinds = {name: candidates(plan, name) for name in plan.shapes}
    key = store.derived_fingerprint(measured.key, [base_path], METHOD, vars(settings), seed, kinds)
    path = work / "losses.json" if work else None
    if path is not None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                progress.note("losses of the types: taken from the work directory")
                return {str(name): dict(of) for name, of in kept["losses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # absent or damaged: measure again
    losses = measure_losses(base_path, plan, measured, settings, device, seed)
    if path is not None:
        with atomic_write(path) as file:
            file.write(json.dumps({"key": key, "losses": losses}).encode())
    return losses


def predicted_kld(plan: Plan, losses: Losses) -> float:
    """The sum of all losses, in nats a token; what is as exact as the base file counts as none."""
    return sum(losses[name].get(plan.kind(name), 0.0) for name in plan.shapes)


def check_target(base: GGUFFile, plan: Plan, target: Target, metadata: Mapping[str, Any]) -> None:
    """Raise as `choose_types` before any work, and say if there is more memory than the model can use. Needs no more
    than the header of `base`."""
    sizes, room = sizes_and_room(base, plan, target, metadata)
    if target.memory is not None and room == sum(max(of.values()) for of in sizes.values()):
        progress.note(
            f"{target.option}: {target.name} is all that this model can use, or more: what is to be chosen stays as it "
            "is in the base file, and nothing is lost"
        )


def choose_types(base_path: Path, plan: Plan, losses: Losses, target: Target, metadata: Mapping[str, Any]) -> None:
    """Give every free tensor of `plan` the type that makes the sum of losses least within the target.

    `metadata`: what the file will hold beside the base file's, which counts for its size. Raises AthenaError saying
    the limits if no choice is as small, or none as large as the target; but memory may be more than any choice takes.
    """
    with GGUFFile(base_path) as base:
        sizes, room = sizes_and_room(base, plan, target, metadata)
    losses_of = [[losses[name][kind] for kind in of] for name, of in sizes.items()]
    chosen = choose([list(of.values()) for of in sizes.values()], losses_of, room)
    assert chosen is not None  # the smallest of all types fit
    for (name, of), at in zip(sizes.items(), chosen, strict=True):
        plan.set_type(name, list(of)[at])


def sizes_and_room(
    base: GGUFFile, plan: Plan, target: Target, metadata: Mapping[str, Any]
) -> tuple[dict[str, dict[str, int]], int]:
    """Bytes of every free tensor of `plan` in each of its candidate types, and what the chosen ones may take together.

    Raises as `choose_types`.
    """
    # Bits a weight are those of tensors alone; in a file they are filled up to its alignment.
    alignment = 1 if target.bpw is not None else base.alignment
    sizes = {
        name: {kind: _padded(tensor_bytes(base.tensors[name], kind), alignment) for kind in candidates(plan, name)}
        for name in plan.shapes
        if name in plan.free
    }
    stored = sum(of[plan.stored[name]] for name, of in sizes.items())
    fixed, budget, limits = _budget(base, plan, target, metadata, stored)
    smallest, largest = (fixed + sum(pick(of.values()) for of in sizes.values()) for pick in (min, max))
    possible = f"possible is {limits(smallest, largest)} (all as in the base file)"
    if budget > largest and target.memory is None:
        raise AthenaError(f"{target.option}: {target.name} is more than this model can use; {possible}")
    if budget < smallest:
        raise AthenaError(f"{target.option}: {target.name} is too small for this model; {possible}")
    return sizes, min(budget, largest) - fixed


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _budget(
    base: GGUFFile, plan: Plan, target: Target, metadata: Mapping[str, Any], stored: int
) -> tuple[int, int, Any]:
    """Bytes of all that is not free, bytes of the whole at most, and how to say two limits of the latter.

    `stored`: bytes of the free tensors as the base file has them.
    """
    changed = {name: kind for name, kind in (plan.encoded | plan.standard).items() if name not in plan.free}
    if target.bpw is not None:
        weights = base.n_elements
        fixed = -stored + sum(tensor_bytes(t, changed.get(t.name, t.type_name)) for t in base)
        return (
            fixed,
            int(target.bpw * weights / 8),
            lambda a, b: f"{8 * a / weights:.3f} to {8 * b / weights:.3f} bits a weight",
        )
    fixed = result_bytes(base, changed, metadata, file_type=0) - stored
    mib = 2**20
    if target.memory is None:
        assert target.size is not None
        return fixed, target.size, lambda a, b: f"{a / mib:.1f} to {b / mib:.1f} MiB"
    beside = runtime_bytes(base.metadata, target.context)
    return (
        fixed + beside,
        target.memory,
        lambda a, b: f"{a / mib:.1f} to {b / mib:.1f} MiB, {beside / mib:.1f} MiB of it beside the file",
    )
