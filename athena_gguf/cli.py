"""The command line: one function a command, and no logic. Heavy modules are imported by the command that needs them.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong use, 3 some jobs of a batch failed, 70 a fault of this
program, 130 interrupted (docs/scripting.md).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from athena_gguf import __version__, progress
from athena_gguf.errors import INTERRUPTED, AthenaError, UsageError

FAILED_JOBS, FAULT = 3, 70  # exit codes; 70 is EX_SOFTWARE of sysexits.h


class _Commands(TyperGroup):
    """An exception becomes a line on stderr and an exit code; only one that should not happen shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AthenaError as error:
            progress.error(" ".join(str(error).split()), error.exit_code)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            progress.interrupted(INTERRUPTED)
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read the output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):  # wrong use, or the end of a command
                raise
            import traceback

            traceback.print_exc()
            progress.error(f"{type(error).__name__}: {error} (a fault of athena-gguf; please report it)", FAULT)
            raise SystemExit(FAULT) from None


def _examples(*commands: str) -> str:
    """The end of a help text. Paragraphs, since lines of one would be joined."""
    return "\n\n".join(["Examples:", *commands])


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small GGUF files from large language models: quantize to A2, A3 or A4, look at the result, run it.",
)
runtime_app = typer.Typer(no_args_is_help=True, help="The patched llama.cpp: build it, find its binaries.")
app.add_typer(runtime_app, name="runtime")

RuntimeDir = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the runtime. \\[default: $ATHENA_GGUF_RUNTIME or the user's cache folder]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Warnings and errors only.",
        callback=lambda wanted: progress.set_form("quiet") if wanted else None,
        expose_value=False,
    ),
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="What happens as JSON, an object a line, on stderr.",
        callback=lambda wanted: progress.set_form("json") if wanted else None,
        expose_value=False,
    ),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Look at it first.")
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Windows of 512 tokens, from the start.")]
BaseLogits = Annotated[
    Path | None,
    typer.Option(
        "--base-logits",
        help="Keep the base file's logits here and use them again (large: 512 bytes x windows x vocabulary).",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. \\[default: all cores]")]


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
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compilers at once. \\[default: cores]")
    ] = None,
    tests: Annotated[bool, typer.Option("--tests", help="Also build llama.cpp's tests of the tensor types.")] = False,
    web_page: Annotated[
        bool,
        typer.Option(
            "--web-page",
            help="Also build llama-server's web page; needs npm, which fetches some 1,000 packages from its registry.",
        ),
    ] = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Fetch, patch and build llama.cpp; does nothing when nothing changed."""
    from athena_gguf.runtime import build

    print(build(folder, checkout=checkout, source=archive, jobs=jobs, tests=tests, web_page=web_page))


@runtime_app.command("path")
def runtime_path(folder: RuntimeDir = None) -> None:
    """Print the folder of the binaries."""
    from athena_gguf import progress
    from athena_gguf.runtime import binary, binary_dir
    from athena_gguf.runtime.make import build_state
    from athena_gguf.runtime.places import resolve

    binary("llama-completion", folder)
    if build_state(resolve(folder)) == "old":
        progress.note("warning: built from another patch, source or processor; run `athena-gguf runtime build` again")
    print(binary_dir(folder))


@app.command(
    epilog=_examples(
        "athena-gguf convert models/SmolLM2-135M SmolLM2-A3.gguf --type A3",
        "athena-gguf convert HuggingFaceTB/SmolLM2-135M-Instruct small.gguf --preset small",
        "athena-gguf convert MODEL OUT.gguf --size 5.5GiB --dry-run",
        "athena-gguf convert MODEL OUT.gguf --bpw 3.4 --calibration text.txt --work-dir work",
        "athena-gguf convert MODEL OUT.gguf --type A3 --ray auto",
    )
)
def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder, a hub id (org/name), or a GGUF file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type_name: Annotated[
        str | None, typer.Option("--type", help="A2, A3 or A4 for all linear layers. \\[default: A3, without a target]")
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
        int | None, typer.Option("--context", min=1, help="Tokens of the KV cache of --fit-memory. \\[default: 4096]")
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
        typer.Option("--calibration", metavar="FILE|self", help="Text to calibrate on; repeatable. \\[default: self]"),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            min=1,
            help="Tokens to calibrate on. \\[default: 262144; on a CPU 49152; not in order 98304]",
        ),
    ] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option(
            "--embedding-type", help="Type of the embeddings. \\[default: Q8_0; with a target, what suits it]"
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="What may be taken of the GPU's memory, as 12GiB. \\[default: what is free]"),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory",
            help="Memory that the model and its activations may take. \\[default: most of what is free]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the calibration text and the rows sampled.")] = 0,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--no-sequential",
            help="Encode layers in order, each behind those before. \\[default: where possible]",
        ),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune", help="Train scales and norms on the model's predictions. \\[default: with a GPU only]"
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Folder for what further conversions can use. \\[default: none]")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", help="The model's BF16 GGUF, if there is one already.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="DIR", help="Folder of a model card, to which the file is added, and pictures."
        ),
    ] = None,
    report_text: Annotated[
        Path | None, typer.Option("--report-text", help="Text to measure the card's KL divergence on.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Encode on this Ray cluster ('auto': the one around; 'local': a new one on this machine).",
        ),
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
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
        sequential=sequential,
        tune=tune,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        report=report,
        report_text=report_text,
        trust_remote_code=trust_remote_code,
        ray=ray,
    )
    run_convert(model, out, options)


@app.command(epilog=_examples("athena-gguf base models/SmolLM2-135M SmolLM2-BF16.gguf"))
def base(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder, a hub id (org/name), or a GGUF file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Write a model's BF16 GGUF through llama.cpp's converter."""
    from athena_gguf import api

    api.base(model, out, trust_remote_code=trust_remote_code)


@app.command(epilog=_examples("athena-gguf inspect A3.gguf", "athena-gguf inspect A3.gguf --json | jq .types"))
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    as_json: Json = False,
) -> None:
    """Show a file's metadata, tensors, types and bits a weight."""
    from athena_gguf.report.inspection import print_inspection

    print_inspection(file, as_json)


