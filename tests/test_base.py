"""The BF16 base file: llama.cpp's converter run on a small model, and on what is none."""

import json
import os
import shutil

import gguf
import numpy as np
import pytest

import athena_gguf
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile, write_base, writing_base


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the small model that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def refused(model, tmp_path, match):
    out = tmp_path / "out.gguf"
    with pytest.raises(AthenaError, match=match):
        write_base(model, out)
    assert not out.exists() and not list(tmp_path.glob(".athena-*"))


def test_base_has_the_weights(tiny_model, tiny_base):
    import torch
    from safetensors.torch import load_file as load_torch

    weights = load_torch(tiny_model / "model.safetensors")
    with GGUFFile(tiny_base) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_BF16)
        down = file.tensors["blk.1.ffn_down.weight"]
        assert (down.type_name, down.shape) == ("BF16", (128, 192))
        expected = weights["model.layers.1.mlp.down_proj.weight"].to(torch.float32).numpy()
        np.testing.assert_array_equal(down.to_float32(), expected)


def test_no_model(tmp_path):
    refused(tmp_path / "absent", tmp_path, "absent: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"config\.json")


def test_config_that_is_no_json(model, tmp_path):
    (model / "config.json").write_text('{"architectures": [')
    refused(model, tmp_path, r"config\.json is no JSON")


def test_target_that_is_no_file(tiny_model, tmp_path):
    out = tmp_path / "pipe"
    os.mkfifo(out)
    with pytest.raises(AthenaError, match="pipe is no regular file"):
        write_base(tiny_model, out)
    assert out.is_fifo()


def test_no_tokenizer(model, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        (model / name).unlink()
    refused(model, tmp_path, "no tokenizer")


def test_no_weights(model, tmp_path):
    (model / "model.safetensors").rename(model / "training_args.bin")
    refused(model, tmp_path, "no weights")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(model, tmp_path, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(model, tmp_path, r"model\.safetensors is truncated or corrupt")


def test_corrupt_header(model, tmp_path):
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(range(32))
    path.write_bytes(data)
    refused(model, tmp_path, r"model\.safetensors is truncated or corrupt")


def test_unknown_architecture(model, tmp_path, runtime):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsForCausalLM"]}))
    refused(model, tmp_path, "NobodyKnowsForCausalLM is not supported")


def test_unknown_tensor(model, tmp_path, runtime):
    """The converter's own complaint reaches the user."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.mystery.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    refused(model, tmp_path, r"mystery\.weight")


def test_inputs_are_not_replaced(model, tiny_gguf):
    for source in (model, tiny_gguf):
        for path in source.iterdir() if source.is_dir() else [source]:
            before = path.read_bytes()
            with pytest.raises(AthenaError, match=rf"{path.name} is an input of this conversion; write the result"):
                athena_gguf.base(source, path)
            assert path.read_bytes() == before


def test_header_comes_first(tiny_model, tiny_base, tmp_path):
    """What is done meanwhile knows the tensors; what goes wrong in it ends the converter."""
    out = tmp_path / "out.gguf"
    with writing_base(tiny_model, out) as header:
        assert not out.exists() and header.path == out
        described = {tensor.name: (tensor.shape, tensor.type_name, tensor.n_bytes) for tensor in header}
        metadata = header.metadata
    assert out.read_bytes() == tiny_base.read_bytes()
    with GGUFFile(out) as file:
        assert described == {tensor.name: (tensor.shape, tensor.type_name, tensor.n_bytes) for tensor in file}
        assert metadata == file.metadata
    out.unlink()
    with pytest.raises(ZeroDivisionError), writing_base(tiny_model, out):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_config_that_its_files_cannot_fill(model, tmp_path, runtime):
    """The converter's process, which was started before that is known, does not look at it."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 200}))
    refused(model, tmp_path, "more than its files can hold")
