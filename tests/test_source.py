"""What may be named as a model: hub ids (from a cache, without network), GGUF files, folders with code."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_model as tiny

import athena_gguf
from athena_gguf.conversion import convert
from athena_gguf.errors import AthenaError
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize, write_quantized
from athena_gguf.model.from_gguf import unpack_gguf, write_plain
from athena_gguf.model.source import is_hub_id

pytestmark = pytest.mark.usefixtures("short_windows")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_model, tmp_path):
    """A cache of the hub that holds org/tiny; its environment."""
    repository = tmp_path / "home" / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    shutil.copytree(tiny_model, repository / "snapshots" / REVISION)
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


def base(model, out, environment, cwd):
    command = [sys.executable, "-c", "from athena_gguf.cli import main; main()", "base", str(model), str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=cwd)


def test_hub_id(hub, runtime, tiny_base, tmp_path):
    out = tmp_path / "out.gguf"
    result = base("org/tiny", out, hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "MiB, BF16, made from" in result.stderr
    with GGUFFile(out) as file, GGUFFile(tiny_base) as known:
        assert all(t.data.tobytes() == known.tensors[t.name].data.tobytes() for t in file)
    result = base("org/other", out, hub, tmp_path)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: org/other: no such folder here")
    assert "HF_HUB_OFFLINE" in result.stderr


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("org/name-1.5B@v2") and is_hub_id("org/name@refs/pr/1")
    assert not any(
        map(is_hub_id, ("name", "./org/name", "/org/name", "a/b/c", "../name", "org/name.gguf", "org\\name"))
    )
    (tmp_path / "org").mkdir()  # then the user means a folder in it
    assert not is_hub_id("org/name")


def test_what_is_fetched(tmp_path, monkeypatch):
    """Weights once, nothing of sub-folders, no code unless allowed."""
    from fnmatch import fnmatch

    import huggingface_hub

    from athena_gguf.model.source import local_model

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "onnx/model.json", "modeling_x.py"]
    files += ["pytorch_model.bin", "consolidated.safetensors", "merges.txt", "training_args.bin", "README.md"]
    fetched = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        kept = [f for f in files if any(fnmatch(f, p) for p in allow_patterns)]
        kept = [f for f in kept if not any(fnmatch(f, p) for p in ignore_patterns)]
        fetched.append((name, revision, kept))
        for file in kept:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    local_model("org/name@v2")
    kept = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "README.md"]
    assert [(n, r, sorted(k)) for n, r, k in fetched] == [("org/name", "v2", sorted(kept))]
    local_model("org/name", code=True)
    assert "modeling_x.py" in fetched.pop()[2]
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    files.remove("model-00001-of-00002.safetensors")
    fetched.clear()
    local_model("org/name")
    assert fetched[1][2] == ["pytorch_model.bin"]


def quantized(base_path, out, kind):
    with GGUFFile(base_path) as opened:
        names = [t.name for t in opened if len(t.shape) == 2]

        def change(name):
            return Replacement(kind, lambda: quantize(opened.tensors[name].to_float32(), kind))

        write_quantized(base_path, out, {name: change(name) for name in names}, {}, file_type=7)
    return out


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 64}),  # not hidden size by heads, nor transformers' default
        ("Gemma3Text", {"head_dim": 32, "query_pre_attn_scalar": 32}),  # that no file says
    ],
)
def test_model_of_a_gguf_file(family, config, runtime, tmp_path):
    """Its predictions are those of the model that the file was made of."""
    pytest.importorskip("accelerate")
    import torch
    import transformers

    original, file = tiny.make(tmp_path / "model", family, **config), tmp_path / "model.gguf"
    athena_gguf.base(original, file)
    work = tmp_path / "work"
    work.mkdir()
    made, _ = unpack_gguf(file, work)
    ids = torch.randint(3, 300, (1, 64), generator=torch.Generator().manual_seed(0))

    def predictions(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)

    wanted = predictions(original)
    assert (
        float((wanted.exp() * (wanted - predictions(made))).sum(-1).mean()) < 1e-3
    )  # Gemma's norms are stored as w + 1


def test_gguf_as_model(runtime, text, tmp_path):
    """A Q8_0 file: its weights are those of the base file made of it and of the model that transformers makes of it,
    and its conversion is near to that of the original model."""
    pytest.importorskip("accelerate")
    from athena_gguf.report.evaluate import evaluate

    model, original = tiny.make(tmp_path / "model"), tmp_path / "original.gguf"
    athena_gguf.base(model, original)
    given = quantized(original, tmp_path / "given.gguf", "Q8_0")
    work, out = tmp_path / "work", tmp_path / "out.gguf"
    settings = {"calibration": str(text), "calibration_tokens": 512, "device": "cpu", "work_dir": work}
    athena_gguf.convert(given, out, type="A4", **settings)
    folder, plain = unpack_gguf(given, work)  # from the work directory
    with GGUFFile(plain) as made, GGUFFile(given) as source:
        assert {t.type_name for t in made if len(t.shape) == 2} == {"BF16"}
        for tensor in made:
            np.testing.assert_allclose(tensor.to_float32(), source.tensors[tensor.name].to_float32(), rtol=2**-8)
        assert made.metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert evaluate(given, original, text, windows=1, threads=2).kld < 0.01
    assert evaluate(out, plain, text, windows=1, threads=2).kld < 0.1
    with pytest.raises(AthenaError, match="is a GGUF file, and so its own base"):
        athena_gguf.convert(given, out, base=plain, **settings)


def test_a_types_as_model(tiny_model, options, tmp_path, capfd):
    """They are decoded as every other type is, with a warning, and nothing stays of what the first conversion said."""
    pytest.importorskip("accelerate")
    first, given, out, work = (tmp_path / name for name in ("first.gguf", "given.gguf", "out.gguf", "work"))
    settings = {"type": "A4", "calibration_tokens": 256}
    convert(tiny_model, first, options(embedding_type="A4", **settings))
    assert "is quantized already" not in capfd.readouterr().err
    write_quantized(first, given, {}, {"athena.predicted_kld": 0.5}, file_type=TYPES["A4"].file_type)
    convert(given, out, options(base=None, work_dir=work, **settings))
    assert f"warning: {given} is quantized already (" in capfd.readouterr().err
    _, plain = unpack_gguf(given, work)
    with GGUFFile(given) as source, GGUFFile(plain) as made, GGUFFile(out) as file:
        assert {t.type_name for t in source if len(t.shape) == 2} == {"A4"}
        for tensor in made:
            assert tensor.type_name == ("BF16" if len(tensor.shape) == 2 else "F32")
            np.testing.assert_allclose(tensor.to_float32(), source.tensors[tensor.name].to_float32(), rtol=2**-8)
        assert not any(key.startswith("athena.") for key in made.metadata)
        assert file.metadata["athena.embedding_type"] == "Q8_0" and "athena.predicted_kld" not in file.metadata


def test_gguf_files_that_are_no_models(tiny_gguf, tmp_path):
    with pytest.raises(AthenaError, match=r"absent\.gguf"):
        athena_gguf.convert(tmp_path / "absent.gguf", tmp_path / "out.gguf", device="cpu")
    unknown = tmp_path / "unknown.gguf"
    write_quantized(tiny_gguf, unknown, {}, {"general.architecture": "nobody"}, file_type=0)
    with pytest.raises(AthenaError, match="cannot load nobody models from GGUF files; give the model's Hugging Face"):
        athena_gguf.convert(unknown, tmp_path / "out.gguf", device="cpu")


def test_plain_weights(tiny_base, tmp_path):
    """A file of F32 throughout becomes BF16 where a converter would have rounded; an F16 one stays."""
    for kind, expected in (("F32", "BF16"), ("F16", "F16")):
        given, out = quantized(tiny_base, tmp_path / f"{kind}.gguf", kind), tmp_path / f"{kind}-plain.gguf"
        write_plain(given, out)
        with GGUFFile(out) as file, GGUFFile(tiny_base) as known:
            for tensor in file:
                wanted = known.tensors[tensor.name]
                assert tensor.type_name == (expected if len(tensor.shape) == 2 else "F32")
                if kind == "F32":
                    assert tensor.data.tobytes() == wanted.data.tobytes()


def test_models_with_code(tiny_model, runtime, tmp_path):
    """Its code runs if, and only if, the user says so."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Strange", "AutoModelForCausalLM": "strange.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (model / "strange.py").write_text(
        f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(ran)!r}, 'w').close()\n"
        "class Strange(LlamaConfig):\n    model_type = 'strange'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Strange\n"
    )
    out = tmp_path / "out.gguf"
    with pytest.raises(AthenaError, match="--trust-remote-code"):
        athena_gguf.base(model, out)
    assert not ran.exists() and not out.exists()
    athena_gguf.base(model, out, trust_remote_code=True)
    assert ran.exists() and out.exists()
