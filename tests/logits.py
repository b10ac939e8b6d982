"""Log-probabilities of llama.cpp and of torch for the same tokens."""

import struct
import subprocess

import numpy as np

from athena_gguf.runtime import binary

CONTEXT = 128
WINDOWS = 3
# Error of an input rounded to 8 bits, of its root mean square: the largest of 64 columns is 8 times that at most, steps
# are 1/127 of the largest, and rounding is off by a step / sqrt(12).
ROUNDING = 8 / 127 / 12**0.5


def llama_cpp(file, text, folder):
    """Token ids [windows, context] and log-probabilities [windows, predicted, vocabulary] of llama-perplexity.

    The log-probabilities are 16-bit numbers from the largest of a row down to 16 less at most, with a float32 step and
    minimum before each row (`log_softmax` in llama.cpp's tools/perplexity).
    """
    out = folder / "logits"
    command = [binary("llama-perplexity"), "-m", file, "-f", text, "-c", CONTEXT, "-b", CONTEXT, "-t", 2]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--chunks", WINDOWS, "--kl-divergence-base", out]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stderr[-2000:]
    data = out.read_bytes()
    magic, context, vocabulary, windows = struct.unpack_from("<8s3i", data)
    assert (magic, context, windows) == (b"_logits_", CONTEXT, WINDOWS)
    tokens = np.frombuffer(data, np.int32, windows * context, 20).reshape(windows, context)
    width, predicted = 2 * ((vocabulary + 1) // 2) + 4, context - 1 - context // 2
    rows = np.frombuffer(data, np.uint16, offset=20 + tokens.nbytes).reshape(windows, predicted, width)
    step, least = np.moveaxis(np.ascontiguousarray(rows[..., :4]).view(np.float32), -1, 0)
    return tokens, least[..., None] + step[..., None] * rows[..., 4 : 4 + vocabulary]


def log_probabilities(model, tokens, begins=True):
    """`begins`: the vocabulary puts its BOS token at the start of every text."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    if begins:
        ids[:, 0] = model.config.bos_token_id  # as llama-perplexity does in every window
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, CONTEXT // 2 : -1]
    return logits.double().log_softmax(-1).numpy()


def rms(x):
    return np.sqrt(np.mean(np.square(x)))
