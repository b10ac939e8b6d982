"""The calibration of a conversion: tokens, the model on a device (whole or block by block), and its curvatures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.calibration import store
from athena_gguf.calibration.curvature import Curvature, Lookup
from athena_gguf.errors import AthenaError
from athena_gguf.gpu import shortage_named
from athena_gguf.memory import cores, host_bytes
from athena_gguf.plan import block_of

if TYPE_CHECKING:
    import torch

    from athena_gguf.calibration.blockwise import Passes
    from athena_gguf.calibration.prefix import Prefix
    from athena_gguf.cards import Card
    from athena_gguf.conversion import ConvertOptions
    from athena_gguf.model import LinearLayer
    from athena_gguf.model.blocks import BlockModel
    from athena_gguf.plan import Plan

_MARGIN = 1 << 30  # bytes of either memory left to libraries and fragments
_PIECES = (40 << 26) + (1 << 30)  # bytes of rows that are being encoded, and of the products that fit their scales
_ACTIVATIONS = 40  # bytes a token and column of a block's widest input that its backward pass needs, about


@dataclass(frozen=True)
class Memory:
    """Bytes that the work may take on the `device` (if that is no CPU) and of the `host`."""

    device: int
    host: int

    @classmethod
    def of(cls, devices: Sequence[torch.device], gpu_memory: int | None, host_memory: int | None) -> Memory:
        """What the options say, or most of what is free; of every one of `devices`."""
        import torch

        on_card = []
        for device in devices:
            if device.type == "cuda":
                free, whole = torch.cuda.mem_get_info(device)
                on_card.append(min(gpu_memory or whole, int(0.95 * free)))
        return cls(min(on_card, default=0), host_memory or int(0.8 * host_bytes()))


def all_of(device: torch.device) -> list[torch.device]:
    """The devices of its kind that the process may use: every visible GPU (CUDA_VISIBLE_DEVICES), or the CPU."""
    import torch

    if device.type == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def wake(devices: Sequence[torch.device], gpu_memory: int | None) -> None:
    """Have GPUs ready for work, which takes some tenths of a second each. torch takes `gpu_memory` there at most."""
    import torch

    from athena_gguf.gpu import prepare_to_repeat

    if devices[0].type == "cuda":
        prepare_to_repeat()
    for device in devices:
        if device.type == "cuda":
            if gpu_memory:
                _, whole = torch.cuda.mem_get_info(device)
                torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / whole), device)
            torch.linalg.cholesky(torch.eye(2, device=device))  # threads that use it first at the same time fail


def _given_once(before: Callable[[], None], amounts: Iterator[int]) -> int:
    before()
    return next(amounts, 0)


@dataclass
class _Run:
    """The calibration's text, and the model that it runs through: its `passes`, None where it is run whole. Leaving
    `exits` puts away what they work with; `advance` tells the tokens done, in the time of `watch`."""

    windows: torch.Tensor
    model: BlockModel | None
    passes: Passes | None
    advance: Callable[[float], None]
    exits: ExitStack
    watch: progress.Stopwatch


@dataclass
class _Beside:
    """What goes on beside the making of the base file: `opened` and then its forward pass, until `stopped`. `disk` is
    set once files may be written, which until then would take the base file's room."""

    opened: Future[_Run]
    forward: Future[None]
    stopped: Event
    disk: Event

    def stop(self) -> None:
        self.stopped.set()
        self.disk.set()
        wait([self.opened])
        wait([self.forward])