@app.command("eval", epilog=_examples("athena-gguf eval A3.gguf --base BASE.gguf --text text.txt --windows 20"))
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file to evaluate.")],
    base_file: Annotated[Path, typer.Option("--base", metavar="BASE.gguf", help="The file it is compared with.")],
    text: Annotated[Path, typer.Option("--text", help="The text to evaluate on.")],
    windows: Windows = 60,
    base_logits: BaseLogits = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Compare a file with its base: KL divergence, perplexity, how often the most probable token is the same."""
    from athena_gguf.report.evaluate import print_evaluation

    print_evaluation(file, base_file, text, windows, base_logits, threads, as_json)


@app.command(
    epilog=_examples(
        "athena-gguf compare A2.gguf A3.gguf A4.gguf --base BASE.gguf --text text.txt",
        "athena-gguf compare *.gguf --base BASE.gguf --text text.txt --speed --report comparison",
    )
)
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GGUF files to compare.")],
    base_file: Annotated[Path, typer.Option("--base", metavar="BASE.gguf", help="The file they are compared with.")],
    text: Annotated[Path, typer.Option("--text", help="The text to evaluate on.")],
    windows: Windows = 60,
    base_logits: BaseLogits = None,
    threads: Threads = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speeds too, with llama-bench.")] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Folder for index.html, kld.png, speed.png, comparison.json."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Compare several files with one base: size, KL divergence, perplexity, speed; table, pictures, page."""
    import json

    from athena_gguf import api

    found = api.compare(
        files,
        base_file,
        text,
        windows=windows,
        base_logits=base_logits,
        threads=threads,
        speed=speed,
        report=report,
    )
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.table())


@app.command(
    epilog=_examples(
        "athena-gguf batch jobs.toml",
        "athena-gguf batch jobs.toml --workers 2 --json > report.json",
        "athena-gguf batch jobs.toml --ray auto",
    )
)
def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="The file of jobs (docs/batch.md).")],
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-j", min=1, help="Models at once. \\[default: 1; as many as a cluster takes]"),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run on this Ray cluster ('auto': the one around; 'local': a new one of --workers workers here).",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Make many files, and report; what is finished is not made again. Exit code 3 if some jobs failed."""
    import json

    from athena_gguf.jobs import run_batch

    report = run_batch(jobs, workers=workers, ray=ray)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.table())
    if not report.ok:
        raise typer.Exit(FAILED_JOBS)


@app.command()
def doctor(folder: RuntimeDir = None, as_json: Json = False) -> None:
    """Check what conversions and the runtime need; exit code 1 and what to do if something is missing."""
    import json
    from dataclasses import asdict

    from athena_gguf.health import examine, healthy, lines

    findings = examine(folder)
    print(json.dumps([asdict(f) for f in findings], indent=1) if as_json else "\n".join(lines(findings)))
    if not healthy(findings):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        'athena-gguf run A3.gguf -p "What is the capital of France?"',
        'athena-gguf run A3.gguf -p "Once upon a time" --raw -n 64 --temperature 0',
    )
)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to write at most.")] = 256,
    system: Annotated[str | None, typer.Option("--system", help="System prompt of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    context: Annotated[int, typer.Option("--context", "-c", min=8, help="Tokens of context.")] = 4096,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest.")] = 0.8,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the sampling. \\[default: random]")] = None,
    threads: Threads = None,
) -> None:
    """Answer a prompt: the answer on stdout, the speed on stderr."""
    from athena_gguf.runtime.completion import complete

    if not prompt.strip():
        raise UsageError("--prompt is empty; say what to answer")
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
        # what is ignored stays so: nohup
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _interrupt)
    app()
