"""The encoding of a conversion: curvatures in, finished tensors in a folder."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from athena_gguf import progress
from athena_gguf.memory import cores, short_turns

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.store import Calibration
    from athena_gguf.cluster import Cluster
    from athena_gguf.encode import Encoded, EncodeOptions
    from athena_gguf.encode.finished import FinishedTensors
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan

NOT_FED = "no linear layer of the model feeds it"
WRITES = 8  # finished tensors that wait for the disk, at most
ON_CARD = 4  # inputs whose curvatures a GPU that measures at the same time holds for its encoding, at most
IN_FLIGHT = 1 << 28  # weights that wait for their encoding on the CPU, at most; a larger tensor waits alone
_COMPILING = Lock()


def encode_tensors(
    base_path: Path,
    plan: Plan,
    calibration: Calibration,
    folder: Path,
    devices: Sequence[torch.device],
    timed: Callable[[str], Any],
    overlap: bool = True,
    cluster: Cluster | None = None,
) -> FinishedTensors:
    """Every tensor of `plan.encoded`, as the curvatures come, and every one of `plan.standard` meanwhile; those that an
    earlier conversion finished are taken from `folder`. `overlap`: the devices have memory enough to encode while the
    next curvatures are measured. `cluster`: encodes, instead of this process. Raises AthenaError naming the tensor if
    its curvature is none, or if the disk has no room."""
    from athena_gguf.calibration import store
    from athena_gguf.encode import EncodeOptions, finished
    from athena_gguf.gguf_file import GGUFFile

    settings = EncodeOptions()
    key = store.derived_fingerprint(calibration.key, [base_path], finished.METHOD, vars(settings))
    done = finished.FinishedTensors(folder, key)
    found = {name for name, kind in (plan.encoded | plan.standard).items() if done.find(name, kind)}
    if found:
        progress.note(f"{len(found)} finished tensors are taken from the work directory")
    on_gpu = devices[0].type == "cuda" and cluster is None

    def queue_for(writer: Writer) -> Queue:
        if cluster is not None:
            from athena_gguf.encode.ray_queue import RayQueue

            return RayQueue(plan, base, settings, writer, cluster, measures=devices[0].type == "cpu")
        if on_gpu:
            return _GpuQueue(plan, base, settings, writer, devices, overlap, found)
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
        if on_gpu:
            writer.quantize(standard)
        for name in plan.encoded:
            if name not in plan.curved and name not in found:  # embeddings that only look up rows
                with timed("encoding"):
                    advance(0)
                    queue.add(None, [name])
        needed = set(plan.encoded) - found
        known = found if calibration.keep else plan.curved - needed
        for curvature in calibration.stream(known, queue.pause):
            names = [name for name in curvature.about.tensor_names if name in plan.encoded]
            if not needed.isdisjoint(names):
                with timed("encoding"):
                    advance(0)
                    queue.add(curvature.matrix, names if on_gpu else [name for name in names if name in needed])
            del curvature
        absent = sorted(calibration.absent & plan.encoded.keys())
        for name in absent:
            plan.keep_standard(name, NOT_FED)
        with timed("encoding"):
            queue.drain()
            writer.quantize(absent if on_gpu else [*standard, *absent])
            writer.drain()
    return done


def make_kernels(devices: Iterable[torch.device], streams: Iterable[torch.cuda.Stream | None], kinds: set[str]) -> None:
    """Encode next to nothing in each of the A types `kinds`, so that the kernels are there when the first curvature is;
    one thread at a time, since others would make the same. Raises AthenaError if they cannot be made."""
    import torch

    from athena_gguf.encode import EncodeOptions, Metric
    from athena_gguf.encode.cuda.launch import cache_explained, require_cuda
    from athena_gguf.encode.matrix import encode_each
    from athena_gguf.format import GROUP, TYPES

    require_cuda()
    for device, stream in zip(devices, streams, strict=True):
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


class _GpuQueue:
    """Encodes the tensors of one input after the other on every GPU; an input goes to the one with least to do.

    With `overlap` that goes on beside the measurement, in a stream of its own, and the next input is made ready
    meanwhile, in another one. What one stream makes for another is kept until that has done its work. The devices are
    awake (`calibration.stage.wake`).
    """

    def __init__(
        self,
        plan: Plan,
        base: GGUFFile,
        settings: EncodeOptions,
        writer: Writer,
        devices: Sequence[torch.device],
        overlap: bool,
        finished: Collection[str] = (),
    ) -> None:
        """`finished`: tensors that are not encoded again, though `add` names them."""
        import torch

        from athena_gguf.encode import EncodePool

        self.plan, self.base, self.writer = plan, base, writer
        self.devices, self.overlap, self.finished = devices, overlap, finished
        self.pools = [EncodePool(settings, 1, device, own_stream=overlap) for device in devices]
        self.ready = [torch.cuda.Stream(device) if overlap else None for device in devices]
        # Of the first device, where curvatures are measured: each copies them to one of the others.
        self.copying = [torch.cuda.Stream(devices[0]) if overlap else None for _ in devices]
        self.threads = [ThreadPoolExecutor(2 if overlap else 1, f"{device}") for device in devices]
        self.jobs: list[deque[tuple[float, Future[None]]]] = [deque() for _ in devices]
        self.stack = ExitStack()

    def __enter__(self) -> _GpuQueue:
        self.stack.enter_context(short_turns())
        kinds = set(self.plan.encoded.values())
        for pool, jobs, thread, device in zip(self.pools, self.jobs, self.threads, self.devices, strict=True):
            self.stack.enter_context(pool)
            self.stack.callback(thread.shutdown, wait=True, cancel_futures=True)
            jobs.append((0.0, pool.workers.submit(make_kernels, [device], [pool.stream], kinds)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.__exit__(None, None, None)

    def add(self, matrix: torch.Tensor | None, names: Sequence[str]) -> None:
        """Start with tensors that read an input of this curvature, as soon as a GPU has room for it."""
        from athena_gguf.encode.pool import mark

        load = [sum(size for size, job in jobs if not job.done()) for jobs in self.jobs]
        at = load.index(min(load))
        while len(self.jobs[at]) > (ON_CARD - 1 if self.overlap else 1):
            self.jobs[at].popleft()[1].result()
        measured = None if matrix is None else mark(matrix.device)
        *matrices, _, columns = self.plan.shapes[names[0]]  # every expert has a metric of its own
        weights = sum(self.plan.elements(name) for name in names if name not in self.finished)
        # In proportion to seconds of an H100, of 4,096 and 14,336 columns.
        size = weights * (1 + columns / 6400) + math.prod(matrices) * columns**3 / 84000
        self.jobs[at].append((size, self.threads[at].submit(self._encode, at, matrix, measured, list(names))))

    def _encode(
        self, at: int, matrix: torch.Tensor | None, measured: torch.cuda.Event | None, names: Sequence[str]
    ) -> None:
        import torch

        from athena_gguf.encode.layer import encode_layer

        tensors = [self.base.tensors[name] for name in names]
        device = self.devices[at]
        with torch.cuda.device(device), torch.cuda.stream(self.ready[at]):
            if matrix is not None and measured is not None:
                # A copy is made in a stream of the device that it comes from, and this device's waits for it.
                with torch.cuda.stream(self.copying[at] if matrix.device != device else None):
                    measured.wait()
                    matrix = matrix.to(device)
            layer = encode_layer(self.pools[at], matrix, tensors, self.plan.encoded, device, finished=self.finished)
            for name, encoded in layer:
                self.writer.put(name, encoded)

    def pause(self) -> None:
        if not self.overlap:
            self.drain()

    def drain(self) -> None:
        for jobs in self.jobs:
            while jobs:
                jobs.popleft()[1].result()
