"""The package as a library: its verbs are there, cheap to import, and take the options of the command line."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import athena_gguf
from athena_gguf.conversion import ConvertOptions


def test_import_is_cheap():
    code = (
        "import sys, athena_gguf; assert 'convert' in dir(athena_gguf)\n"
        "heavy = ('numpy', 'torch', 'typer', 'rich', 'gguf', 'json'); print([m for m in heavy if m in sys.modules])\n"
        "athena_gguf.convert; print([m for m in ('torch', 'numba', 'transformers', 'gguf') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n[]\n"


def test_verbs():
    for verb in ("convert", "base", "inspect", "eval", "compare", "batch", "doctor"):
        assert inspect.getdoc(getattr(athena_gguf, verb))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = athena_gguf.nothing


def test_convert_takes_the_options_of_the_command_line():
    names = list(inspect.signature(athena_gguf.convert).parameters)
    assert names == ["model", "out", *(f.name for f in fields(ConvertOptions))]
    with pytest.raises(TypeError, match="sede"):
        athena_gguf.convert("model", "out.gguf", sede=1)


def test_convert_and_inspect(tiny_model, tiny_base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("athena_gguf.conversion.WINDOW", 64)
    out = str(tmp_path / "out.gguf")
    settings = {"calibration": text, "calibration_tokens": 512, "base": str(tiny_base), "device": "cpu"}
    made = athena_gguf.convert(tiny_model, out, type="a2", **settings)
    found = athena_gguf.inspect(out)
    assert (made.bytes, made.bpw) == (Path(out).stat().st_size, found["bpw"]) and made.predicted_kld is None
    assert made.types == {t["name"]: t["type"] for t in found["tensors"] if len(t["shape"]) == 2}
    assert all(0 < loss < 1 for loss in made.losses.values()) and "encoding" in made.seconds
    planned = athena_gguf.convert(tiny_model, tmp_path / "no.gguf", type="A2", dry_run=True, **settings)
    assert abs(planned.bytes - made.bytes) < 256 and planned.types == made.types and not planned.losses
    assert not (tmp_path / "no.gguf").exists()
    with pytest.raises(athena_gguf.AthenaError, match="--type A7"):
        athena_gguf.convert(tiny_model, out, type="A7", **settings)
