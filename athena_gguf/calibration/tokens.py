"""Calibration tokens: windows cut from text files, or text that the model writes itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from athena_gguf.errors import AthenaError
from athena_gguf.text import read_text

if TYPE_CHECKING:
    import torch


def text_windows(tokenizer: Any, files: Sequence[Path], tokens: int, length: int, seed: int) -> torch.Tensor:
    """About `tokens` tokens in windows [n, length] drawn at random, without overlap, from the text of `files`.

    Fewer if the text is shorter. Raises AthenaError for an unreadable file or a text shorter than one window.
    """
    import torch

    windows = torch.cat([file_windows(tokenizer, path, length) for path in files])
    if not len(windows):
        names = ", ".join(map(str, files))
        raise AthenaError(f"{names}: the calibration text is shorter than one window of {length} tokens")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: max(1, tokens // length)]]


def file_windows(tokenizer: Any, path: Path, length: int) -> torch.Tensor:
    """The text of a file in windows [n, length], one after the other. Raises AthenaError if it cannot be read."""
    import torch

    ids = torch.tensor(
        tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        windows[:, 0] = tokenizer.bos_token_id  # models that were always given one need it
    return windows


def self_generated_windows(
    model: Any,
    tokenizer: Any,
    tokens: int,
    length: int,
    seed: int,
    batch: int = 32,
    threads: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> torch.Tensor:
    """About `tokens` tokens in windows [n, length] that the model writes itself (LLM-QAT, Liu et al. 2023).

    Every window starts from the tokenizer's BOS (or EOS) token and a token drawn from the model's 4,096 likeliest first
    tokens, evenly, so that windows differ; then plain sampling at temperature 1. `batch` windows are written at a
    time, by each of `threads` threads; the text depends on `batch` but not on `threads`. `advance` is called with the
    tokens done.
    """
    import torch

    device = next(model.parameters()).device
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise AthenaError("the tokenizer has neither a BOS nor an EOS token to start from; give --calibration FILE")
    with torch.no_grad():
        logits = model(input_ids=torch.full((1, 1), first, device=device)).logits[0, -1]
    if not torch.isfinite(logits).all():
        raise AthenaError("the model's own predictions are NaN or Inf; check its weights")
    likely = logits.topk(min(4096, len(logits))).indices
    count = max(1, tokens // length)
    lock, stopped = Lock(), Event()

    def count_tokens(done: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with lock:
            advance(done)

    def write(at: int) -> torch.Tensor:
        own = np.random.SeedSequence((seed, at)).generate_state(1)  # torch looks at 32 bits of a seed
        generator = torch.Generator(device).manual_seed(int(own[0]))
        n = min(batch, count - at)
        pick = likely[torch.randint(len(likely), (n,), generator=generator, device=device)]
        start = torch.full((n, 1), first, device=device)
        return _write(model, torch.cat([start, pick[:, None]], dim=1), length, generator, count_tokens)

    starts = range(0, count, batch)
    if threads == 1:
        return torch.cat([write(at) for at in starts])
    # A step is a thousand small operations: threads that share each of them spend most of their time waiting.
    pool = ThreadPoolExecutor(threads, "calibration", initializer=torch.set_num_threads, initargs=(1,))
    try:
        return torch.cat(list(pool.map(write, starts)))
    finally:
        stopped.set()  # an interruption does not wait for whole windows
        pool.shutdown(cancel_futures=True)


def _write(
    model: Any, ids: torch.Tensor, length: int, generator: torch.Generator, advance: Callable[[int], None]
) -> torch.Tensor:
    """Go on with `ids` [n, some] until [n, length]; on the CPU."""
    import torch

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache, new = None, ids
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=new, past_key_values=cache, use_cache=True, **last)
            cache = out.past_key_values
            new = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
            advance(len(ids))
    return ids.cpu()
