"""Conversion end to end on a small model: what is in the file, what is said about it, and what is refused."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import gguf
import numpy as np
import pytest
import tiny_model as tiny
from safetensors.torch import load_file, save_file

import athena_gguf.calibration
import athena_gguf.gguf_file
import athena_gguf.gguf_file.writer
from athena_gguf import conversion as convert_module
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.encode import EncodePool
from athena_gguf.errors import AthenaError
from athena_gguf.format import TYPES, decode_rows
from athena_gguf.gguf_file import GGUFFile, write_quantized
from athena_gguf.lock import locked
from athena_gguf.report.evaluate import evaluate

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Squared error over squared weights, at most: 3 to 6 dB above that of rounding without a curvature (docs/format.md), as
# the curvature of such a small text lets errors go where the loss does not see them.
NOISE = {"A2": 0.5, "A3": 0.15, "A4": 0.05}
pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory):
    """Untied, and with an intermediate size that is no multiple of 64."""
    return tiny.make(tmp_path_factory.mktemp("odd") / "model", intermediate_size=160, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def odd_base(odd_model, runtime, tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "base.gguf"
    athena_gguf.gguf_file.write_base(odd_model, path)
    return path


def said(*arguments):
    """What a conversion writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        convert(*arguments)
    return stderr.getvalue()


def refused(model, out, options, match):
    """The conversion fails with this message, and leaves nothing but what was there before."""
    before = {p: p.read_bytes() for p in out.parent.iterdir() if p.is_file()}
    names = set(out.parent.iterdir())
    with pytest.raises(AthenaError, match=match):
        convert(model, out, options)
    assert set(out.parent.iterdir()) == names
    assert all(p.read_bytes() == data for p, data in before.items())


def never(*_, **__):
    raise AssertionError("this should have been refused before")


@pytest.mark.parametrize("kind", TYPES)
def test_result(kind, tiny_model, tiny_base, options, tmp_path):
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(type=kind))
    with GGUFFile(out) as file, GGUFFile(tiny_base) as base:
        assert list(file.tensors) == list(base.tensors)
        for tensor in file:
            original = base.tensors[tensor.name]
            if tensor.name.split(".")[-2] in LINEAR:
                assert tensor.type_name == kind
                weights = original.to_float32()
                error = decode_rows(TYPES[kind], tensor.data, tensor.columns) - weights
                assert np.square(error).sum() < NOISE[kind] * np.square(weights).sum(), tensor.name
            elif tensor.name == "token_embd.weight":
                assert tensor.type_name == "Q8_0"
                np.testing.assert_allclose(tensor.to_float32(), original.to_float32(), atol=1e-3)
            else:
                assert (tensor.type_name, tensor.data.tobytes()) == (original.type_name, original.data.tobytes())
        metadata = file.metadata
        kept = {
            k: v for k, v in base.metadata.items() if k not in ("general.file_type", "general.quantization_version")
        }
        assert {k: metadata[k] for k in kept} == kept
    assert metadata["general.file_type"] == TYPES[kind].file_type
    assert metadata["athena.type"] == kind
    assert metadata["athena.format_version"] == 1
    assert metadata["athena.embedding_type"] == "Q8_0"
    assert metadata["athena.calibration"] == ["calibration.txt"]
    assert metadata["athena.calibration_tokens"] == 1024
    assert metadata["athena.seed"] == 0


def test_summary(tiny_model, options, tmp_path):
    out = tmp_path / "out.gguf"
    text = said(tiny_model, out, options(calibration_tokens=128))
    lines = text.splitlines()
    blocks = [line.split() for line in lines if line.strip()[:1] in "01" and "." in line and line.startswith("   ")]
    assert [len(row) for row in blocks] == [8, 8]  # number of the block, seven tensors
    losses = np.array(blocks, float)[:, 1:]
    assert (losses > 0).all() and (losses < 20).all()
    tokens = lines[next(i for i, line in enumerate(lines) if line.startswith("effective calibration tokens")) :]
    assert tokens[1].split() == ["block", "attn_q+k+v", "attn_output", "ffn_gate+up", "ffn_down"]
    for row in (tokens[2], tokens[3]):
        assert all(0 < int(n) <= 128 for n in row.split()[1:])
    few = next(line for line in lines if line.startswith("warning: the curvature of "))
    assert re.search(r"of \d of \d layer inputs rests on fewer than 4 tokens a column; .* Least has blk\.\d\.", few)
    assert "encoded: 14 tensors, 245,760 weights at 3.125 bits" in text
    with GGUFFile(out) as file:
        bits = 8 * sum(t.n_bytes for t in file) / sum(t.n_elements for t in file)  # as inspect and eval say
    shown = float(next(line for line in lines if "bits a weight over all" in line).split("MiB, ")[1].split()[0])
    assert shown == pytest.approx(bits, abs=6e-4)
    for stage in ("base file", "calibration text", "curvature", "encoding", "writing", "total"):
        assert f"{stage} " in lines[-1]


