"""How far a file's predictions are from its base's: llama-perplexity's KL divergence, read back as numbers."""

import hashlib
import json
import math
import re
import struct
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.atomic import require_space, temporary_beside
from athena_gguf.gguf_file.reader import GGUFFile
from athena_gguf.report.inspection import bits_per_weight
from athena_gguf.runtime.messages import complaint
from athena_gguf.runtime.places import binary
from athena_gguf.text import read_text

WINDOW = 512  # tokens; the second half of each is scored
DEFAULT_WINDOWS = 60
_TOKENS = "tokenizer.ggml.tokens"
_MAY_BE_ABSENT = ("output.weight", "rope_freqs.weight")  # where the embeddings are used, and what follows from metadata
_LOGITS_MAGIC = b"_logits_"
_NUMBER = r"\s*([-+\d.einfa]+)"
_ESTIMATE = re.compile(rf"Final estimate: PPL ={_NUMBER}")


@dataclass(frozen=True)
class Evaluation:
    """`kld`: mean KL divergence from the base (nats a token), `same_top`: share (0 to 1) of tokens with the same most
    probable successor, `bytes`: of the file, `bpw`: bits of all tensors a weight; `*_error`: standard errors."""

    kld: float
    kld_error: float
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    ppl: float
    ppl_error: float
    ppl_base: float
    ppl_ratio: float
    ppl_ratio_error: float
    same_top: float
    bytes: int
    bpw: float
    windows: int
    seconds: float


_PATTERNS = {
    "kld": rf"Mean\s+KLD:{_NUMBER}",
    "kld_error": rf"Mean\s+KLD:{_NUMBER} ±{_NUMBER}",
    "kld_median": rf"Median\s+KLD:{_NUMBER}",
    "kld_99": rf"99\.0%\s+KLD:{_NUMBER}",
    "kld_999": rf"99\.9%\s+KLD:{_NUMBER}",
    "kld_max": rf"Maximum KLD:{_NUMBER}",
    "ppl": rf"Mean PPL\(Q\)\s*:{_NUMBER}",
    "ppl_error": rf"Mean PPL\(Q\)\s*:{_NUMBER} ±{_NUMBER}",
    "ppl_base": rf"Mean PPL\(base\)\s*:{_NUMBER}",
    "ppl_ratio": rf"Mean PPL\(Q\)/PPL\(base\)\s*:{_NUMBER}",
    "ppl_ratio_error": rf"Mean PPL\(Q\)/PPL\(base\)\s*:{_NUMBER} ±{_NUMBER}",
    "same_top": rf"Same top p:{_NUMBER}",
}


