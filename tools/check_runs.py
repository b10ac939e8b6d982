"""Run A-type files in the ways in which llama.cpp's users run theirs, and compare the texts.

llama-server answers the same prompts, always with the likeliest token: with flash attention on and off, with the file
mapped and read, with the K and V cache in Q8_0 and Q4_0, two requests at once, with a smaller file that drafts, and
with all layers on an RPC server of this machine. Prints for every way how many tokens of every answer are those of the
first way, up to the first that differs.

Floats are added in another order for other numbers of tokens at once, so that a token may differ where the two
likeliest ones are about as likely (their log-probabilities within --tie); ends with status 1 where it differs
elsewhere. A quantized cache may change the texts.

    python tools/check_runs.py MODEL.gguf --draft SMALLER.gguf
"""

import argparse
import concurrent.futures
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To make bread, you need flour, water,",
)
START_SECONDS = 120


@dataclass(frozen=True)
class Way:
    """A way of running: options of llama-server, and whether its texts must be those of the first way."""

    name: str
    options: tuple[str, ...] = ()
    same: bool = True
    at_once: int = 1


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    gaps: list[float]  # between the log-probabilities of the two likeliest tokens, at every token; empty: not asked for
    drafted: int  # tokens that a draft model proposed, and how many of them were taken
    accepted: int


def ways(draft: Path | None, rpc: str | None) -> list[Way]:
    base = [
        Way("flash attention on", ("-fa", "on")),
        Way("flash attention off", ("-fa", "off")),
        Way("file read, not mapped", ("--load-mode", "none")),
        Way("file mapped", ("--load-mode", "mmap")),
        Way("K and V cache Q8_0", ("-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"), same=False),
        Way("K and V cache Q4_0", ("-fa", "on", "-ctk", "q4_0", "-ctv", "q4_0"), same=False),
        Way("two requests at once", ("--parallel", "2"), at_once=2),
    ]
    if draft is not None:
        base.append(Way("draft model", ("--spec-type", "draft-simple", "-md", str(draft))))
    if rpc is not None:
        base.append(Way("RPC server", ("--rpc", rpc, "-ngl", "all")))
    return base


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, path: str | None) -> None:
    """Until the process answers on the port; on `path` over HTTP, if that is given."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if path is None:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            else:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise SystemExit(f"{process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def running(command: Sequence[object], port: int, path: str | None) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with open(log, "wb") as out:
            process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=subprocess.STDOUT)
            try:
                wait_for(port, process, log, path)
                yield
            finally:
                process.terminate()
                process.wait()


def post(port: int, path: str, request: dict[str, Any]) -> Any:
    """What a llama-server on this machine answers."""
    header = {"Content-Type": "application/json"}
    target = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(request).encode(), header)
    with urllib.request.urlopen(target) as reply:
        return json.load(reply)


def ask(port: int, prompt: str, tokens: int, with_gaps: bool) -> Answer:
    request: dict[str, Any] = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    request |= {"return_tokens": True, "ignore_eos": True, "n_probs": 2 if with_gaps else 0}
    said = post(port, "/completion", request)
    timings = said["timings"]
    places = said["completion_probabilities"] if with_gaps else []
    tops = [[top["logprob"] for top in place["top_logprobs"]] for place in places]
    gaps = [top[0] - top[1] for top in tops]
    return Answer(said["tokens"], gaps, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


def answers(binaries: Path, model: Path, way: Way, tokens: int, threads: int, with_gaps: bool) -> list[Answer]:
    """To all PROMPTS."""
    port = free_port()
    command = [binaries / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", port, "-c", 1024]
    command += ["-t", threads, "--no-warmup", "--fit", "off", *way.options]
    if way.at_once == 1:
        command += ["--parallel", 1]
    with (
        running(command, port, "/health"),
        concurrent.futures.ThreadPoolExecutor(max_workers=way.at_once) as pool,
    ):
        return list(pool.map(lambda prompt: ask(port, prompt, tokens, with_gaps), PROMPTS))


def agreement(a: Answer, b: Answer) -> int:
    """Tokens before the first that differs."""
    equal = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def check(
    binaries: Path, model: Path, draft: Path | None, tokens: int, threads: int, tie: float
) -> dict[str, tuple[bool, str]]:
    """By way of running: whether the texts are as they must be, and what to print."""
    port = free_port()
    server = [binaries / "ggml-rpc-server", "--host", "127.0.0.1", "--port", port, "-t", threads]
    first: list[Answer] = []
    results = {}
    for way in ways(draft, f"127.0.0.1:{port}"):
        with running(server, port, None) if "--rpc" in way.options else contextlib.nullcontext():
            got = answers(binaries, model, way, tokens, threads, with_gaps=not first)
        first = first or got
        agreeing = [agreement(a, b) for a, b in zip(first, got, strict=True)]
        gaps = [a.gaps[n] for a, n in zip(first, agreeing, strict=True) if n < tokens]
        good = all(len(a.tokens) == tokens for a in got) and (not way.same or all(gap <= tie for gap in gaps))
        text = f"{', '.join(map(str, agreeing))} of {tokens} tokens agree"
        text += f"; ties within {max(gaps):.3f}" if gaps and way.same else ""
        if "-md" in way.options:
            drafted, accepted = sum(a.drafted for a in got), sum(a.accepted for a in got)
            good = good and 0 < accepted <= drafted
            text += f"; {accepted} of {drafted} drafted tokens accepted"
        results[way.name] = (good, text)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="a smaller file with the same vocabulary")
    parser.add_argument("--runtime", type=Path, help="folder of the binaries (default: the runtime's)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--tie", type=float, default=0.25, help="log-probabilities this close may change places")
    args = parser.parse_args()
    if args.runtime is None:
        from athena_gguf.runtime import build

        args.runtime = build()
    results = check(args.runtime, args.model, args.draft, args.tokens, args.threads, args.tie)
    for name, (good, text) in results.items():
        print(f"{'' if good else 'WRONG: '}{name}: {text}")
    return 0 if all(good for good, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
