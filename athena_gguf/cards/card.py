"""Processes that work on a GPU each, and how this one has them do so."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from athena_gguf import progress
from athena_gguf.cards import wire
from athena_gguf.cards.child import Here, Start, look, set_share
from athena_gguf.errors import AthenaError
from athena_gguf.model.trust import runs_code
from athena_gguf.processes import command, how_it_ended

if TYPE_CHECKING:
    import torch

More = ParamSpec("More")
Result = TypeVar("Result")

_SECONDS = 10.0  # for a process to end after its pipe was closed


class Card:
    """A process that works on `device`, of which torch takes at most `gpu_memory` bytes. `share`: whether it and this
    one look at each other's tensors on GPUs. Close it; it also ends when this process does, however that ends."""

    def __init__(self, device: torch.device, gpu_memory: int | None = None) -> None:
        self.device, self.share, self.count = device, False, 0
        self.waiting: dict[int, Future[Any]] = {}
        self.state, self.writing = Lock(), Lock()
        self.ended: AthenaError | None = None
        # A session of its own: Ctrl-C reaches this process only, which then closes the pipe.
        self.process = subprocess.Popen(
            command("athena_gguf.cards.child"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.given, self.answers = self.process.stdin, self.process.stdout
        start = Start(str(device), gpu_memory, runs_code(), "json" if progress.form() == "json" else "quiet")
        self._write(0, wire.packed(start, share=False))
        self.reader = Thread(target=self._read, name=f"{device}", daemon=True)
        self.reader.start()

    def call(
        self, function: Callable[Concatenate[Here, More], Result], *args: More.args, **named: More.kwargs
    ) -> Result:
        """What `function`, of a module, returns there; it is called with what the process holds, and `args`. Calls of
        several threads go on beside each other. Raises what it raises, and AthenaError if the process has ended."""
        future: Future[Result] = Future()
        message = wire.packed((function, args, named), self.share)
        with self.state:
            if self.ended is not None:
                raise self.ended
            self.count += 1
            number = self.count
            self.waiting[number] = future
        self._write(number, message)
        return future.result()

    def agree(self, device: torch.device) -> None:
        """Find out whether both processes can look at tensors of both devices; until then they go by way of the host,
        as they do where that fails."""
        import torch

        if device.type != "cuda":
            return
        self.share = True
        try:
            ones = torch.ones(1 << 16, device=device)
            if not bool((self.call(look, ones) == 2).all()):
                raise RuntimeError("other numbers arrive")
        except Exception as error:  # whatever the driver, the system or torch refuses
            if self.ended is not None:
                return  # as the next call says
            self.share = False
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            progress.note(f"GPUs pass data to each other by way of the host's memory: {why}")
        with suppress(AthenaError):
            self.call(set_share, self.share)

    def end(self) -> None:
        """Without waiting for it. A process that does not read what is being written is killed."""
        with self.state:
            self.ended = self.ended or AthenaError(f"{self.device}: the work on it has ended")
        if not self.writing.acquire(timeout=_SECONDS):
            self.process.kill()  # which ends the write
            self.writing.acquire()
        with suppress(OSError):
            self.given.close()
        self.writing.release()

    def close(self) -> None:
        self.end()
        try:
            self.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:  # in a call of the driver that does not return
            self.process.kill()
            self.process.wait()
        self.reader.join()
        self.answers.close()

    def _write(self, number: int, message: wire.Parts) -> None:
        # Where the process has ended, the reader says so.
        with suppress(OSError, ValueError), self.writing:
            wire.write(self.given, number, message)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, parts = wire.read(self.answers)
                with self.state:
                    future = self.waiting.pop(number)
                try:
                    result, error, told = wire.unpacked(parts)
                except Exception as failed:  # a tensor that cannot be looked at here
                    result, error, told = None, failed, ""
                del parts
                if error is None:
                    future.set_result(result)
                else:
                    error.__cause__ = _There(told) if told else None
                    future.set_exception(error)
                del future, result
        how = how_it_ended(self.process.wait())
        with self.state:
            self.ended = self.ended or AthenaError(
                f"{self.device}: the process that works on it has ended ({how}); the same command goes on where this "
                "one stopped if it has a --work-dir"
            )
            lost, self.waiting = self.waiting, {}
        for future in lost.values():
            future.set_exception(self.ended)


class _There(Exception):
    """Shows in a traceback where in the other process an error was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Cards(Sequence[Card]):
    """A process for each of `devices`, to work with the `first` one, on which this process works. Leaving it ends
    them."""

    def __init__(self, first: torch.device, devices: Sequence[torch.device], gpu_memory: int | None = None) -> None:
        self.stack = ExitStack()
        self.cards: list[Card] = []
        self.agreeing: list[Thread] = []
        with self.stack:
            for device in devices:
                self.cards.append(Card(device, gpu_memory))
                self.stack.callback(self.cards[-1].close)
                self.agreeing.append(Thread(target=self.cards[-1].agree, args=(first,), daemon=True))
                self.agreeing[-1].start()
            self.stack = self.stack.pop_all()

    def __enter__(self) -> Cards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End them, if that has not been done yet."""
        for card in self.cards:
            card.end()
        self.stack.close()
        for thread in self.agreeing:  # the interpreter must not end while one is in the driver
            thread.join()

    def __len__(self) -> int:
        return len(self.cards)

    def __getitem__(self, index: Any) -> Any:
        return self.cards[index]
