"""The file of jobs: TOML in, jobs out, every setting checked before any work is done."""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from athena_gguf.allocate import target_settings
from athena_gguf.conversion import ConvertOptions
from athena_gguf.errors import AthenaError, UsageError

STATE = ".athena-batch"  # folder beside the results: what is known of them, logs, and the default work directories
_OWN = ("work_dir", "dry_run", "ray")  # settings that the batch itself decides
_PATHS = ("base", "report", "report_text")


@dataclass(frozen=True)
class Job:
    """One conversion. `group`: jobs of one group share a work directory and run one after the other. `settings`: the
    keywords of ConvertOptions, of types that JSON has; `work_dir`, `out` and paths in `settings` are absolute.
    `spread`: whether the machines of a Ray cluster share its encoding, None for where there are more than models."""

    name: str
    group: str
    model: str
    out: str
    work_dir: str
    settings: dict[str, Any]
    spread: bool | None = None


@dataclass(frozen=True)
class Batch:
    """`out`: the folder of the results; `work`: of the models' work directories, `keep_work`: whether the user named
    it, so that it stays."""

    out: Path
    work: Path
    keep_work: bool
    jobs: tuple[Job, ...]

    @property
    def state(self) -> Path:
        return self.out / STATE


def read_batch(path: Path) -> Batch:
    """Raises AthenaError if the file cannot be read, UsageError naming it and the entry that cannot be understood."""
    content = _load(path)
    folder = path.absolute().parent
    _known(path, "the file", content, {"out", "work", "settings", "model"})
    out = folder / _text(path, "out", content.get("out", "."))
    work = folder / _text(path, "work", content["work"]) if "work" in content else out / STATE / "work"
    common = _settings(path, "[settings]", content.get("settings", {}), folder)
    models = content.get("model", [])
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) for m in models):
        raise UsageError(f"{path}: give each model an entry [[model]] with model = and targets =")
    jobs = [job for entry in models for job in _jobs(path, entry, common, folder, out, work)]
    for what in ("name", "out"):
        names = [getattr(job, what) for job in jobs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{path}: two jobs have the {what} {twice}; give one of the models another name =")
    groups = {job.group: job.model for job in jobs}
    for job in jobs:
        if groups[job.group] != job.model:
            raise UsageError(f"{path}: two models are called {job.group}; give one of them another name =")
    return Batch(out, work, "work" in content, tuple(jobs))


def _load(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise AthenaError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from error


def _jobs(path: Path, entry: dict[str, Any], common: dict[str, Any], folder: Path, out: Path, work: Path) -> list[Job]:
    entry = dict(entry)
    where = f"the model {entry.get('model', 'without model =')}"
    model = _text(path, f"model of {where}", entry.pop("model", None))
    local = (folder / model).expanduser()
    model = str(local) if local.exists() or model.startswith((".", "/", "~")) else model
    name = _text(path, f"name of {where}", entry.pop("name", re.sub(r"\.gguf$", "", Path(model).name)))
    _file_name(path, f"name of {where}", name)
    targets = entry.pop("targets", None)
    if not isinstance(targets, list) or not targets:
        raise UsageError(f'{path}: {where} needs targets = [...], such as ["A3", "small", "3.4bpw", "5.5GiB"]')
    shared = common | _settings(path, where, entry, folder)
    jobs = []
    for target in targets:
        if isinstance(target, str):
            try:
                file, settings = f"{name}-{target}.gguf", target_settings(target)
            except UsageError as error:
                raise UsageError(f"{path}: {where}: {error}") from error
        elif isinstance(target, dict) and "file" in target:
            file = _text(path, f"file of {where}", target["file"])
            _file_name(path, f"file of {where}", file)
            settings = _settings(path, where, {k: v for k, v in target.items() if k != "file"}, folder)
        else:
            raise UsageError(f'{path}: {where}: {target!r} is no target; give a text, or {{ file = "NAME.gguf", ... }}')
        settings = shared | settings
        spread = settings.pop("spread", None)
        try:
            ConvertOptions(**settings).check()
            if spread and settings.get("sequential"):
                raise UsageError("sequential encodes on one machine; leave spread out")
        except UsageError as error:
            raise UsageError(f"{path}: {file} of {where}: {error}") from error
        jobs.append(Job(f"{name}/{file}", name, model, str(out / file), str(work / name), settings, spread))
    return jobs


def _settings(path: Path, where: str, given: Any, folder: Path) -> dict[str, Any]:
    """Settings by the names of ConvertOptions' fields, with paths made absolute, and `spread` of Job."""
    if not isinstance(given, dict):
        raise UsageError(f"{path}: {where} is no table")
    found = {key.replace("-", "_"): value for key, value in given.items()}
    hints = typing.get_type_hints(ConvertOptions) | {"spread": bool}
    _known(path, where, found, hints.keys() - set(_OWN))
    if isinstance(found.get("calibration"), str):
        found["calibration"] = [found["calibration"]]
    for key, value in found.items():
        if not _fits(value, hints[key]):
            raise UsageError(f"{path}: {where}: {key} = {value!r} is of the wrong kind; see athena-gguf convert --help")
    for key in _PATHS:
        if key in found:
            found[key] = str(folder / Path(found[key]).expanduser())
    if "calibration" in found:
        texts = found["calibration"]
        found["calibration"] = [t if t == "self" else str(folder / Path(t).expanduser()) for t in texts]
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value may stand for a field of this type."""
    if isinstance(hint, UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return type(value) is hint


def _known(path: Path, where: str, given: Mapping[str, Any], names: set[str]) -> None:
    unknown = sorted(set(given) - names)
    if unknown:
        raise UsageError(f"{path}: {where} has {unknown[0]}, which means nothing; known are {', '.join(sorted(names))}")


def _file_name(path: Path, what: str, value: str) -> None:
    if re.search(r"[/\\]", value) or value.startswith("."):
        raise UsageError(f"{path}: {what} = {value!r} is no file name")


def _text(path: Path, what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{path}: {what} must be a text")
    return value
