"""`convert --report`: a model card for a folder of files, with sizes, divergences, settings and pictures.

Every conversion adds its file to `files.json` and writes the rest anew from there, so that conversions of one model to
several sizes make one card.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athena_gguf import progress
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file.reader import GGUFFile
from athena_gguf.lock import locked
from athena_gguf.text import read_text

if TYPE_CHECKING:
    from athena_gguf.summary import Result

_FILES, _WINDOWS = "files.json", 20
_HUB = "https://huggingface.co/"


def check_report(folder: Path | None, text: Path | None) -> None:
    """Raise AthenaError, before a conversion, if its report could not be written after it."""
    from athena_gguf.report import plots
    from athena_gguf.runtime import binary

    if folder is None:
        return
    plots.require()
    if folder.exists() and not folder.is_dir():
        raise AthenaError(f"--report {folder} is no folder")
    if text is not None:
        binary("llama-perplexity")
        if not text.is_file():
            raise AthenaError(f"--report-text {text}: no such file")
        read_text(text)


def write_report(
    folder: Path,
    out: Path,
    result: Result,
    base: Path,
    model: Path | str,
    model_dir: Path,
    text: Path | None,
    logits: Path | None,
) -> None:
    """Add the file `out`, made of `model` with its files in `model_dir` and the base file `base`, to the card in
    `folder`, which is made. `text`: to measure the KL divergence on, over 20 windows; `logits`: where the base file's
    logits are kept for that.

    Raises AthenaError if the folder cannot be written or the file cannot be evaluated.
    """
    from athena_gguf.report import plots
    from athena_gguf.report.evaluate import evaluate

    measured = None
    if text is not None:
        measured = asdict(evaluate(out, base, text, windows=_WINDOWS, base_logits=logits))
    with GGUFFile(out) as file:
        metadata = file.metadata
    settings = {key: value for key, value in metadata.items() if key.startswith("athena.")}
    entry = {"file": out.name, "settings": settings, "text": text and text.name, "evaluation": measured} | asdict(
        result
    )
    with locked(folder, "--report"), progress.stage("model card"):
        try:
            files = [known for known in _read(folder / _FILES) if known["file"] != out.name]
            files = sorted([*files, entry], key=lambda known: known["bytes"])
            if result.losses:
                plots.write_loss_picture(folder / _loss_name(entry), out.stem, result.losses, result.types)
            points = [(e["file"], e["bytes"] / 2**20, e["evaluation"]["kld"]) for e in files if e["evaluation"]]
            if points:
                plots.Picture("kld", "KL divergence and size", points, "KL divergence, nats a token", True).write_png(
                    folder / "kld.png"
                )
            (folder / "README.md").write_text(_card(model, model_dir, metadata, files, bool(points)), encoding="utf-8")
            (folder / _FILES).write_text(json.dumps(files, indent=1), encoding="utf-8")
        except OSError as error:
            raise AthenaError(f"{folder}: {error.strerror}; choose another folder with --report") from error
    progress.note(f"model card: {folder / 'README.md'}")


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise AthenaError(f"{path} is damaged ({error}); remove it, or choose another folder with --report") from error


def _loss_name(entry: dict[str, Any]) -> str:
    return f"losses-{Path(entry['file']).stem}.png"


def _card(
    model: Path | str, model_dir: Path, metadata: dict[str, Any], files: list[dict[str, Any]], plotted: bool
) -> str:
    name = metadata.get("general.name") or Path(model).name
    parts = [_front_matter(model, model_dir, metadata), f"# {name}, quantized with Athena-GGUF", _table(files)]
    if any(e["evaluation"] for e in files):
        texts = ", ".join(sorted({e["text"] for e in files if e["text"]}))
        parts.append(
            "KLD: mean KL divergence from the BF16 file, in nats a token, with its standard error; perplexity ratio "
            f"and share of tokens with the same most probable successor against the same file. Measured on {texts}."
        )
    if plotted:
        parts.append("![KL divergence and size](kld.png)")
    kinds = sorted({kind for e in files for kind in e["types"].values() if re.fullmatch(r"A\d", kind)})
    if kinds:
        parts.append(
            f"The types {', '.join(kinds)} need a llama.cpp with the patch of athena-gguf, which it fetches and "
            "builds; the ordinary one refuses these files."
        )
    first = files[0]["file"]
    parts.append(
        "## How to run\n\nIn a clone of athena-gguf's repository, whose docs/install.md names what that needs:\n\n"
        "    pip install .\n"
        "    athena-gguf runtime build\n"
        f'    athena-gguf run {first} -p "Hello"\n'
        f'    "$(athena-gguf runtime path)/llama-server" -m {first}'
    )
    parts.append("## Settings\n\n" + _settings(files))
    pictures = [f"### {e['file']}\n\n![losses]({_loss_name(e)})" for e in files if e["losses"]]
    if pictures:
        parts.append(
            "## Losses layer by layer\n\nOf the encoding, as a share of a tensor's power under the curvature of the "
            "model's loss.\n\n" + "\n\n".join(pictures)
        )
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Path | str, model_dir: Path, metadata: dict[str, Any]) -> str:
    """As the hub expects it. Licence and languages come from the model's own card, or from the file."""
    from huggingface_hub import ModelCardData

    from athena_gguf.model.source import is_hub_id

    source = str(metadata.get("general.base_model.0.repo_url") or metadata.get("general.source.url") or "")
    origin = str(model).partition("@")[0] if is_hub_id(model) else source.removeprefix(_HUB) if _HUB in source else None
    own = _own_card(model_dir)
    data = ModelCardData(
        base_model=origin,
        license=own.get("license") or metadata.get("general.license"),
        license_name=own.get("license_name"),
        license_link=own.get("license_link"),
        language=own.get("language"),
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["gguf", "quantized", "athena-gguf"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _own_card(model: Path) -> dict[str, Any]:
    """The front matter of the model's README.md, empty if it has none that can be read."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard.load(model / "README.md").data.to_dict())
    except Exception:  # absent, or whatever a strange one makes the parser raise
        return {}


def _table(files: list[dict[str, Any]]) -> str:
    lines = ["| file | MiB | bits a weight | KLD | perplexity ratio | same top token |", "|---" * 6 + "|"]
    for entry in files:
        cells = [entry["file"], f"{entry['bytes'] / 2**20:.1f}", f"{entry['bpw']:.3f}"]
        found = entry["evaluation"]
        if found:
            cells += [f"{found['kld']:.4f} ± {found['kld_error']:.4f}", f"{found['ppl_ratio']:.4f}"]
            cells.append(f"{100 * found['same_top']:.1f}%")
        else:
            predicted = entry["predicted_kld"]
            cells += ["-" if predicted is None else f"{predicted:.4g} (predicted)", "-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _settings(files: list[dict[str, Any]]) -> str:
    """Rows of settings, columns of files."""
    keys = list(dict.fromkeys(key for entry in files for key in entry["settings"]))
    lines = ["| | " + " | ".join(e["file"] for e in files) + " |", "|---" * (1 + len(files)) + "|"]
    for key in keys:
        shown = [_shown(e["settings"].get(key, "-")) for e in files]
        lines.append(f"| {key.removeprefix('athena.')} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
