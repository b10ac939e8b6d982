"""Results that are made in threads before they are asked for, within a bound on memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def ahead(
    tasks: Iterable[tuple[int, Callable[[], Result]]],
    threads: int,
    most: int,
    initializer: Callable[[], object] | None = None,
) -> Generator[Result, None, None]:
    """The results of `tasks` in their order. `tasks`: the bytes that each takes, and what makes its result.

    A task is started, in order, while those started and not done with take at most `most` bytes, or when it is the only
    one. A result is done with when the next one is asked for. `initializer` runs in every thread. A task's exception is
    raised in its place; leave the iterator with `close()`, which waits for what has been started.
    """
    rest = deque(tasks)
    del tasks  # what a task holds goes with its result
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, "ahead", initializer) as pool:
        try:
            while rest or waiting:
                while rest and (not waiting or held + rest[0][0] <= most):
                    size, task = rest.popleft()
                    waiting.append((size, pool.submit(task)))
                    held += size
                    del task
                size, future = waiting.popleft()
                yield future.result()
                del future
                held -= size
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