@dataclass
class Stage:
    """What the calibration works with. `window`: tokens of a window. `timed(name, beside)` is a context that adds to a
    stage's time. `cards`: of the `devices` but the first. `with_weights`: curvatures have their tokens' weights."""

    model_dir: Path
    base_path: Path
    plan: Plan
    work: Path
    devices: Sequence[torch.device]
    options: ConvertOptions
    tokens: int
    window: int
    timed: Callable[..., AbstractContextManager[None]]
    cards: Sequence[Card] = ()
    with_weights: bool = False
    taken: int = field(default=0, init=False)
    beside: _Beside | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        """The first, for what is done on one."""
        return self.devices[0]

    @cached_property
    def memory(self) -> Memory:
        """As it is when it is first asked for; of the host's, the base file takes `taken` until it is complete."""
        return Memory.of(self.devices, *self.options.memory)

    @property
    def _host(self) -> int:
        """Bytes of the host's memory that are left for the calibration now."""
        return max(0, self.memory.host - self.taken)

    @cached_property
    def _key(self) -> str:
        """Of everything that the curvatures depend on."""
        options = self.options
        files = [*options.texts, *([options.base] if options.base else [])]
        return store.fingerprint(
            self.model_dir,
            files,
            list(options.calibration),
            self.tokens,
            self.window,
            options.seed,
            self.device.type,
            sorted(self.plan.curved),
        )

    def calibration(self) -> store.Calibration:
        """The curvature of every input of the planned layers, from the work directory where it was measured before."""
        keep = self.options.work_dir is not None or bool(self.plan.free)
        return store.Calibration(self._key, self.plan.curved, self.work / "curvature", keep, self._measured)

    def begin(self, threads: Executor, taken: int = 0) -> None:
        """Start, in two of `threads`, with what needs the plan but nothing else of the base file: text, the model, and
        its forward pass. `calibration` goes on from there, and has the errors; leave with `close`. `taken`: bytes of
        the host's memory that the base file takes meanwhile."""
        self.taken = taken
        stopped, disk = Event(), Event()

        def check() -> None:
            if stopped.is_set():
                raise CancelledError

        def before_files() -> None:
            disk.wait()
            check()

        def forward() -> None:
            run = opened.result()
            if run.passes is not None:
                with timed("curvature"), shortage_named(self.device):
                    run.passes.forward()

        timed = partial(self.timed, beside=True)
        # What the user allowed is known in this context; a thread begins with another one.
        opened = threads.submit(copy_context().run, self._open, timed, lambda: None, check, before_files)
        self.beside = _Beside(opened, threads.submit(copy_context().run, forward), stopped, disk)

    def opened(self) -> None:
        """The base file is complete: wait until what `begin` started leaves room for encoding. Raises AthenaError for
        what went wrong with it."""
        if self.beside is None:
            return
        self.taken = 0
        self.beside.disk.set()
        with self.timed("curvature"):
            self.beside.opened.result()
            if not self.overlap:
                self.beside.forward.result()

    def has_model(self) -> bool:
        """Whether `begin` opened it; waits for that."""
        if (beside := self.beside) is None:
            return False
        wait([beside.opened])
        return not beside.stopped.is_set() and beside.opened.exception() is None

    def close(self) -> None:
        """End what `begin` started, if nothing was measured with it."""
        beside, self.beside = self.beside, None
        if beside is None:
            return
        beside.stop()
        if beside.opened.exception() is None:
            with suppress(CancelledError), beside.opened.result().exits:
                raise CancelledError

    def _measured(self, finished: Collection[str], lookup: Lookup, pause: Callable[[], None]) -> Iterator[Curvature]:
        beside = self.beside
        run = self._open(self.timed, pause) if beside is None else beside.opened.result()
        self.beside = None
        with run.exits, shortage_named(self.device):
            if beside is not None:
                run.exits.callback(beside.stop)
            found: list[Curvature] = []
            if run.passes is None or run.model is None:
                with self.timed("curvature"):
                    found = self._whole(run, lookup)
            else:
                with self.timed("curvature"):
                    layers = self._layers(run.model.model, run.model.columns)
                    if beside is None:
                        run.passes.forward()
                    else:
                        beside.forward.result()
                measured = run.passes.backward(layers, lookup, finished, pause)
                while True:
                    with self.timed("curvature"):
                        curvature = next(measured, None)
                    if curvature is None:
                        break
                    with run.watch.paused():
                        yield curvature
            while found:
                with run.watch.paused():
                    yield found.pop(0)

    def _open(
        self,
        timed: Callable[[str], Any],
        pause: Callable[[], None],
        check: Callable[[], None] = lambda: None,
        before_files: Callable[[], None] = lambda: None,
    ) -> _Run:
        """`pause` is called between the text and the model, `check` in between again and again: it may raise."""
        with timed("calibration text"):
            windows = self.kept_windows(check)
        pause()
        with timed("curvature"), ExitStack() as exits, shortage_named(self.device):
            cards = self.cards[: len(windows) - 1]  # others would have no window
            model = self._blocks(cards)
            check()
            watch = progress.Stopwatch()
            tell = exits.enter_context(progress.bar("curvature of the loss", windows.numel(), watch))

            def advance(tokens: float) -> None:
                check()
                tell(tokens)

            if model is None:
                return _Run(windows, None, None, advance, exits.pop_all(), watch)
            passes = self._passes(model, windows, cards, advance, before_files, exits)
            return _Run(windows, model, passes, advance, exits.pop_all(), watch)

    def _whole(self, run: _Run, lookup: Lookup) -> list[Curvature]:
        import torch

        from athena_gguf.calibration import measure_curvature
        from athena_gguf.calibration.precision import measuring
        from athena_gguf.gpu import repeated
        from athena_gguf.model import load_model

        model = load_model(self.model_dir, self.device, torch.float32)
        layers = self._layers(model, lambda layer, which: layer.module.weight[..., which])
        batch = 2 if self.device.type == "cpu" else 16

        def measured() -> list[Curvature]:
            with measuring(self.device):
                return measure_curvature(
                    model,
                    layers,
                    run.windows,
                    batch,
                    advance=run.advance,
                    lookup=lookup,
                    with_weights=self.with_weights,
                )

        return repeated(measured)

    def _blocks(self, cards: Sequence[Card] = ()) -> BlockModel | None:
        """The model to run block by block, opened by these `cards` too. None to run it whole, which is faster on a CPU
        whose memory it fits in: every block is computed once instead of twice."""
        import torch

        from athena_gguf.calibration.remote import open_there
        from athena_gguf.model.blocks import open_blocks

        on_cpu = self.device.type == "cpu"
        if on_cpu and self._whole_bytes() <= self._host:
            return None
        dtype = torch.float32 if on_cpu else torch.bfloat16
        # Filled first: a block that stays is not read again, while activations come and go in a stream.
        outer = 2 * self._outer_elements
        room = max(0, self._host // 2 if on_cpu else self.memory.device - outer - self._working_bytes(1))
        with ThreadPoolExecutor(max(1, len(cards)), "opening") as threads:
            others = [threads.submit(open_there, card, self.model_dir, dtype, room) for card in cards]
            found = open_blocks(self.model_dir, self.device, dtype, room)
            return found if all([other.result() for other in others]) else None

    def _passes(
        self,
        model: BlockModel,
        windows: torch.Tensor,
        cards: Sequence[Card],
        advance: Callable[[float], None],
        before_files: Callable[[], None],
        exits: ExitStack,
    ) -> Passes:
        from athena_gguf.calibration.blockwise import LocalPart, Passes
        from athena_gguf.calibration.remote import RemotePart
        from athena_gguf.calibration.shelf import Shelf

        on_cpu, memory, batch = self._batches(windows)
        room = max(0, memory - self._working_bytes(batch) - model.resident_bytes)
        # What the base file still takes is theirs once it is complete, which `before_files` waits for.
        host, count = self._host, 1 + len(cards)
        now, later = (0 if on_cpu else part // count for part in (host, self.memory.host - host))
        share, *rest = windows.tensor_split(count)
        disk = partial(_given_once, before_files, iter([later]))
        shelf = Shelf(model.device, room, now, self.work / "shelf0", disk)
        exits.callback(shelf.close)
        others = []
        for n, (card, part) in enumerate(zip(cards, rest, strict=True), 1):
            disk = partial(_given_once, before_files, iter([later]))
            folder = self.work / f"shelf{n}"
            others.append(RemotePart(card, part, batch, room, now, folder, disk, self.with_weights))
            exits.callback(others[-1].close)
        first = LocalPart(model, shelf, share, batch, with_weights=self.with_weights)
        passes = Passes(first, windows.numel(), advance, others)
        exits.callback(passes.close)
        return passes

    def _batches(self, windows: torch.Tensor) -> tuple[bool, int, int]:
        """Whether blocks run on the CPU, the bytes of memory there, and how many windows run at a time."""
        from athena_gguf.calibration.blockwise import largest_batch

        on_cpu = self.device.type == "cpu"
        memory = self._host if on_cpu else self.memory.device
        return on_cpu, memory, 2 if on_cpu else largest_batch(windows, memory // 4, self._activation_bytes(1))

    @contextmanager
    def prefix(self) -> Iterator[Prefix]:
        """The model twice on every device, to go through its blocks in order."""
        from athena_gguf.calibration.prefix import LocalPart, Prefix, open_twice
        from athena_gguf.calibration.remote_prefix import RemotePart
        from athena_gguf.calibration.shelf import Shelf

        windows = self.kept_windows(lambda: None)
        on_cpu, memory, batch = self._batches(windows)
        cards = self.cards[: len(windows) - 1]
        share, *rest = windows.tensor_split(1 + len(cards))
        with shortage_named(self.device), ExitStack() as exits:
            original, quantized = open_twice(self.model_dir, self.device)
            room = max(0, memory - self._in_order_bytes(batch))
            host = 0 if on_cpu else self._host // (1 + len(cards))
            others, first = [], len(share)
            for n, (card, part) in enumerate(zip(cards, rest, strict=True), 1):
                folder = self.work / f"shelf{n}"
                others.append(RemotePart(card, self.model_dir, part, batch, room, host, folder, first))
                exits.callback(others[-1].close)
                first += len(part)
            shelf = Shelf(self.device, room, host, self.work / "shelf0")
            exits.callback(shelf.close)
            layers = self._layers(original.model, original.columns)
            found = Prefix(layers, LocalPart(original, quantized, share, batch, shelf), others)
            exits.callback(found.together.close)
            yield found

    @cached_property
    def _widest(self) -> int:
        """Columns of the widest layer input."""
        return max(self.plan.shapes[name][-1] for name in self.plan.curved)

    @cached_property
    def _width(self) -> int:
        """Numbers that a token has in the widest place of a block: inside the experts it has those of every one that it
        is sent to."""
        inner = [self.plan.shapes[name][-1] for name in self.plan.curved if name.endswith("ffn_down_exps.weight")]
        return max(self._widest, max(inner, default=0) * (self.plan.experts_used or 1))

    def _activation_bytes(self, batch: int) -> int:
        """Of the backward pass of a block, for `batch` windows."""
        return batch * self.window * self._width * _ACTIVATIONS

    def _whole_bytes(self) -> int:
        """Of the model in float32, its curvatures and the activations of two windows, about."""
        plan = self.plan
        weights = sum(4 * plan.elements(name) for name in plan.shapes)
        curvatures = sum(4 * math.prod(plan.shapes[name][:-2]) * plan.shapes[name][-1] ** 2 for name in plan.curved)
        blocks = len({found[0] for name in plan.curved if (found := block_of(name))})
        return weights + curvatures + self._activation_bytes(2) * max(1, blocks) + _MARGIN

    @property
    def overlap(self) -> bool:
        """Whether a GPU has memory enough to encode a block's weights while it works on the next block."""
        from athena_gguf.calibration.blockwise import most_windows

        needed = self._backward_bytes(most_windows(self.window)) + self._encoding_bytes()
        return self.memory.device >= 2 * needed + self._waiting_bytes()

    def _backward_bytes(self, batch: int) -> int:
        """Of a block's backward pass with curvatures."""
        return 8 * self._widest**2 + self._expert_bytes()[0] + self._activation_bytes(batch)

    def _encoding_bytes(self) -> int:
        """Of the widest weight's: the matrices of its metric and one in float64, and pieces of rows; of experts all
        weights and curvatures."""
        return 34 * self._widest**2 + _PIECES + sum(self._expert_bytes())

    def _waiting_bytes(self) -> int:
        """While a GPU encodes and measures at the same time: of the next metric and weights, and of curvatures that
        wait, on the first GPU those for the others too."""
        matrices, weights = self._expert_bytes()
        others = len(self.cards) * (8 * self._widest**2 + matrices)
        return (34 + 8) * self._widest**2 + _PIECES // 10 + weights + others

    def _expert_bytes(self) -> tuple[int, int]:
        """Of the curvatures of a block's experts, and of the weights in float32 that read one of their inputs."""
        plan = self.plan
        inputs: dict[tuple[int, bool], list[str]] = {}  # what the experts are sent, and what is inside them
        for name in plan.curved:
            found = block_of(name)
            if found and len(plan.shapes[name]) > 2:
                inputs.setdefault((found[0], "down" in name), []).append(name)
        matrices: Counter[int] = Counter()
        for (block, _), names in inputs.items():
            experts, _, columns = plan.shapes[names[0]]
            matrices[block] += 4 * experts * columns**2
        weights = (4 * sum(map(plan.elements, names)) for names in inputs.values())
        return max(matrices.values(), default=0), max(weights, default=0)

    @property
    def _outer_elements(self) -> int:
        """Weights that are in no block."""
        return sum(self.plan.elements(name) for name in self.plan.shapes if not block_of(name))

    @property
    def _block_elements(self) -> int:
        """Weights of the largest block."""
        blocks: Counter[int] = Counter()
        for name in self.plan.shapes:
            if found := block_of(name):
                blocks[found[0]] += self.plan.elements(name)
        return max(blocks.values(), default=0)

    def _working_bytes(self, batch: int) -> int:
        """Of a block at work: its weights, its backward pass and encoding."""
        both = self._backward_bytes(batch), self._encoding_bytes()
        return 2 * self._block_elements + (sum(both) + self._waiting_bytes() if self.overlap else max(both)) + _MARGIN

    @property
    def fits_in_order(self) -> bool:
        """Whether GPUs have the memory to go through the blocks in order."""
        return self.device.type == "cpu" or self.memory.device >= self._in_order_bytes(1)

    def _in_order_bytes(self, batch: int) -> int:
        """All but the hidden states: a block twice, and what is outside of the blocks, twice while they are opened;
        then the sums of two halves, a factor and the right sides in float64, or what encoding takes beside H."""
        plan, size = self.plan, 4 if self.device.type == "cpu" else 2
        outer = size * self._outer_elements
        largest = max((plan.elements(name) for name in plan.curved if block_of(name)), default=0)
        work = max(36 * self._widest**2 + 24 * largest, self._encoding_bytes() + 4 * self._widest**2)
        return 2 * size * self._block_elements + outer + max(outer, work) + self._activation_bytes(batch) + _MARGIN

    def _layers(self, model: Any, columns: Callable[[LinearLayer, list[int]], Any]) -> list[LinearLayer]:
        from athena_gguf.model import linear_layers
        from athena_gguf.plan import other_weights

        plan = self.plan
        for name, what in other_weights(self.base_path, model, plan.architecture, columns).items():
            if self.options.base is not None:
                raise AthenaError(f"{self.base_path}: tensor {name} {what}; give the base file of this model")
            if name in plan.fitting:
                plan.keep_standard(name, f"llama.cpp's converter rearranges it: it {what}")
        found = linear_layers(model, plan.architecture, plan.shapes)
        layers = [layer for layer in found if layer.tensor_name in plan.curved]
        if not layers:
            raise AthenaError(
                f"no linear layer of this {plan.architecture} model can become an A type; see the warnings"
            )
        return layers

    def kept_windows(self, check: Callable[[], None]) -> torch.Tensor:
        """`windows`, from the work directory if they were made before."""
        import torch
        from safetensors.torch import load_file, save_file

        from athena_gguf.gguf_file.atomic import temporary_beside

        path = self.work / f"tokens.{self._key[:16]}.safetensors"
        try:
            return load_file(path)["windows"]
        except Exception:  # absent, or whatever a damaged file raises: make them again
            windows = self.windows(self.tokens, self.options.seed, check)
        with temporary_beside(path) as temporary:
            save_file({"windows": windows.to(torch.int64).contiguous()}, temporary)
        return windows

    def windows(self, tokens: int, seed: int, check: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Calibration text [windows, length] as token ids. `check` is called while the model writes."""
        import torch

        from athena_gguf.calibration import self_generated_windows, text_windows
        from athena_gguf.model import load_model, load_tokenizer

        tokenizer = load_tokenizer(self.model_dir)
        files, own = self.options.texts, "self" in self.options.calibration
        share = tokens // 2 if files and own else tokens
        parts = []
        if files:
            parts.append(text_windows(tokenizer, files, share, self.window, seed))
        if own:
            model = load_model(self.model_dir, self.device, self._text_type())
            # Few threads on the CPU, since each holds the keys and values of a batch of windows.
            batch, threads = (32, min(4, cores())) if self.device.type == "cpu" else (128, 1)
            with progress.bar("calibration text, written by the model", share) as tell:

                def advance(done: int) -> None:
                    check()
                    tell(done)

                parts.append(
                    self_generated_windows(model, tokenizer, share, self.window, seed, batch, threads, advance=advance)
                )
        windows = torch.cat(parts)
        if windows.numel() < tokens // 2:
            progress.note(f"warning: the calibration text has only {windows.numel():,} tokens of {tokens:,}")
        return windows

    def _text_type(self) -> torch.dtype:
        """Of the numbers in which the whole model writes. Raises AthenaError if it fits in no type."""
        import torch

        weights = sum(map(self.plan.elements, self.plan.shapes))
        room = self._host if self.device.type == "cpu" else self.memory.device
        if 5 * weights <= room:
            return torch.float32
        if 2.5 * weights <= room:
            return torch.bfloat16
        raise AthenaError(
            f"{self.model_dir}: the model does not fit in memory whole, as writing its own calibration text needs; "
            "give text with --calibration FILE"
        )
