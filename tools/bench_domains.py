"""Files against their base on several kinds of text, and in what they answer.

    python tools/bench_domains.py BASE.gguf WORK FILE.gguf [FILE.gguf ...] --text encyclopedia=TEXT --text code=TEXT

Prints two Markdown tables: for every file and text KL divergence, perplexity ratio and share of tokens with the same
most probable successor (as `athena-gguf eval`), and for every file how its answers to fixed prompts compare with the
base file's, both always taking the likeliest token: how many are the same to the end, and how many tokens come before
the first that differs. Prompts go through the file's chat template, if it has one. WORK keeps the base file's logits
(1.5 GB a text for 60 windows and a vocabulary of 49,152) for further runs.

A text that contains control tokens of the model, such as a conversation in its chat format (tools/chat_text.py makes
one), is read with them as tokens, which llama-perplexity by itself does not do.
"""

import argparse
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from check_runs import free_port, post, running

from athena_gguf.gguf_file import GGUFFile
from athena_gguf.gguf_file.atomic import temporary_beside
from athena_gguf.report.evaluate import DEFAULT_WINDOWS, evaluate
from athena_gguf.runtime import binary

MIB = 2**20
CONTROL, USER_DEFINED = 3, 4  # of llama.cpp's llama_token_type
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
MARK = b"\x01"
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for sleeping better.",
    "What is 12 multiplied by 11? Explain your steps.",
    "Write a Python function that returns the larger of two numbers.",
    "Summarize the story of Romeo and Juliet.",
    "Translate into Spanish: Good morning, my friend.",
    "List five animals that live in the ocean.",
    "Who was Isaac Newton?",
    "How does a refrigerator keep food cold?",
    "Write an email that asks a colleague for a meeting on Monday.",
    "What is the difference between a virus and a bacterium?",
    "Describe a forest in autumn.",
    "How do I boil an egg?",
    "Write a SQL query that selects all customers from Berlin.",
    "Correct this sentence: He go to school every days.",
    "Tell me a story about a dragon who is afraid of fire.",
    "What are the advantages of public transport?",
    "Name the planets of the solar system in order.",
)


@dataclass(frozen=True)
class Text:
    """`base`: the file whose tokenizer reads it, and whose logits are kept in `logits`."""

    name: str
    path: Path
    base: Path
    logits: Path


def control_tokens(file: Path) -> list[bytes]:
    with GGUFFile(file) as opened:
        metadata = opened.metadata
    tokens, kinds = metadata.get(TOKENS), metadata.get(TOKEN_TYPES)
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return []
    return [str(token).encode() for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL and token]


def renamed(text: bytes, tokens: list[bytes]) -> bytes:
    """The text with these tokens as `with_renamed_control_tokens` calls them."""
    pattern = b"|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.sub(pattern, lambda match: MARK + match[0][1:], text)


def with_renamed_control_tokens(file: Path, out: Path) -> None:
    """A copy of a file of standard types in which control tokens are such as llama.cpp finds in any text.

    They begin with MARK: those that end an answer are control tokens for llama.cpp whatever the file says, by name.
    """
    from gguf import GGUFReader

    with temporary_beside(out) as temporary:
        shutil.copyfile(file, temporary)
        reader = GGUFReader(temporary, "r+")
        names, kinds = reader.fields[TOKENS], reader.fields[TOKEN_TYPES]
        for name, kind in zip(names.data, kinds.data, strict=True):
            if kinds.parts[kind][0] == CONTROL and len(names.parts[name]):
                kinds.parts[kind][0] = USER_DEFINED
                names.parts[name][0] = ord(MARK)
        reader.data.flush()


def texts(named: list[tuple[str, Path]], base: Path, work: Path) -> list[Text]:
    found, control = [], control_tokens(base)
    for name, path in named:
        reader, logits = base, work / f"logits-{name}"
        text = path.read_bytes()
        if any(token in text for token in control):
            about = f"{base.absolute()} {base.stat().st_size} {base.stat().st_mtime_ns}"
            title = hashlib.sha256(about.encode()).hexdigest()[:8]
            reader, path = work / f"base-for-chat-{title}.gguf", work / f"{name}.renamed-{title}.txt"
            path.write_bytes(renamed(text, control))
            if not reader.exists():
                with_renamed_control_tokens(base, reader)
        found.append(Text(name, path, reader, logits))
    return found


def answers(file: Path, tokens: int, threads: int | None) -> list[list[int]]:
    """The tokens of the likeliest answer to each of PROMPTS, without the one that ends it, by llama-server."""
    with GGUFFile(file) as opened:
        chat = "tokenizer.chat_template" in opened.fields
    port = free_port()
    # One request at a time: products of several at once may add in another order.
    command: list[object] = [binary("llama-server"), "-m", file, "--host", "127.0.0.1", "--port", port, "-c", 2048]
    command += ["--parallel", 1, "--fit", "off", "--no-warmup", *(["-t", threads] if threads else [])]

    found = []
    with running(command, port, "/health"):
        for prompt in PROMPTS:
            if chat:
                prompt = post(port, "/apply-template", {"messages": [{"role": "user", "content": prompt}]})["prompt"]
            request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
            found.append(post(port, "/completion", request | {"return_tokens": True})["tokens"])
    return found


def shared(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def named_path(value: str) -> tuple[str, Path]:
    name, _, path = value.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{value}: give NAME=PATH")
    return name, Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--text", type=named_path, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--windows", type=int, default=DEFAULT_WINDOWS, help="of 512 tokens, of every text")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most; 0: no answers")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.text:
        print("| file | MiB | text | perplexity of the base | KLD | perplexity ratio | same top token |")
        print("|---|---|---|---|---|---|---|", flush=True)
    # Text by text, so that the base file's logits are still in memory for the next file.
    for text in texts(args.text, args.base, args.work):
        for file in args.files:
            found = evaluate(
                file, text.base, text.path, windows=args.windows, base_logits=text.logits, threads=args.threads
            )
            cells = [file.stem, f"{found.bytes / MIB:.1f}", text.name, f"{found.ppl_base:.3f}"]
            cells += [f"{found.kld:.4f} ± {found.kld_error:.4f}", f"{found.ppl_ratio:.4f}", f"{found.same_top:.3f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    if args.tokens:
        wanted = answers(args.base, args.tokens, args.threads)
        print(f"\n| file | same answers, of {len(PROMPTS)} | tokens before the first that differs, mean |")
        print("|---|---|---|", flush=True)
        for file in args.files:
            got = answers(file, args.tokens, args.threads)
            same = sum(a == b for a, b in zip(wanted, got, strict=True))
            mean = sum(shared(a, b) for a, b in zip(wanted, got, strict=True)) / len(PROMPTS)
            print(f"| {file.stem} | {same} | {mean:.1f} |", flush=True)
        print(
            f"\nThe base file's answers have {sum(map(len, wanted)) / len(PROMPTS):.1f} tokens, {args.tokens} at most."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
