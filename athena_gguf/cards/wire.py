"""Numbered messages over a pipe: whatever can be pickled. Tensors on a GPU go without their numbers if both ends can
look at its memory (CUDA IPC, by torch.multiprocessing), and arrive where they were; others arrive in the host's."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NUMBERS = struct.Struct("<QQ")  # of the message, and of its parts
_LENGTH = struct.Struct("<Q")
_SHARED = 1 << 16  # bytes from which a tensor is worth an event, a handle and a place in torch's count of readers

Parts = Sequence["memoryview | bytearray"]


def packed(message: object, share: bool) -> Parts:
    """`share`: tensors on a GPU stay there. Of one that does, the memory is kept until the reader has let go of it;
    what this thread's stream has to do until now is done before the reader's default stream goes on."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, share, buffers.append).dump(message)
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


def unpacked(parts: Parts) -> Any:
    return pickle.loads(parts[0], buffers=parts[1:])


def write(file: IO[bytes], number: int, parts: Parts) -> None:
    file.write(_NUMBERS.pack(number, len(parts)))
    for part in parts:
        file.write(_LENGTH.pack(len(part)))
        file.write(part)
    file.flush()


def read(file: IO[bytes]) -> tuple[int, Parts]:
    """Raises EOFError where the other end is gone."""
    number, count = _NUMBERS.unpack(_exactly(file, _NUMBERS.size))
    return number, [_exactly(file, *_LENGTH.unpack(_exactly(file, _LENGTH.size))) for _ in range(count)]


def _exactly(file: IO[bytes], length: int) -> bytearray:
    found = bytearray(length)
    view, done = memoryview(found), 0
    while done < length:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got
    return found


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], share: bool, buffer_callback: Callable[[pickle.PickleBuffer], Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffer_callback)
        self.share = share

    def reducer_override(self, value: Any) -> Any:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if value.is_cuda and self.share and value.nbytes >= _SHARED:
            return reduce_tensor(value)
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer = pickle.PickleBuffer(numbers)  # type: ignore[arg-type]
        return _tensor, (buffer, value.dtype, tuple(value.shape))


def _tensor(numbers: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.frombuffer(numbers, dtype=dtype).reshape(shape) if len(numbers) else torch.empty(shape, dtype=dtype)
