"""The process of a GPU, started by `athena_gguf.cards.Card`.

Its input and output are numbered messages (`athena_gguf.cards.wire`): first a `Start`, then functions to call with
arguments; their results or errors. It ends when its input does, whatever it is doing.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.cards import wire
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch

_THREADS = 16  # calls at a time: those of the measurement, the encoding, and what they wait for


@dataclass
class Start:
    """Of a process. `code`: the user trusts code that comes with the model; `form`: of what it says."""

    device: str
    gpu_memory: int | None
    code: bool
    form: progress.Form


@dataclass
class Here:
    """What calls find in the process. `held`: what earlier ones left, by class; `share`: as of `Card`."""

    device: torch.device
    share: bool = False
    held: dict[type, Any] = field(default_factory=dict)


def look(here: Here, ones: torch.Tensor) -> torch.Tensor:
    """Numbers of another device, plus one, on this; both processes look at each other's."""
    here.share = True
    return ones.to(here.device) + 1


def set_share(here: Here, share: bool) -> None:
    here.share = share


class _Calls:
    def __init__(self, given: IO[bytes], answers: IO[bytes]) -> None:
        self.given, self.answers, self.writing = given, answers, Lock()
        self.threads = ThreadPoolExecutor(_THREADS, "card")

    def serve(self) -> None:
        """Until the input ends."""
        _, parts = wire.read(self.given)
        start: Start = wire.unpacked(parts)
        progress.set_form(start.form)
        ready = self.threads.submit(_begin, start)
        while True:
            number, parts = wire.read(self.given)
            self.threads.submit(self._answer, number, parts, start, ready)
            del parts

    def _answer(self, number: int, parts: wire.Parts, start: Start, ready: Future[Here]) -> None:
        from athena_gguf.gpu import shortage_named
        from athena_gguf.model.trust import running_code

        share = False
        try:
            here = ready.result()
            with running_code(start.code), shortage_named(here.device):
                result = _called(here, parts)
            share = here.share
            message = wire.packed((result, None, ""), share)
        except Exception as error:
            told = traceback.format_exc()
            try:
                message = wire.packed((None, error, told), share=False)
                wire.unpacked(message)
            except Exception:  # an error that cannot be sent
                message = _named(error, told)
        except BaseException as error:  # would end the first process without a word
            message = _named(error, traceback.format_exc())
        try:
            with self.writing:
                wire.write(self.answers, number, message)
        except OSError:  # nobody reads them any more
            os._exit(1)


def _named(error: BaseException, told: str) -> wire.Parts:
    return wire.packed((None, RuntimeError(f"{type(error).__name__}: {error}"), told), share=False)


def _called(here: Here, parts: wire.Parts) -> Any:
    import torch

    function: Callable[..., Any]
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)  # of this thread
    function, args, named = wire.unpacked(parts)
    return function(here, *args, **named)


def _begin(start: Start) -> Here:
    """Ready for work, with what will be imported anyway."""
    import torch
    import transformers  # noqa: F401

    from athena_gguf.calibration.stage import wake
    from athena_gguf.memory import keep_freed_memory

    keep_freed_memory()
    device = torch.device(start.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        wake([device], start.gpu_memory)
    except RuntimeError as error:
        raise AthenaError(f"{device}: {error}; CUDA_VISIBLE_DEVICES chooses GPUs") from error
    return Here(device)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    progress.set_form("quiet")  # the first process tells
    code = 1
    try:
        _Calls(given, answers).serve()
    except EOFError:
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # threads at work do not matter any more