def test_embedding_types(tiny_model, tiny_base, options, tmp_path, odd_model, odd_base):
    """Tied embeddings are encoded under the curvature of the output layer's input; untied ones have none."""
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(embedding_type="F16"))
    with GGUFFile(out) as file, GGUFFile(tiny_base) as base:
        embedding = file.tensors["token_embd.weight"]
        assert embedding.type_name == "F16"
        np.testing.assert_allclose(
            embedding.to_float32(), base.tensors["token_embd.weight"].to_float32(), rtol=1e-3, atol=1e-6
        )
    text = said(tiny_model, out, options(embedding_type="A4"))
    assert "encoded: 15 tensors" in text
    assert "  token_embd " in text.partition("effective calibration tokens")[2]
    with GGUFFile(out) as file:
        assert file.tensors["token_embd.weight"].type_name == "A4"
    text = said(odd_model, out, options(embedding_type="A4", base=odd_base))
    tokens = text.partition("effective calibration tokens")[2]
    assert "  output " in tokens and "  token_embd " not in tokens
    with GGUFFile(out) as file, GGUFFile(odd_base) as base:
        for name in ("token_embd.weight", "output.weight"):
            assert file.tensors[name].type_name == "A4"
            weights = base.tensors[name].to_float32()
            error = file.tensors[name].to_float32() - weights
            assert np.square(error).sum() < NOISE["A4"] * np.square(weights).sum()


def test_row_width(odd_model, odd_base, options, tmp_path):
    """Rows of 160 columns cannot be encoded: kept at a standard type, and said so."""
    out = tmp_path / "out.gguf"
    text = said(odd_model, out, options(base=odd_base))
    assert text.count("warning: blk") == 2
    assert "warning: blk.1.ffn_down.weight [128, 160] becomes Q8_0: its row width is no multiple of 64" in text
    with GGUFFile(out) as file:
        assert file.tensors["blk.1.ffn_down.weight"].type_name == "Q8_0"
        assert file.tensors["blk.1.ffn_up.weight"].type_name == "A3"


@pytest.mark.parametrize("also", [False, True])
def test_self_calibration(also, tiny_model, options, text, tmp_path):
    out, again = tmp_path / "out.gguf", tmp_path / "again.gguf"
    chosen = ("self", str(text)) if also else ("self",)
    for path in (out, again):
        convert(tiny_model, path, options(calibration=chosen, calibration_tokens=256))
    assert out.read_bytes() == again.read_bytes()
    with GGUFFile(out) as file:
        assert file.metadata["athena.calibration"] == (["self", "calibration.txt"] if also else ["self"])
        assert file.metadata["athena.calibration_tokens"] == 256


