"""What several devices do at once, each with its share of the windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


class Together(Generic[Part]):
    """`parts`: one a device. Close it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.threads = ThreadPoolExecutor(len(parts), "device")

    def do(self, work: Callable[[Part], Result]) -> list[Result]:
        """What `work` gives for every part, done by all devices at once; one alone works in this thread."""
        if len(self.parts) == 1:
            return [work(self.parts[0])]
        done = [self.threads.submit(work, part) for part in self.parts]
        wait(done)
        return [one.result() for one in done]

    def close(self) -> None:
        """Wait until no device is at work, as after an error on one of them others may be."""
        self.threads.shutdown()
