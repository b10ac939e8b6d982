"""The command line: one function a command, and no logic. Heavy modules are imported by the command that needs them."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from athena_gguf import __version__
from athena_gguf.errors import AthenaError


class _Commands(TyperGroup):
    """An AthenaError becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AthenaError as error:
            red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{red}error: {' '.join(str(error).split())}{plain}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small GGUF files from large language models: quantize to A2, A3 or A4, look at the result, run it.",
)
runtime_app = typer.Typer(no_args_is_help=True, help="The patched llama.cpp: build it, find its binaries.")
app.add_typer(runtime_app, name="runtime")

RuntimeDir = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the runtime. [default: $ATHENA_GGUF_RUNTIME or the user's cache folder]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. [default: all cores]")]


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@runtime_app.command("build")
def runtime_build(
    folder: RuntimeDir = None,
    checkout: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="CHECKOUT", help="A llama.cpp checkout to use; it is copied, not changed."),
    ] = None,
    archive: Annotated[
        Path | None, typer.Option("--archive", help="The pinned source archive, if it is downloaded already.")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Compilers at once. [default: cores]")] = None,
    tests: Annotated[bool, typer.Option("--tests", help="Also build llama.cpp's tests of the tensor types.")] = False,
) -> None:
    """Fetch, patch and build llama.cpp; does nothing when nothing changed."""
    from athena_gguf.runtime import build

    print(build(folder, checkout=checkout, source=archive, jobs=jobs, tests=tests))


@runtime_app.command("path")
def runtime_path(folder: RuntimeDir = None) -> None:
    """Print the folder of the binaries."""
    from athena_gguf.runtime import binary, binary_dir

    binary("llama-completion", folder)
    print(binary_dir(folder))


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face model directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type_name: Annotated[
        str | None, typer.Option("--type", help="A2, A3 or A4 for all linear layers. [default: A3, without a target]")
    ] = None,
    bpw: Annotated[
        float | None, typer.Option("--bpw", help="Target: bits a weight over all tensors, such as 3.4.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Target: size of the whole file, such as 5.5GiB or 800MB.")
    ] = None,
    fit_memory: Annotated[
        str | None,
        typer.Option("--fit-memory", help="Target: memory to run in, such as 8GiB: the file, a KV cache and a margin."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of the KV cache of --fit-memory. [default: 4096]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="Target by name, in bits a weight over all: tiny 2.5, small 3, medium 3.5, large 4.25, best 5.5.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each tensor's type, the file's exact size and predicted KLD only.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option("--calibration", metavar="FILE|self", help="Text to calibrate on; repeatable. [default: self]"),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", min=1, help="Tokens to calibrate on. [default: 98304]")
    ] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option("--embedding-type", help="Type of the embeddings. [default: Q8_0; with a target, what suits it]"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="What may be taken of the GPU's memory, as 12GiB. [default: what is free]"),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory", help="Memory that the model and its activations may take. [default: most of what is free]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the calibration text and the rows sampled.")] = 0,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune", help="Train scales and norms on the model's predictions. [default: with a GPU only]"
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Folder for what further conversions can use. [default: none]")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="The model's BF16 GGUF, if there is one already.")] = None,
) -> None:
    """Quantize a Hugging Face model to a GGUF file."""
    from athena_gguf.conversion import ConvertOptions
    from athena_gguf.conversion import convert as run_convert
    from athena_gguf.memory import keep_freed_memory

    keep_freed_memory()
    options = ConvertOptions(
        type=type_name,
        bpw=bpw,
        size=size,
        fit_memory=fit_memory,
        context=context,
        preset=preset,
        dry_run=dry_run,
        calibration=tuple(calibration or ("self",)),
        calibration_tokens=calibration_tokens,
        embedding_type=embedding_type,
        device=device,
        seed=seed,
        work_dir=work_dir,
        base=base,
        tune=tune,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
    )
    run_convert(model, out, options)


@app.command()
def base(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face model directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
) -> None:
    """Write a model's BF16 GGUF through llama.cpp's converter."""
    from athena_gguf.gguf_file import write_base

    write_base(model, out)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    as_json: Json = False,
) -> None:
    """Show a file's metadata, tensors, types and bits a weight."""
    from athena_gguf.report.inspection import print_inspection

    print_inspection(file, as_json)


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file to evaluate.")],
    base_file: Annotated[Path, typer.Option("--base", metavar="BASE.gguf", help="The file it is compared with.")],
    text: Annotated[Path, typer.Option("--text", help="The text to evaluate on.")],
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of 512 tokens, from the start.")] = 60,
    base_logits: Annotated[
        Path | None,
        typer.Option(
            "--base-logits",
            help="Keep the base file's logits here and use them again (large: 512 bytes x windows x vocabulary).",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a file with its base: KL divergence, perplexity, how often the most probable token is the same."""
    from athena_gguf.report.evaluate import print_evaluation

    print_evaluation(file, base_file, text, windows, base_logits, threads, as_json)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to write at most.")] = 256,
    system: Annotated[str | None, typer.Option("--system", help="System prompt of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    context: Annotated[int, typer.Option("--context", "-c", min=8, help="Tokens of context.")] = 4096,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest.")] = 0.8,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the sampling. [default: random]")] = None,
    threads: Threads = None,
) -> None:
    """Answer a prompt: the answer on stdout, the speed on stderr."""
    from athena_gguf.runtime.completion import complete

    if not prompt.strip():
        raise AthenaError("--prompt is empty; say what to answer")
    complete(
        file,
        prompt,
        tokens=tokens,
        system=system,
        raw=raw,
        context=context,
        temperature=temperature,
        seed=seed,
        threads=threads,
    )


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script. A polite request to end is handled as Ctrl-C, so that temporary files are removed."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    app()