def test_same_bytes(tiny_model, options, text, tmp_path, monkeypatch):
    """In this process, in another one that makes the base file itself, and with another seed."""
    monkeypatch.setattr(convert_module, "WINDOW", 512)
    one, two, other = (tmp_path / name for name in ("one.gguf", "two.gguf", "other.gguf"))
    convert(tiny_model, one, options())
    command = [sys.executable, "-c", "from athena_gguf.cli import main; main()", "convert", tiny_model, two]
    command += ["--calibration", text, "--calibration-tokens", "1024", "--device", "cpu"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "encoded: 14 tensors" in result.stderr
    assert one.read_bytes() == two.read_bytes()
    convert(tiny_model, other, options(seed=1))
    assert one.read_bytes() != other.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.gguf", "other.gguf", "two.gguf"]


def test_work_dir(tiny_model, tiny_base, options, text, tmp_path, monkeypatch):
    """Base file and curvature are used again, but not after the model or a setting changed."""
    model, made = shutil.copytree(tiny_model, tmp_path / "model"), []

    @contextlib.contextmanager
    def writing_base(model_dir, path, sync):
        made.append("base")
        shutil.copy(tiny_base, path)
        with GGUFFile(path) as header:
            yield header

    def measure(*arguments, **more):
        made.append("curvature")
        return measured(*arguments, **more)

    measured = athena_gguf.calibration.measure_curvature
    monkeypatch.setattr(athena_gguf.gguf_file, "writing_base", writing_base)
    monkeypatch.setattr(athena_gguf.calibration, "measure_curvature", measure)
    out, work = tmp_path / "out.gguf", tmp_path / "work"

    def run(**changes):
        made.clear()
        convert(model, out, options(base=None, work_dir=work, **changes))
        return list(made), out.read_bytes()

    steps, first = run()
    assert steps == ["base", "curvature"]
    assert run() == ([], first)
    assert run(type="A4")[0] == []
    assert run(seed=1)[0] == ["curvature"]
    assert run(calibration_tokens=512)[0] == ["curvature"]
    assert run()[0] == ["curvature"]
    kept = work / "curvature" / "input.blk.0.ffn_down.weight.safetensors"
    kept.write_bytes(kept.read_bytes()[:1000])
    assert run() == (["curvature"], first)
    os.utime(model / "model.safetensors")
    assert run() == (["base", "curvature"], first)
    assert not list((work / "encoded").iterdir())


def test_base_file_that_is_not_on_the_disk(tiny_model, tiny_base, options, tmp_path, monkeypatch):
    """That is an error, and no further conversion believes it; without a work directory nothing waits for the disk."""
    tried, works, sync = [], True, os.fsync

    def fsync(handle):
        if os.fstat(handle).st_size == tiny_base.stat().st_size:
            tried.append(works)
            if not works:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    @contextlib.contextmanager
    def writing_base(model_dir, path, sync):
        shutil.copy(tiny_base, path)
        with GGUFFile(path) as header:
            yield header

    monkeypatch.setattr(athena_gguf.gguf_file, "writing_base", writing_base)
    monkeypatch.setattr(os, "fsync", fsync)
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    convert(tiny_model, out, options(base=None))
    assert tried == []
    works = False
    work.mkdir()
    refused(tiny_model, out, options(base=None, work_dir=work), r"base\.gguf cannot be written: .*error")
    assert tried == [False] and not (work / "base.model").exists()
    works = True
    convert(tiny_model, out, options(base=None, work_dir=work))
    convert(tiny_model, out, options(base=None, work_dir=work))
    assert tried == [False, True] and (work / "base.model").exists()


def test_curvature_that_is_no_curvature(tiny_model, options, tmp_path):
    from safetensors import torch as safetensors

    out, work = tmp_path / "out.gguf", tmp_path / "work"
    convert(tiny_model, out, options(work_dir=work, sequential=False))
    for path in (work / "curvature").glob("*.safetensors"):
        safetensors.save_file({"matrix": -safetensors.load_file(path)["matrix"]}, path)
    refused(tiny_model, out, options(work_dir=work, sequential=False), r"tensor blk\.0\.\w+\.weight: .*not positive")


@pytest.mark.parametrize("value", [0x7FC0, 0xFF80])  # NaN, -Inf
def test_weights_not_finite(value, tiny_model, tiny_base, options, tmp_path, monkeypatch):
    monkeypatch.setattr(athena_gguf.model, "load_model", never)
    (tmp_path / "base").mkdir()
    base = shutil.copy(tiny_base, tmp_path / "base" / "base.gguf")
    reader = gguf.GGUFReader(base, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.view(np.uint16)[7, 9] = value
    reader.data.flush()
    refused(tiny_model, tmp_path / "out.gguf", options(base=base), r"blk\.1\.ffn_up\.weight holds NaN or Inf")


def test_activations_not_finite(tiny_model, options, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if "layers.0.mlp" in name:
            weights[name] *= 1e15
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    match = r"blk\.1\.attn_q\.weight: NaN or Inf in the activations"
    work.mkdir()
    refused(model, out, options(base=None, work_dir=work), match)
    refused(model, out, options(base=None, work_dir=work, calibration=("self",)), "NaN or Inf")


def test_no_model(tiny_model, options, tmp_path):
    out = tmp_path / "out.gguf"
    refused(tmp_path / "absent", out, options(base=None), "absent: no such folder")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    refused(model, out, options(base=None), r"model\.safetensors is truncated or corrupt")
    refused(model, out, options(), r"model\.safetensors is truncated or corrupt")
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsForCausalLM"]}))
    refused(model, out, options(base=None), "NobodyKnowsForCausalLM is not supported")


def test_wrong_base(tiny_model, tiny_base, odd_base, options, tmp_path):
    out, folder = tmp_path / "out.gguf", tmp_path / "base"
    folder.mkdir()
    refused(tiny_model, out, options(base=folder / "absent.gguf"), r"absent\.gguf")
    (folder / "short.gguf").write_bytes(tiny_base.read_bytes()[:-1000])
    refused(tiny_model, out, options(base=folder / "short.gguf"), r"short\.gguf")
    (folder / "text.gguf").write_text("this is no GGUF file")
    refused(tiny_model, out, options(base=folder / "text.gguf"), r"text\.gguf is no GGUF file")
    refused(tiny_model, out, options(base=odd_base), r"tensor blk\.0\.\S+ (is|holds) .*; give the base file of")
    other = shutil.copy(tiny_base, folder / "other.gguf")
    reader = gguf.GGUFReader(other, "r+")
    data = next(t for t in reader.tensors if t.name == "blk.0.attn_k.weight").data
    data.view(np.uint16)[:] ^= 0x8000
    reader.data.flush()
    refused(tiny_model, out, options(base=other), r"blk\.0\.attn_k\.weight holds other weights")
    shutil.copy(tiny_base, out)
    refused(tiny_model, out, options(base=out), "is an input of this conversion")


def test_options_refused(tiny_model, options, tmp_path, monkeypatch):
    monkeypatch.setattr(athena_gguf.gguf_file.base, "check_model", never)
    out = tmp_path / "out.gguf"
    refused(tiny_model, out, options(type="Q4_K"), "--type Q4_K: choose from A2, A3, A4")
    refused(tiny_model, out, options(embedding_type="Q4_K"), "--embedding-type Q4_K")
    refused(tiny_model, out, options(device="tpu"), "--device tpu")
    refused(tiny_model, out, options(calibration=("absent.txt",)), r"absent\.txt: no such file")
    (tmp_path / "empty.txt").touch()
    refused(tiny_model, out, options(calibration=(str(tmp_path / "empty.txt"),)), r"empty\.txt: the file is empty")
    refused(tiny_model, tmp_path, options(), "is a folder; name a file in it")
    (tmp_path / "file").touch()
    refused(tiny_model, out, options(work_dir=tmp_path / "file"), "file: .*--work-dir")
    with pytest.raises(AthenaError, match=r"the folder .*absent does not exist"):
        convert(tiny_model, tmp_path / "absent" / "out.gguf", options())


def test_inputs_are_not_replaced(tiny_model, tiny_base, text, options, tmp_path, monkeypatch):
    monkeypatch.setattr(athena_gguf.gguf_file.base, "check_files", never)
    monkeypatch.setattr("athena_gguf.model.from_gguf.unpack_gguf", never)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for path in model.iterdir():
        refused(model, path, options(base=None), rf"{path.name} is an input of this conversion; write the result")
    whole = shutil.copy(tiny_base, tmp_path / "whole.gguf")
    refused(whole, tmp_path / "whole.gguf", options(base=None), r"whole\.gguf is an input")
    (tmp_path / "symbolic.gguf").symlink_to(whole)
    (tmp_path / "hard.gguf").hardlink_to(model / "model.safetensors")
    refused(whole, tmp_path / "symbolic.gguf", options(base=None), r"symbolic\.gguf is an .*\(it is .*whole\.gguf\)")
    refused(tmp_path / "symbolic.gguf", tmp_path / "whole.gguf", options(base=None), r"whole\.gguf is an input")
    refused(model, tmp_path / "hard.gguf", options(base=None), r"hard\.gguf is an .*\(it is .*model\.safetensors\)")
    refused(model, tmp_path / "symbolic.gguf", options(base=whole), r"symbolic\.gguf is an input")
    copy = shutil.copy(text, tmp_path / "text.txt")
    refused(model, copy, options(calibration=("self", str(copy))), r"text\.txt is an input")
    refused(model, copy, options(report=tmp_path / "card", report_text=copy), r"text\.txt is an input")
    (tmp_path / "work").mkdir()
    for name in ("base.gguf", "from-gguf.gguf"):
        refused(model, tmp_path / "work" / name, options(base=None, work_dir=tmp_path / "work"), "is an input")


def test_result_in_the_folder_of_its_model(tiny_model, options, tmp_path):
    """Also where an earlier one was."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "A2.gguf").write_bytes(b"of another day")
    convert(model, model / "A2.gguf", options(type="A2"))
    with GGUFFile(model / "A2.gguf") as file:
        assert file.metadata["athena.type"] == "A2"


def test_text_too_short(tiny_model, options, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the sea")
    refused(tiny_model, tmp_path / "out.gguf", options(calibration=(str(short),)), r"short\.txt.*shorter")


def test_disk_full_is_noticed_first(tiny_model, options, tmp_path, monkeypatch):
    monkeypatch.setattr(athena_gguf.model, "load_model", never)
    full = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    refused(tiny_model, tmp_path / "out.gguf", options(base=None), r"the base file needs 0\.5 MiB")
    refused(tiny_model, tmp_path / "out.gguf", options(), r"out\.gguf needs 0\.\d MiB in .*make room")


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_interrupted(where, existed, tiny_model, options, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    if existed:
        out.write_bytes(b"the file from before")
    _fail_at_third_call(monkeypatch, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out, options())
    assert list(tmp_path.iterdir()) == ([out] if existed else [])
    assert not existed or out.read_bytes() == b"the file from before"


def test_disk_full_while_writing(tiny_model, options, tmp_path, monkeypatch):
    _fail_at_third_call(monkeypatch, "writing", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    refused(tiny_model, tmp_path / "out.gguf", options(), r"out\.gguf cannot be written: .*No space")


def _fail_at_third_call(monkeypatch, where, error):
    place, name = (EncodePool, "submit") if where == "encoding" else (athena_gguf.gguf_file.writer, "_write_tensor")
    original, calls = getattr(place, name), []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return original(*arguments)

    monkeypatch.setattr(place, name, fail)


def test_work_directory_is_for_one_at_a_time(tiny_model, options, tmp_path, capfd):
    work, out = tmp_path / "work", tmp_path / "out.gguf"
    runner = threading.Thread(target=convert, args=(tiny_model, out, options(work_dir=work)))
    with locked(work, "--work-dir"):
        runner.start()
        said = ""
        while "waiting for another process" not in said:
            said += capfd.readouterr().err
            runner.join(0.05)
        assert [p.name for p in work.iterdir()] == [".lock"]
    runner.join()
    assert out.exists()


def test_bounded_queue_changes_nothing(tiny_model, options, tmp_path, monkeypatch):
    convert(tiny_model, tmp_path / "one.gguf", options())
    monkeypatch.setattr("athena_gguf.encode.stage.IN_FLIGHT", 0)
    convert(tiny_model, tmp_path / "two.gguf", options())
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_missing_weights(tiny_model, options, tmp_path):
    """transformers would fill them with random numbers."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, tmp_path / "out.gguf", options(), r"lack the tensor model\.layers\.1\.mlp\.up_proj\.weight")


def test_part_of_a_split_base(tiny_model, tiny_base, options, tmp_path):
    part = tmp_path / "base-00001-of-00002.gguf"
    write_quantized(tiny_base, part, {}, {"split.count": 2}, file_type=32)
    refused(tiny_model, tmp_path / "out.gguf", options(base=part), "one part of a split file")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2", {}),  # biases
        ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
        ("Gemma2", {"head_dim": 32}),  # gguf knows no output matrix of it: the embeddings serve
        ("Phi3", {"pad_token_id": 0}),  # q, k, v in one matrix, gate and up in another
    ],
)
def test_other_families(family, config, runtime, text, tmp_path):
    """Every linear layer and the embeddings become A3 under their own curvature, and llama.cpp runs the result."""
    model, out = tiny.make(tmp_path / "model", family, **config), tmp_path / "out.gguf"
    work = tmp_path / "work"
    settings = {"calibration": (str(text),), "calibration_tokens": 512, "embedding_type": "A3", "device": "cpu"}
    assert "warning: blk" not in (messages := said(model, out, ConvertOptions(work_dir=work, **settings)))
    assert "no linear layer" not in messages
    with GGUFFile(out) as file:
        matrices = [t for t in file if len(t.shape) == 2]
        assert len(matrices) >= 5 and {t.type_name for t in matrices} == {"A3"}
    found = evaluate(out, work / "base.gguf", text, windows=1, threads=2)
    assert 0 < found.kld < 0.2
