"""Models of many families end to end: all linear layers and experts become A types under curvatures of their own, and
llama.cpp computes from the file what torch computes from its decoded weights (bounds: docs/format.md, "Accuracy")."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import families
import numpy as np
import pytest
import torch
import transformers
from logits import ROUNDING, llama_cpp, log_probabilities, rms

import athena_gguf.model
import athena_gguf.runtime
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, write_base
from athena_gguf.model import linear_layers

pytestmark = pytest.mark.usefixtures("short_windows")


def converter_for_any_tokenizer(tree, copy):
    """A copy of llama.cpp's converter that takes byte-level tokenizers that it does not know as it takes GPT-2's."""
    for name in ("conversion", "gguf-py"):
        shutil.copytree(tree / name, copy / name)
    shutil.copy(tree / "convert_hf_to_gguf.py", copy)
    base = copy / "conversion" / "base.py"
    text, unknown = base.read_text(), 'raise NotImplementedError("BPE pre-tokenizer was not recognized'
    assert text.count(unknown) == 1
    base.write_text(text.replace(unknown, f'return "gpt-2"; {unknown}'))
    return copy


@pytest.fixture(scope="module")
def models(runtime, tmp_path_factory):
    """What gives the folder of a family's model, and its base file. Converters run in processes of their own: two at a
    time, ahead of the tests."""
    folder = tmp_path_factory.mktemp("families")
    made = {family: families.make(folder / family / "model", family) for family in families.FAMILIES}
    tree = converter_for_any_tokenizer(athena_gguf.runtime.source_tree(), folder / "converter")
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(athena_gguf.runtime, "source_tree", lambda *_: tree)
        bases = {family: pool.submit(write_base, made[family], folder / f"{family}.gguf") for family in made}

        def get(family):
            bases[family].result()
            return made[family], folder / f"{family}.gguf"

        yield get
        pool.shutdown(cancel_futures=True)


def rows_as_in_the_model(stored, decoded, weight):
    """`decoded` [rows, columns] with its rows in the order of the model's `weight`, whose rows are those of `stored`:
    llama.cpp's converter reorders the rows of some."""
    places = {row.tobytes(): at for at, row in enumerate(stored)}
    order = [places[row.tobytes()] for row in weight.numpy()]
    assert sorted(order) == list(range(len(order)))
    return torch.from_numpy(decoded[order])


def torch_model(folder, base_path, path):
    """The Hugging Face model with the A-type weights of the file, and how many of them there are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval().requires_grad_(False)
    count = 0
    with GGUFFile(base_path) as base, GGUFFile(path) as file:
        architecture = file.metadata["general.architecture"]
        for layer in linear_layers(model, architecture, {t.name: t.shape for t in file}):
            tensor = file.tensors[layer.tensor_name]
            if tensor.type_name not in TYPES:
                continue
            count += 1
            weight = layer.module.weight
            stored, decoded = base.tensors[tensor.name].to_float32(), tensor.to_float32()
            if weight.ndim == 2:
                stored, decoded, weight = stored[None], decoded[None], weight[None]
            for expert in range(len(weight)):
                weight[expert].copy_(rows_as_in_the_model(stored[expert], decoded[expert], weight[expert].clone()))
    return model, count


@pytest.mark.parametrize("family", families.FAMILIES)
def test_family(family, models, text, tmp_path, capfd):
    folder, base = models(family)
    out = tmp_path / "out.gguf"
    settings = {"calibration": (str(text),), "calibration_tokens": 512, "device": "cpu", "base": base}
    convert(folder, out, ConvertOptions(type="A4", embedding_type="BF16", **settings))
    said = capfd.readouterr().err
    assert "becomes" not in said, said
    with GGUFFile(out) as file:
        kinds = {t.name: t.type_name for t in file if len(t.shape) > 1}
        begins = file.metadata.get("tokenizer.ggml.add_bos_token", file.metadata["tokenizer.ggml.model"] == "llama")
    small = {name for name in kinds if "gate_inp" in name or "embd" in name or name == "output.weight"}
    assert {kind for name, kind in kinds.items() if name not in small} == {"A4"}
    model, count = torch_model(folder, base, out)
    blocks = model.config.num_hidden_layers
    assert count == len(kinds) - len(small) >= 4 * blocks
    tokens, theirs = llama_cpp(out, text, tmp_path)
    ours = log_probabilities(model, tokens, begins)
    signal = ours - ours.mean(-1, keepdims=True)
    assert rms(signal) > 0.3  # there is something to compare
    # of most tokens: rounding may send one to another expert
    error = np.sqrt(np.square(theirs - ours).mean(-1))
    assert np.median(error) < ROUNDING * (4 * blocks + 1) ** 0.5 * rms(signal)


def test_an_expert_that_no_token_reaches(models, text, tmp_path, capfd, monkeypatch):
    """It takes the curvature of the others, and a warning counts it."""
    folder, base = models("Mixtral")
    load = athena_gguf.model.load_model

    def never_the_last(*arguments):
        model = load(*arguments)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1], out[2].clamp(max=2)))
        return model

    monkeypatch.setattr(athena_gguf.model, "load_model", never_the_last)
    settings = {"calibration": (str(text),), "calibration_tokens": 256, "device": "cpu", "base": base}
    convert(folder, tmp_path / "out.gguf", ConvertOptions(type="A4", embedding_type="BF16", **settings))
    assert "no calibration token reached 4 experts of 4 layer inputs" in capfd.readouterr().err
    with GGUFFile(tmp_path / "out.gguf") as file, GGUFFile(base) as original:
        for name in ("blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"):
            weights = original.tensors[name].to_float32()[3]
            error = file.tensors[name].to_float32()[3] - weights
            assert np.square(error).sum() < 0.05 * np.square(weights).sum()


def test_a_module_that_nothing_is_known_of_keeps_a_standard_type(models, text, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(athena_gguf.model.experts, "_is_known", lambda module: False)
    folder, base = models("Mixtral")
    settings = {"calibration": (str(text),), "calibration_tokens": 256, "device": "cpu", "base": base}
    convert(folder, tmp_path / "out.gguf", ConvertOptions(**settings))
    said = capfd.readouterr().err
    assert said.count("becomes Q8_0: no linear layer of the model feeds it") == 6
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.1.ffn_down_exps.weight"].type_name == "Q8_0"
