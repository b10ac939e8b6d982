"""Model directories from strangers: nothing in them is run, nothing outside of them is read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import write_base
from athena_gguf.gguf_file.base import check_model
from athena_gguf.model import load_model, load_tokenizer


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def index(model: Path, name: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a.weight": name}}))


def test_shard_indexes_name_files_beside_them(model):
    index(model, "model.safetensors")
    check_model(model)
    (model.parent / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    outside = ["../secret.safetensors", str(model.parent / "secret.safetensors"), "..\\secret.safetensors"]
    for name in [*outside, "", ".", "..", "a\0b", 7, None, ["model.safetensors"]]:
        index(model, name)
        with pytest.raises(AthenaError, match=r"index\.json: tensor a\.weight is said to be in"):
            check_model(model)
    index(model, "model-2.safetensors")
    with pytest.raises(AthenaError, match=r"lacks the file model-2\.safetensors"):
        check_model(model)
    for text in ("[]", "{}", '{"weight_map": []}', "{", "[" * 100_000, ""):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(AthenaError, match=r"index\.json"):
            check_model(model)


def test_links_stay_inside(model, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not for others")
    (model / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(AthenaError, match=r"chat_template\.jinja is a link out of the model's folder"):
        check_model(model)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").symlink_to("nowhere")
    with pytest.raises(AthenaError, match="is a link to nothing"):
        check_model(model)
    (model / "chat_template.jinja").unlink()
    (model / "copy.json").symlink_to("config.json")
    check_model(model)


def test_a_snapshot_of_the_cache_links_to_its_blobs(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    check_model(snapshot)


def test_files_are_plain_files(model):
    os.mkfifo(model / "special_tokens_map.json")
    with pytest.raises(AthenaError, match=r"special_tokens_map\.json is no regular file"):
        check_model(model)


@pytest.mark.parametrize(
    "entries",
    [
        {"vocab_size": 10**9},
        {"intermediate_size": 10**8},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 200},
        {"hidden_size": 10**12},
        {"num_attention_heads": 64, "head_dim": 2048},
    ],
)
def test_a_config_larger_than_its_files_is_refused(model, entries):
    change(model / "config.json", **entries)
    with pytest.raises(AthenaError, match=r"config\.json (has|describes) .* its files can hold"):
        check_model(model)


def test_any_config_ends_in_a_message(model):
    for text in ("", "7", "[]", "{" * 100_000, '"x"', "nul", "\ufeff{}", '{"a": NaN'):
        (model / "config.json").write_text(text)
        with pytest.raises(AthenaError, match=r"config\.json is no JSON"):
            check_model(model)


MARK = "import pathlib\npathlib.Path({!r}).write_text('run')\n"


@pytest.fixture
def trap(model, tmp_path):
    """Code in the model's folder that leaves a file where it is run, named in every config."""
    mark = tmp_path / "run"
    code = MARK.format(str(mark))
    for name in ("configuration_trap", "modeling_trap", "tokenization_trap"):
        (model / f"{name}.py").write_text(code + "class Trap: pass\n")
    classes = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    change(model / "config.json", auto_map=classes)
    tokens = {"AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.Trap"]}
    change(model / "tokenizer_config.json", auto_map=tokens, tokenizer_class="Trap")
    return mark


def test_no_code_of_the_model_is_run_by_us(model, trap):
    import torch

    change(model / "config.json", model_type="trap")
    with pytest.raises(AthenaError, match="Python code in its folder, which is not run"):
        check_model(model)
    for load in (lambda: load_model(model, torch.device("cpu"), torch.float32), lambda: load_tokenizer(model)):
        with pytest.raises(AthenaError, match="cannot load"):
            load()
    assert not trap.exists()


def test_no_code_of_the_model_is_run_by_the_converter(model, trap, runtime, tmp_path):
    """The converter loads the tokenizers of this architecture with trust_remote_code."""
    change(model / "config.json", architectures=["DreamModel"])
    (model / "tokenizer.model").unlink()
    with pytest.raises(AthenaError, match="came with the model, which is not run"):
        write_base(model, tmp_path / "base.gguf")
    assert not trap.exists() and not (tmp_path / "base.gguf").exists()


def test_weights_in_pickles_run_nothing(model, trap, tmp_path):
    """Weights that are there as a pickle only are read without running what it says."""
    import torch

    class Trap:
        def __reduce__(self):
            return exec, (MARK.format(str(tmp_path / "run")),)

    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap()}, model / "pytorch_model.bin")
    with pytest.raises(AthenaError):
        load_model(model, torch.device("cpu"), torch.float32)
    assert not trap.exists()


def test_no_code_in_the_current_folder_is_run(model, runtime, tmp_path, monkeypatch):
    """It may be the model's folder."""
    mark = tmp_path / "run"
    for name in ("numpy", "athena_gguf", "gguf", "sitecustomize"):
        (model / f"{name}.py").write_text(MARK.format(str(mark)))
    monkeypatch.chdir(model)
    write_base(model, tmp_path / "base.gguf")
    assert not mark.exists() and (tmp_path / "base.gguf").exists()
