"""The rows of the tensors that read one input, shared among devices: every one but the first has its own process."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from athena_gguf.cards import Card
from athena_gguf.cards.child import Here
from athena_gguf.encode.layer import encode_layer
from athena_gguf.encode.matrix import Encoded, EncodeOptions
from athena_gguf.encode.pool import EncodePool
from athena_gguf.errors import AthenaError

if TYPE_CHECKING:
    import torch

Found = list[tuple[str, Encoded]]


class RowEncoders(AbstractContextManager["RowEncoders"]):
    """`pool` encodes on `device`, and a process for each of `cards` beside it."""

    def __init__(self, pool: EncodePool, device: torch.device, cards: Sequence[Card] = ()) -> None:
        self.pool, self.device, self.cards = pool, device, cards
        self.threads = ThreadPoolExecutor(max(1, len(cards)), "rows on a card")

    def __enter__(self) -> RowEncoders:
        for card in self.cards:
            card.call(_start, self.pool.options)
        return self

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)
        for card in self.cards:
            with suppress(AthenaError):  # nothing is left where the process has ended
                card.call(_end)

    def encode(
        self,
        h: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        kinds: Mapping[str, str],
        finished: Container[str] = (),
    ) -> Iterator[tuple[str, Encoded]]:
        """As `encode_layer`, of `weights` by name."""
        cards = self.cards[: min(map(len, weights.values())) - 1]  # others would have no row
        parts = {name: weight.tensor_split(1 + len(cards)) for name, weight in weights.items()}
        others = []
        for n, card in enumerate(cards, 1):
            share = {name: rows[n].contiguous() for name, rows in parts.items()}
            others.append(self.threads.submit(card.call, _encode, h, share, kinds, finished))
        own = {name: rows[0] for name, rows in parts.items()}
        found = [_encoded(self.pool, self.device, h, own, kinds, finished), *(other.result() for other in others)]
        for pieces in zip(*found, strict=True):
            name, _ = pieces[0]
            whole = [encoded for _, encoded in pieces]
            data = np.concatenate([encoded.data for encoded in whole])
            yield name, Encoded(data, sum(e.loss for e in whole), sum(e.power for e in whole))


def _encoded(
    pool: EncodePool,
    device: torch.device,
    h: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    kinds: Mapping[str, str],
    finished: Container[str],
) -> Found:
    tensors = [_Rows(name, weight) for name, weight in weights.items()]
    return list(encode_layer(pool, h.to(device), tensors, kinds, device, finished=finished))


@dataclass(frozen=True)
class _Rows:
    """`Weights` in memory."""

    name: str
    weight: torch.Tensor

    @property
    def n_elements(self) -> int:
        return self.weight.numel()

    @property
    def columns(self) -> int:
        return self.weight.shape[-1]

    def to_torch(self, device: torch.device | str) -> torch.Tensor:
        return self.weight.to(device)


def _start(here: Here, options: EncodeOptions) -> None:
    here.held[EncodePool] = EncodePool(options, 1, here.device).__enter__()


def _encode(
    here: Here,
    h: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    kinds: Mapping[str, str],
    finished: Container[str],
) -> Found:
    return _encoded(here.held[EncodePool], here.device, h, weights, kinds, finished)


def _end(here: Here) -> None:
    pool = here.held.pop(EncodePool, None)
    if pool is not None:
        pool.__exit__(None, None, None)
