"""What is known of finished jobs: a file for each of them in the batch's state folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from athena_gguf import __version__
from athena_gguf.jobs.spec import Job

_TAIL = 1 << 14  # bytes of a log that are looked at for its last events


def marker(state: Path, job: Job) -> Path:
    return state / (Path(job.out).name + ".json")


def log_file(state: Path, job: Job) -> Path:
    return state / (Path(job.out).name + ".log")


def doing(state: Path, job: Job) -> str:
    """What the job's process is at, by the last event of its log that says so."""
    try:
        with open(log_file(state, job), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return job.name
    for line in reversed(lines):
        try:
            event = json.loads(line)
            kind, stage = event["event"], event.get("stage")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # cut off, or what a library printed
        if kind == "progress":
            share = event["done"] / event["total"]
            return f"{job.name}: {stage}, {share:.0%}, about {event['left']:.0f} s left"
        if kind == "start":
            return f"{job.name}: {stage}"
        if kind in ("end", "error"):
            return job.name
    return job.name


def fingerprint(job: Job) -> str | None:
    """A digest of all that the result depends on: the model's and the texts' files, the settings, the program. None if
    the model is not here (a hub id that was not fetched yet, or a folder that is not there)."""
    from athena_gguf.calibration.store import derived_fingerprint, model_fingerprint
    from athena_gguf.model.source import cached_model

    model = cached_model(job.model)
    if model is None:
        return None
    settings = job.settings
    named = [*settings.get("calibration", []), settings.get("base"), settings.get("report_text")]
    files = [Path(name) for name in named if name and name != "self"]
    if not all(file.is_file() for file in files):
        return None
    key = model_fingerprint(model) if model.is_dir() else __version__
    return derived_fingerprint(key, [*files, *([model] if model.is_file() else [])], settings)


def finished(state: Path, job: Job) -> dict[str, Any] | None:
    """What the job's process said when it made the result that lies there now; None if it is to be made."""
    try:
        known = json.loads(marker(state, job).read_text(encoding="utf-8"))
        same = known["file"] == _stat(job) and known["fingerprint"] == fingerprint(job)
        return dict(known["result"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(state: Path, job: Job, result: dict[str, Any]) -> None:
    """Keep that the job is done. The file appears whole."""
    path = marker(state, job)
    content = {"fingerprint": fingerprint(job), "file": _stat(job), "result": result}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(new, path)


def _stat(job: Job) -> list[int]:
    stat = os.stat(job.out)
    return [stat.st_size, stat.st_mtime_ns]
