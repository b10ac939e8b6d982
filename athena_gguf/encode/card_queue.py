"""The encoding of a conversion on GPUs: this process feeds the first, and a process of its own (`athena_gguf.cards`)
every other one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from athena_gguf.cards import Card
from athena_gguf.cards.child import Here
from athena_gguf.errors import AthenaError
from athena_gguf.gpu import shortage_named
from athena_gguf.memory import short_turns

if TYPE_CHECKING:
    import torch

    from athena_gguf.encode import Encoded, EncodeOptions
    from athena_gguf.encode.stage import Writer
    from athena_gguf.gguf_file import GGUFFile
    from athena_gguf.plan import Plan

ON_CARD = 4  # inputs whose curvatures a GPU that measures at the same time holds for its encoding, at most


class CardQueue:
    """Encodes the tensors of one input after the other on every GPU; an input goes to the one with least to do. With
    `overlap` that goes on beside the measurement, and the next input is made ready meanwhile. The devices are awake
    (`calibration.stage.wake`)."""

    def __init__(
        self,
        plan: Plan,
        base: GGUFFile,
        settings: EncodeOptions,
        writer: Writer,
        device: torch.device,
        cards: Sequence[Card],
        overlap: bool,
        finished: Collection[str] = (),
    ) -> None:
        """`finished`: tensors that are not encoded again, though `add` names them."""
        self.plan, self.overlap, self.finished = plan, overlap, finished
        first = _Local(_Encoder(base, plan.encoded, settings, device, overlap, finished), writer)
        work = _Work(base.path, plan.encoded, settings, overlap, finished, writer.done.folder, writer.done.key)
        self.places: list[_Place] = [first, *(_Remote(card, writer, first, work) for card in cards)]
        self.threads = [ThreadPoolExecutor(2 if overlap else 1, "encode on a card") for _ in self.places]
        self.jobs: list[deque[tuple[float, Future[None]]]] = [deque() for _ in self.places]
        self.given = [0.0 for _ in self.places]
        self.stack = ExitStack()

    def __enter__(self) -> CardQueue:
        self.stack.enter_context(short_turns())
        for place, threads, jobs in zip(self.places, self.threads, self.jobs, strict=True):
            self.stack.enter_context(place)
            self.stack.callback(threads.shutdown, wait=True, cancel_futures=True)
            jobs.append((0.0, place.ready))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.__exit__(None, None, None)

    def add(self, matrix: torch.Tensor | None, names: Sequence[str]) -> None:
        """Start with tensors that read an input of this curvature, as soon as a GPU has room for it."""
        from athena_gguf.encode.pool import mark

        load = [sum(size for size, job in jobs if not job.done()) for jobs in self.jobs]
        at = min(range(len(load)), key=lambda n: (load[n], self.given[n]))
        while len(self.jobs[at]) > (ON_CARD - 1 if self.overlap else 1):
            self.jobs[at].popleft()[1].result()
        measured = None if matrix is None else mark(matrix.device)
        *matrices, _, columns = self.plan.shapes[names[0]]  # every expert has a metric of its own
        weights = sum(self.plan.elements(name) for name in names if name not in self.finished)
        # In proportion to seconds of an H100, of 4,096 and 14,336 columns.
        size = weights * (1 + columns / 6400) + math.prod(matrices) * columns**3 / 84000
        job = self.threads[at].submit(self.places[at].encode, matrix, measured, list(names))
        self.jobs[at].append((size, job))
        self.given[at] += size

    def pause(self) -> None:
        if not self.overlap:
            self.drain()

    def drain(self) -> None:
        for jobs in self.jobs:
            while jobs:
                jobs.popleft()[1].result()


class _Encoder:
    """Encodes on one device, with `overlap` beside other work there: in a stream of its own, while the next input is
    made ready in another one. What one stream makes for another is kept until that has done its work."""

    def __init__(
        self,
        base: GGUFFile,
        kinds: Mapping[str, str],
        settings: EncodeOptions,
        device: torch.device,
        overlap: bool,
        finished: Collection[str],
    ) -> None:
        import torch

        from athena_gguf.encode import EncodePool

        self.base, self.kinds, self.device, self.finished = base, kinds, device, finished
        self.pool = EncodePool(settings, 1, device, own_stream=overlap)
        self.stream = torch.cuda.Stream(device) if overlap else None

    def make_kernels(self) -> None:
        from athena_gguf.encode.stage import make_kernels

        if self.pool.gpu:
            make_kernels(self.device, self.pool.stream, set(self.kinds.values()))

    def encode(
        self, matrix: torch.Tensor | None, measured: torch.cuda.Event | None, names: Sequence[str]
    ) -> Iterator[tuple[str, Encoded]]:
        """Tensors that read an input of this curvature, which is there when `measured` has come."""
        import torch

        from athena_gguf.encode.layer import encode_layer

        tensors = [self.base.tensors[name] for name in names]
        with torch.cuda.device(self.device) if self.pool.gpu else nullcontext(), torch.cuda.stream(self.stream):
            if measured is not None:
                measured.wait()
            # A copy from another device is made in this thread's stream there, and this device's waits for it.
            matrix = None if matrix is None else matrix.to(self.device)
            yield from encode_layer(self.pool, matrix, tensors, self.kinds, self.device, finished=self.finished)


class _Place(AbstractContextManager["_Place"], Protocol):
    """Where a GPU is fed. `ready`: when it is."""

    ready: Future[None]

    def encode(self, matrix: torch.Tensor | None, measured: torch.cuda.Event | None, names: Sequence[str]) -> None:
        """Tensors that read an input of this curvature, there when `measured` has come, to where they are kept."""


class _Local:
    def __init__(self, encoder: _Encoder, writer: Writer) -> None:
        self.encoder, self.writer = encoder, writer
        self.ready: Future[None] = Future()

    def __enter__(self) -> _Local:
        self.encoder.pool.__enter__()
        self.ready = self.encoder.pool.workers.submit(self.encoder.make_kernels)
        return self

    def __exit__(self, *exception: object) -> None:
        self.encoder.pool.__exit__(*exception)

    def encode(self, matrix: torch.Tensor | None, measured: torch.cuda.Event | None, names: Sequence[str]) -> None:
        with shortage_named(self.encoder.device):
            for name, encoded in self.encoder.encode(matrix, measured, names):
                self.writer.put(name, encoded)


@dataclass(frozen=True)
class _Work:
    """What a process encodes with, and the `folder` that it puts finished tensors into."""

    base_path: Path
    kinds: Mapping[str, str]
    settings: EncodeOptions
    overlap: bool
    finished: Collection[str]
    folder: Path
    key: str


class _Remote:
    """The process puts what it finishes into the folder itself, and says what it was."""

    def __init__(
        self,
        card: Card,
        writer: Writer,
        first: _Local,
        work: _Work,
    ) -> None:
        import torch

        self.card, self.writer, self.first, self.work = card, writer, first, work
        device = first.encoder.device
        self.stream = torch.cuda.Stream(device) if work.overlap else None  # from which matrices are sent
        self.starter = ThreadPoolExecutor(1, "start of encoding")
        self.ready: Future[None] = Future()

    def __enter__(self) -> _Remote:
        self.ready = self.starter.submit(self._start)
        return self

    def _start(self) -> None:
        self.first.ready.result()  # which made the kernels for all
        self.card.call(_start, self.work)

    def __exit__(self, *exception: object) -> None:
        self.starter.shutdown(wait=True, cancel_futures=True)
        with suppress(AthenaError):  # nothing is left where the process has ended
            self.card.call(_end)

    def encode(self, matrix: torch.Tensor | None, measured: torch.cuda.Event | None, names: Sequence[str]) -> None:
        import torch

        self.ready.result()
        with torch.cuda.stream(self.stream):
            if measured is not None:
                measured.wait()
            found = self.card.call(_encode, matrix, names)
        for name, loss, power in found:
            self.writer.note(name, loss, power)


class _Encoding:
    """What the process holds for its encoding."""

    def __init__(self, device: torch.device, work: _Work) -> None:
        from athena_gguf.encode.finished import FinishedTensors
        from athena_gguf.gguf_file import GGUFFile

        self.kinds, self.stack = work.kinds, ExitStack()
        self.done = FinishedTensors(work.folder, work.key)
        base = self.stack.enter_context(GGUFFile(work.base_path))
        self.encoder = _Encoder(base, work.kinds, work.settings, device, work.overlap, work.finished)
        self.stack.enter_context(short_turns())
        self.stack.enter_context(self.encoder.pool)
        self.disk = self.stack.enter_context(ThreadPoolExecutor(1, "finished tensors"))

    def encode(self, matrix: torch.Tensor | None, names: Sequence[str]) -> list[tuple[str, float, float]]:
        kept = []
        for name, encoded in self.encoder.encode(matrix, None, names):
            writing = self.disk.submit(self.done.put, name, self.kinds[name], encoded)
            kept.append((name, encoded.loss, encoded.power, writing))
            del encoded
        for *_, writing in kept:
            writing.result()
        return [(name, loss, power) for name, loss, power, _ in kept]


def _start(here: Here, work: _Work) -> None:
    held = _Encoding(here.device, work)
    here.held[_Encoding] = held
    held.encoder.pool.workers.submit(held.encoder.make_kernels).result()


def _encode(here: Here, matrix: torch.Tensor | None, names: Sequence[str]) -> list[tuple[str, float, float]]:
    found: list[tuple[str, float, float]] = here.held[_Encoding].encode(matrix, names)
    return found


def _end(here: Here) -> None:
    held = here.held.pop(_Encoding, None)
    if held is not None:
        held.stack.close()
