"""The tensors of gguf-py's writer, which the converter describes and gguf-py computes when it writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from threading import Event
from typing import Any

import numpy as np

from athena_gguf.ahead import ahead
from athena_gguf.bfloat16 import has_nan
from athena_gguf.memory import cores, host_bytes

_BYTES = 6  # that a tensor takes while it is made, for each of its own: float32, a permuted copy of that, BF16
_MOST_BYTES = 8 << 30  # of all tensors that are made ahead of their turn


def most_bytes() -> int:
    """That the tensors take which are made ahead, at most."""
    return min(_MOST_BYTES, host_bytes() // 4)


def make_ahead(gguf: Any) -> None:
    """Have the module's GGUFWriter make its LazyNumpyTensors in threads before it writes them, which it does in the
    order of its list."""
    writer, lazy = gguf.GGUFWriter, gguf.LazyNumpyTensor
    write, tofile = writer.write_tensors_to_file, lazy.tofile
    expected: deque[Any] = deque()
    made: Generator[Any, None, None]

    def write_made(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        nonlocal made
        try:
            listed = (info.tensor for tensors in self.tensors for info in tensors.values())
            expected.extend(tensor for tensor in listed if type(tensor) is lazy)
            tasks = _tasks(gguf, expected)
        except AttributeError:  # another version's
            expected.clear()
            return write(self, *args, **kwargs)
        # torch's thread count is kept per thread.
        made = ahead(tasks, cores(), most_bytes(), partial(torch.set_num_threads, 1))
        del tasks  # and with it what was made, once it is written
        try:
            return write(self, *args, **kwargs)
        finally:
            made.close()
            expected.clear()

    def tofile_made(self: Any, *args: Any, **kwargs: Any) -> Any:
        if expected and expected[0] is self:
            expected.popleft()
            return next(made).tofile(*args, **kwargs)
        return tofile(self, *args, **kwargs)

    writer.write_tensors_to_file, lazy.tofile = write_made, tofile_made


def _tasks(gguf: Any, tensors: Iterable[Any]) -> list[tuple[int, Callable[[], Any]]]:
    """What makes each of the tensors. One that is computed from the same parts as others waits for those before it,
    since they keep what they computed in their parts, and might change it in place."""
    latest: dict[int, Event] = {}  # of the last tensor that is computed from a part
    tasks: list[tuple[int, Callable[[], Any]]] = []
    for tensor in tensors:
        parts, done = _parts(gguf.LazyBase, tensor), Event()
        before = {event for part in parts if (event := latest.get(part)) is not None}
        latest |= dict.fromkeys(parts, done)
        tasks.append((_BYTES * tensor.nbytes, partial(_make, gguf, tensor, before, done)))
    return tasks


def _parts(base: Any, tensor: Any) -> set[int]:
    """Identities of the tensor and of all lazy tensors that it is computed from, which their arguments hold."""
    found: set[int] = set()
    left = [tensor]
    while left:
        item = left.pop()
        if isinstance(item, list | tuple):
            left.extend(item)
        elif isinstance(item, base) and id(item) not in found:
            found.add(id(item))
            left.append(item._args)
    return found


def _make(gguf: Any, tensor: Any, before: set[Event], done: Event) -> Any:
    import torch

    for event in before:
        event.wait()
    try:
        with torch.inference_mode():  # as in the converter; it too is kept per thread
            array = _as_stored(gguf, tensor)
            if array is None:
                array = gguf.LazyNumpyTensor.to_eager(tensor)
        tensor._args = ()  # what it was computed from is needed no more
        return array
    finally:
        done.set()


def _as_stored(gguf: Any, tensor: Any) -> Any:
    """The bytes of a BF16 tensor of the checkpoint as they are there, if `tensor` is what the converter makes of one
    that it changes in nothing, by way of float32; None for any other, and where there is NaN, which it changes."""
    import torch

    try:
        kind = type(tensor._args[0]._args[0])  # the converter's class of lazy torch tensors
        sample = kind.from_eager(torch.zeros(tensor._args[0].shape[:1], dtype=torch.bfloat16))
        made = gguf.quants.quantize(sample.to(torch.float32).numpy(), gguf.GGMLQuantizationType.BF16)
        found = _in_place_of(sample, made, tensor)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # made in another way
        return None
    if found is None or found.dtype != torch.bfloat16 or tensor.dtype != np.uint8:
        return None
    weights = kind.to_eager(found)
    array = weights.contiguous().view(torch.int16).numpy().view(np.uint8)
    return array if array.shape == tensor.shape and not has_nan(weights.reshape(-1)) else None


def _in_place_of(sample: Any, made: Any, tensor: Any) -> Any:
    """What stands in `tensor` where `sample` stands in `made`, if both are made by the same steps; None otherwise."""
    while made is not sample:
        steps = (made._func, made._args[1:], made._kwargs), (tensor._func, tensor._args[1:], tensor._kwargs)
        if type(tensor) is not type(made) or steps[0][1:] != steps[1][1:] or not _same(made._func, tensor._func):
            return None
        made, tensor = made._args[0], tensor._args[0]
    return tensor if type(tensor) is type(sample) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two functions, which may have been made anew for each tensor, do the same."""
    if one == other:
        return True
    cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other)]
    return one.__code__ is other.__code__ and cells[0] == cells[1]