def evaluate(
    file: Path,
    base: Path,
    text: Path,
    *,
    windows: int = DEFAULT_WINDOWS,
    base_logits: Path | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Compare `file` with `base` over the first `windows` windows of 512 tokens of `text` (fewer if it is shorter).

    `base_logits`: where the base's logits are kept and, if they are of the same base, text and windows, used again.
    Raises AthenaError if a file is unreadable, the runtime not built, the text too short, or the disk too full.
    """
    perplexity = binary("llama-perplexity")
    read_text(text)  # llama.cpp's tokenizer throws an exception at anything else
    text_hash = hashlib.sha256(text.read_bytes()).hexdigest()
    if text.stat().st_size < 2 * WINDOW:  # a token has at least a byte
        raise _too_short(text)
    with GGUFFile(base) as opened_base, GGUFFile(file) as opened:
        base_bpw = bits_per_weight(opened_base)
        tokens = opened_base.metadata.get(_TOKENS)
        if not isinstance(tokens, list):
            raise AthenaError(f"{base} has no tokenizer, so it cannot be evaluated on text")
        n_bytes, bpw = opened.n_bytes, bits_per_weight(opened)
        _check_same_model(opened, opened_base)
    # 16-bit log-probabilities of the scored half of a window, and four more values a token
    size = min(windows, text.stat().st_size // WINDOW + 1) * (WINDOW // 2) * (len(tokens) + 5) * 2
    common = ["-c", str(WINDOW), *(["-t", str(threads)] if threads else [])]
    make = [str(perplexity), "-m", str(base), "-f", str(text), "--chunks", str(windows), *common]
    if bpw > base_bpw:
        progress.note(
            f"warning: {file} has {bpw:.3f} bits a weight and its base {base} only {base_bpw:.3f}: are they swapped?"
        )
    with tempfile.TemporaryDirectory(prefix="athena-eval-") as scratch:
        logits = base_logits or Path(scratch, "logits")
        ppl_base = _prepare_logits(logits, make, base, text, text_hash, windows, size)
        start = time.monotonic()
        compare = [str(perplexity), "-m", str(file), "--kl-divergence", "--kl-divergence-base", str(logits), *common]
        with progress.stage(f"Comparing {file.name}"):
            said = _run(compare, file)
        seconds = time.monotonic() - start
    found = parse_statistics(said)
    chunks = re.search(r"computing over (\d+) chunks", said)
    if found is None or chunks is None:
        raise AthenaError(f"llama-perplexity could not compare {file} with {base}: {complaint(said)}")
    # The logits that are kept end at 16 below the largest, and so do the losses of unlikely tokens that come of them.
    found |= {"ppl_base": ppl_base, "ppl_ratio": found["ppl"] / ppl_base}
    return Evaluation(bytes=n_bytes, bpw=bpw, windows=int(chunks[1]), seconds=seconds, **found)


def parse_statistics(said: str) -> dict[str, float] | None:
    """The numbers that `llama-perplexity --kl-divergence` prints, None if any is missing."""
    found = {}
    for name, pattern in _PATTERNS.items():
        match = re.search(pattern, said)
        if match is None:
            return None
        found[name] = float(match[match.lastindex or 1])
    found["same_top"] /= 100
    return found


def print_evaluation(
    file: Path,
    base: Path,
    text: Path,
    windows: int,
    base_logits: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """The result of `evaluate` on stdout."""
    result = evaluate(file, base, text, windows=windows, base_logits=base_logits, threads=threads)
    if as_json:
        values = {k: v if math.isfinite(v) else None for k, v in asdict(result).items()}  # JSON has no NaN
        print(json.dumps(values, indent=1, allow_nan=False))
        return
    kld = round(result.kld, 6) + 0.0  # no -0
    print(f"KL divergence   {kld:.6f} ± {result.kld_error:.6f}  (median {result.kld_median:.6f})")
    print(f"perplexity      {result.ppl:.4f}, base {result.ppl_base:.4f}, ratio {result.ppl_ratio:.4f}")
    print(f"same top token  {100 * result.same_top:.2f}%")
    print(f"size            {result.bytes / 1024**2:.2f} MiB, {result.bpw:.3f} bits a weight")
    asked = f" ({windows} asked for)" if result.windows < windows else ""
    print(f"windows         {result.windows}{asked} of {WINDOW} tokens in {result.seconds:.1f} s")


def _too_short(text: Path) -> AthenaError:
    return AthenaError(f"{text}: evaluation needs at least {2 * WINDOW} tokens of text; give a longer one")


def _check_same_model(file: GGUFFile, base: GGUFFile) -> None:
    """Raise AthenaError if the files' vocabularies differ in size, and warn if tokens, or names or shapes of tensors,
    say that they are two models."""
    ours, theirs = file.metadata.get(_TOKENS), base.metadata.get(_TOKENS)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) != len(theirs):
        raise AthenaError(
            f"{file.path} has {len(ours)} tokens in its vocabulary and {base.path} {len(theirs)}: they are of two "
            "models; give the base file of this one"
        )
    shapes, base_shapes = ({t.name: t.shape for t in opened} for opened in (file, base))
    odd = [n for n in shapes.keys() | base_shapes.keys() if shapes.get(n) != base_shapes.get(n)]
    odd = sorted(n for n in odd if n not in _MAY_BE_ABSENT or (n in shapes and n in base_shapes))
    if odd:
        first, second = (list(s[odd[0]]) if odd[0] in s else "absent" for s in (shapes, base_shapes))
        what = f"tensor {odd[0]} is {first} in the one and {second} in the other"
    elif ours != theirs:
        what = "their vocabularies differ"
    else:
        return
    progress.note(f"warning: {file.path} and {base.path} do not seem to be of one model: {what}")


def _prepare_logits(
    logits: Path, make: list[str], base: Path, text: Path, text_hash: str, windows: int, size: int
) -> float:
    """Let the base file's logits of `text` be in `logits`; a file beside it says what they were made of. Says so if the
    text has fewer windows than asked for. Returns the base file's perplexity."""
    stat = base.stat()
    inputs = {"text": text_hash, "windows": windows}
    wanted = inputs | {"base": str(base.absolute()), "base_bytes": stat.st_size, "base_mtime_ns": stat.st_mtime_ns}
    stamp = logits.with_name(logits.name + ".json")
    if logits.exists():
        with open(logits, "rb") as handle:
            if handle.read(len(_LOGITS_MAGIC)) != _LOGITS_MAGIC:
                raise AthenaError(f"{logits} exists and holds no logits; give --base-logits another name")
        try:
            kept = json.loads(stamp.read_text())
            ppl = float(kept.pop("ppl"))  # absent where an earlier version kept the logits: they are made again
            if kept == wanted:
                return ppl
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    require_space(logits.absolute().parent, size, f"the logits of {base.name}")
    stamp.unlink(missing_ok=True)
    with temporary_beside(logits) as temporary, progress.stage(f"Logits of {base.name}"):
        said = _run([*make, "--kl-divergence-base", str(temporary)], base)
        if "you need at least" in said:
            raise _too_short(text)
        estimate = _ESTIMATE.search(said)
        if estimate is None:  # the exit code is 0 whatever happens
            raise AthenaError(f"llama-perplexity made no logits of {base}: {complaint(said)}")
        with open(temporary, "rb") as handle:
            _, _, found = struct.unpack("<III", handle.read(len(_LOGITS_MAGIC) + 12)[len(_LOGITS_MAGIC) :])
    if found < windows:
        progress.note(f"warning: {text} has only {found} windows of {WINDOW} tokens, {windows} were asked for")
    ppl = float(estimate[1])
    stamp.write_text(json.dumps(wanted | {"ppl": ppl}))
    return ppl


def _run(command: list[str], file: Path) -> str:
    """What the tool printed. Raises AthenaError if it fails; a Ctrl-C reaches it too and ends both."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    said = result.stdout.decode(errors="replace")
    if result.returncode:
        raise AthenaError(f"llama-perplexity failed on {file} (exit code {result.returncode}): {complaint(said)}")
    return said
