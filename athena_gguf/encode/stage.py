"""The encoding of a conversion: curvatures in, finished tensors in a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from athena_gguf import progress
from athena_gguf.memory import cores

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.prefix import Prefix
    from athena_gguf.calibration.store import Calibration
    from athena_gguf.cards import Card
    from athena_gguf.cluster import Cluster
    from athena_gguf.encode import Encoded, EncodeOptions
    from athena_gguf.encode.finished import FinishedTensors
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan

NOT_FED = "no linear layer of the model feeds it"
WRITES = 8  # finished tensors that wait for the disk, at most
IN_FLIGHT = 1 << 28  # weights that wait for their encoding on the CPU, at most; a larger tensor waits alone
_COMPILING = Lock()


def encode_tensors(
    base_path: Path,
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    device: torch.device,
    timed: Callable[[str], Any],
    overlap: bool = True,
    cluster: Cluster | None = None,
    cards: Sequence[Card] = (),
    prefix: Callable[[], AbstractContextManager[Prefix]] | None = None,
) -> FinishedTensors:
    """Every tensor of `plan.encoded`, as the curvatures come, and every one of `plan.standard` meanwhile; those that an
    earlier conversion finished are taken from `folder`. `overlap`: the devices have memory enough to encode while the
    next curvatures are measured. `cluster`: encodes, instead of this process; `cards`: beside it. `prefix` opens
    what gives blocks' tensors the inputs under which they are encoded in order, after all else. Raises AthenaError
    naming the tensor if its curvature is none, or if the disk has no room."""
    from athena_gguf.calibration import store
    from athena_gguf.encode import EncodeOptions, finished
    from athena_gguf.encode.in_order import InOrder
    from athena_gguf.gguf_file import GGUFFile

    settings = EncodeOptions()
    # In order, what is encoded depends on all that was encoded before.
    sequence = () if prefix is None else (plan.encoded, plan.standard)
    key = store.derived_fingerprint(calibration.key, [base_path], finished.METHOD, vars(settings), *sequence)
    done = finished.FinishedTensors(folder, key)
    found = {name for name, kind in (plan.encoded | plan.standard).items() if done.find(name, kind)}
    if found:
        progress.note(f"{len(found)} finished tensors are taken from the work directory")
    on_gpu = (device.type == "cuda" or bool(cards)) and cluster is None

    def queue_for(writer: Writer) -> Queue:
        if cluster is not None:
            from athena_gguf.encode.ray_queue import RayQueue

            return RayQueue(plan, base, settings, writer, cluster, measures=device.type == "cpu")
        if on_gpu:
            from athena_gguf.encode.card_queue import CardQueue

            return CardQueue(plan, base, settings, writer, device, cards, overlap, found)
        return _CpuQueue(plan, base, settings, writer)

    with (
        GGUFFile(base_path) as base,
        progress.late_bar("encoding", sum(map(plan.elements, plan.encoded))) as advance,
        Writer(plan, base, done, advance) as writer,
        queue_for(writer) as queue,
    ):
        if found:
            advance(sum(plan.elements(name) for name in found if name in plan.encoded))
        standard = [name for name in plan.standard if name not in found]
        order = None if prefix is None else InOrder(prefix, plan, base, settings, writer, timed, cards)
        if on_gpu or order is not None:
            writer.quantize(standard)
        for name in plan.encoded:
            if name not in plan.curved and name not in found:  # embeddings that only look up rows
                with timed("encoding"):
                    advance(0)
                    queue.add(None, [name])
        needed = set(plan.encoded) - found
        known = found if calibration.keep else plan.curved - needed
        for curvature in calibration.stream(known, queue.pause, with_weights=order is not None):
            names = [name for name in curvature.about.tensor_names if name in plan.encoded]
            if not needed.isdisjoint(names) and not (order and order.take(curvature, names)):
                with timed("encoding"):
                    advance(0)
                    queue.add(curvature.matrix, names if on_gpu else [name for name in names if name in needed])
            del curvature
        absent = sorted(calibration.absent & plan.encoded.keys())
        for name in absent:
            plan.keep_standard(name, NOT_FED)
        with timed("encoding"):
            queue.drain()
            writer.quantize(absent if on_gpu or order else [*standard, *absent])
        if order is not None:
            order.run()
        with timed("encoding"):
            writer.drain()
    return done


def make_kernels(device: torch.device, stream: torch.cuda.Stream | None, kinds: set[str]) -> None:
    """Encode next to nothing in each of the A types `kinds`, so that the kernels are there when the first curvature is;
    one thread at a time, since others would make the same. Raises AthenaError if they cannot be made."""
    import torch

    from athena_gguf.encode import EncodeOptions, Metric
    from athena_gguf.encode.cuda.launch import cache_explained, require_cuda
    from athena_gguf.encode.matrix import encode_each
    from athena_gguf.format import GROUP, TYPES

    require_cuda()
    with _COMPILING, cache_explained(), torch.cuda.device(device), torch.cuda.stream(stream):
        metric = Metric.identity(GROUP, device)
        for kind in sorted(kinds):
            encode_each(metric.plain, metric, TYPES[kind], EncodeOptions())


class Writer:
    """Puts finished tensors on disk, and makes those of standard types, in threads of its own."""

    def __init__(self, plan: Plan, base: GGUFFile, done: FinishedTensors, advance: progress.Advance) -> None:
        self.plan, self.base, self.done, self.advance = plan, base, done, advance
        self.disk, self.makers = ThreadPoolExecutor(1, "finished tensors"), ThreadPoolExecutor(2, "standard types")
        self.waiting: deque[Future[None]] = deque()
        self.made: list[Future[None]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for pool in (self.makers, self.disk):
            pool.shutdown(wait=True, cancel_futures=True)

    def put(self, name: str, encoded: Encoded) -> None:
        """Waits if the disk is behind."""
        self.waiting.append(self.disk.submit(self.done.put, name, self.plan.encoded[name], encoded))
        if len(self.waiting) > WRITES:
            self.waiting.popleft().result()
        self.advance(self.plan.elements(name))

    def note(self, name: str, loss: float, power: float) -> None:
        """Another process put the tensor there."""
        self.done.note(name, self.plan.encoded[name], loss, power)
        self.advance(self.plan.elements(name))

    def quantize(self, names: Sequence[str]) -> None:
        """Start with tensors of `plan.standard`."""

        from athena_gguf.encode import Encoded
        from athena_gguf.gguf_file.standard import quantize_tensor

        def make(name: str) -> None:
            kind = self.plan.standard[name]
            self.done.put(name, kind, Encoded(quantize_tensor(self.base.tensors[name], kind), 0.0, 0.0))

        self.made += [self.makers.submit(make, name) for name in names]

    def drain(self) -> None:
        for future in (*self.waiting, *self.made):
            future.result()


class Queue(AbstractContextManager["Queue"], Protocol):
    """Encodes tensors and hands them to a `Writer`. Leaving it cancels what has not started."""

    def add(self, matrix: torch.Tensor | None, names: Sequence[str]) -> None:
        """Start with tensors that read an input of this curvature, once there is room."""

    def pause(self) -> None:
        """Wait until nothing is done that would take processors or memory from a measurement, which begins after it."""

    def drain(self) -> None:
        """Wait until everything that was added is done."""


class _CpuQueue:
    """Encodes in all processors' threads, some tensors at a time."""

    def __init__(self, plan: Plan, base: GGUFFile, settings: EncodeOptions, writer: Writer) -> None:
        from athena_gguf.encode import EncodePool

        self.plan, self.base, self.writer = plan, base, writer
        self.pool = EncodePool(settings, cores())
        self.waiting: deque[tuple[str, Callable[[], Encoded]]] = deque()

    def __enter__(self) -> _CpuQueue:
        self.pool.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.__exit__(*exception)

    def add(self, matrix: torch.Tensor | None, names: Sequence[str]) -> None:
        """Start with tensors that read an input of this curvature."""
        from athena_gguf.encode.layer import encode_layer, start_layer
        from athena_gguf.encode.pool import PIECE

        tensors = [self.base.tensors[name] for name in names]
        if matrix is not None and matrix.ndim > 2:
            self.drain()
            for name, encoded in encode_layer(self.pool, matrix, tensors, self.plan.encoded, "cpu"):
                self.writer.put(name, encoded)
            return
        for started in start_layer(self.pool, matrix, tensors, self.plan.encoded):
            self.waiting.append(started)
            # Enough that no thread waits; weights in float32 and their layers' curvatures in five forms are held.
            self._collect(min(4 * self.pool.threads * PIECE * tensors[0].columns, IN_FLIGHT))

    def _collect(self, elements: int) -> None:
        """Wait until at most so many elements are in flight."""
        while sum(self.plan.elements(name) for name, _ in self.waiting) > elements:
            name, result = self.waiting.popleft()
            self.writer.put(name, result())

    def pause(self) -> None:
        self.drain()

    def drain(self) -> None:
        self._collect(0)
