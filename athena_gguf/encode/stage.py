"""The encoding of a conversion: curvatures in, finished tensors in a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.memory import cores

if TYPE_CHECKING:
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.encode import Encoded
    from athena_gguf.encode.finished import FinishedTensors
    from athena_gguf.plan import Plan

NOT_FED = "no linear layer of the model feeds it"
WRITES = 8  # finished tensors that wait for the disk, at most
IN_FLIGHT = 1 << 28  # weights that wait for their encoding, at most; a larger tensor waits alone


def encode_tensors(
    base_path: Path,
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    device: Any,
    timed: Callable[[str], Any],
) -> FinishedTensors:
    """Every tensor of `plan.encoded`, as the curvatures come; those that an earlier conversion finished are taken from
    `folder`. Raises AthenaError naming the tensor if its curvature is none, or if the disk has no room."""
    from athena_gguf.calibration import store
    from athena_gguf.encode import EncodeOptions, EncodePool, finished, layer_metric
    from athena_gguf.encode.pool import PIECE
    from athena_gguf.format import TYPES
    from athena_gguf.gguf_file import GGUFFile

    settings, threads = EncodeOptions(), cores()
    key = store.derived_fingerprint(calibration.key, [base_path], finished.METHOD, vars(settings))
    done = finished.FinishedTensors(folder, key)
    found = {name for name, kind in plan.encoded.items() if done.find(name, kind)}
    if found:
        progress.note(f"encoding: {len(found)} of {len(plan.encoded)} tensors are taken from the work directory")
    on_gpu = device.type == "cuda"
    waiting: deque[tuple[str, Callable[[], Encoded]]] = deque()
    written: list[Future[None]] = []
    with (
        GGUFFile(base_path) as base,
        progress.bar("encoding", sum(map(plan.elements, plan.encoded))) as advance,
        ThreadPoolExecutor(1, "finished tensors") as writer,
        EncodePool(settings, threads, device) as pool,
    ):
        advance(sum(map(plan.elements, found)))

        def collect(elements: int) -> None:
            """Wait until at most so many elements are in flight."""
            while sum(plan.elements(name) for name, _ in waiting) > elements:
                name, result = waiting.popleft()
                written.append(writer.submit(done.put, name, plan.encoded[name], result()))
                if len(written) > WRITES:
                    written.pop(0).result()
                advance(plan.elements(name))

        def start(matrix: Any, names: list[str]) -> None:
            columns = plan.shapes[names[0]][-1]
            if on_gpu:  # which holds one metric at a time
                collect(0)
            metric = layer_metric(matrix, columns, settings.damping, names[0], device)
            for name in names:
                weight = base.tensors[name].to_torch(device)
                waiting.append((name, pool.submit(weight, metric, TYPES[plan.encoded[name]])))
                # Enough that no thread waits; weights in float32 and their layers' curvatures in five forms are held.
                collect(min(4 * threads * PIECE * columns, IN_FLIGHT))

        for name in plan.encoded:
            if name not in plan.curved and name not in found:  # embeddings that only look up rows
                with timed("encoding"):
                    start(None, [name])
        needed = set(plan.encoded) - found
        known = found if calibration.keep else plan.curved - needed
        # What works on the CPU would share it with the measurement, and both would wait for each other.
        for curvature in calibration.stream(known, pause=(lambda: None) if on_gpu else (lambda: collect(0))):
            names = [name for name in curvature.about.tensor_names if name in needed]
            if names:
                with timed("encoding"):
                    start(curvature.matrix, names)
            del curvature
        with timed("encoding"):
            collect(0)
            for write in written:
                write.result()
    for name in sorted(calibration.absent & plan.encoded.keys()):
        plan.keep_standard(name, NOT_FED)
    return done
