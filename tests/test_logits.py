"""The same logits from a file in llama.cpp and from its decoded weights in torch (bounds: docs/format.md, "Accuracy").

llama-perplexity writes log-probabilities; torch runs the model with the weights that `GGUFFile` decodes.
"""

from functools import partial

import numpy as np
import pytest
import tiny_model as tiny
from logits import ROUNDING, llama_cpp, log_probabilities, rms

from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.format import TYPES
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize, write_quantized

BLOCKS, HEADS, KV_HEADS = 2, 4, 2
LINEAR = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
LINEAR |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
LINEAR |= {"ffn_down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Rows with superblocks and a tail; weights large enough for logits and attention that are not all but flat."""
    sizes = {"hidden_size": 320, "intermediate_size": 448}
    return tiny.make(tmp_path_factory.mktemp("logits") / "model", initializer_range=0.06, **sizes)


@pytest.fixture(scope="module")
def base(model, runtime, tmp_path_factory):
    from athena_gguf.gguf_file import write_base

    path = tmp_path_factory.mktemp("logits") / "base.gguf"
    write_base(model, path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("logits") / "text.txt"
    path.write_text(tiny.words(2000, seed=5))
    return path


def torch_model(model_dir, file):
    """The Hugging Face model with the weights of a GGUF file."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    state = {}
    with GGUFFile(file) as gguf_file:
        tensors = {name: torch.tensor(t.to_float32()) for name, t in gguf_file.tensors.items()}
    for n in range(BLOCKS):
        for theirs, ours in LINEAR.items():
            weight = tensors[f"blk.{n}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            if heads:  # llama.cpp rotates neighbours, transformers halves: its converter interleaves the rows of a head
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{n}.{ours}.weight"] = weight
        state[f"model.layers.{n}.input_layernorm.weight"] = tensors[f"blk.{n}.attn_norm.weight"]
        state[f"model.layers.{n}.post_attention_layernorm.weight"] = tensors[f"blk.{n}.ffn_norm.weight"]
    state["model.norm.weight"] = tensors["output_norm.weight"]
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = tensors["token_embd.weight"]
    model.load_state_dict(state)
    return model.eval()


def round_input(module):
    """Let a linear layer see its input in 8 bits as Q8_A64 has it: a scale for 64 columns, integers up to 127."""
    import torch

    def hook(module, args):
        x = args[0].reshape(-1, 64)
        largest = x.abs().amax(1, keepdim=True)
        rounded = torch.round(x * (127.0 / largest)) * (largest / 127.0)
        return (rounded.reshape(args[0].shape),)

    module.register_forward_pre_hook(hook)


@pytest.fixture(scope="module", params=["A2", "A3", "A4"])
def converted(request, model, base, text, tmp_path_factory):
    """The model at one type; embeddings too at A4."""
    kind = request.param
    file = tmp_path_factory.mktemp("logits") / f"{kind}.gguf"
    embedding = "A4" if kind == "A4" else "Q8_0"
    settings = {"calibration": (str(text),), "calibration_tokens": 1024, "base": base, "device": "cpu"}
    convert(model, file, ConvertOptions(type=kind, embedding_type=embedding, **settings))
    return file


def test_whole_file(converted, model, text, tmp_path):
    """Every input of a layer is rounded: the errors of 4 layers in a row in each block, and of the output, add up."""
    tokens, theirs = llama_cpp(converted, text, tmp_path)
    ours = log_probabilities(torch_model(model, converted), tokens)
    signal = ours - ours.mean(-1, keepdims=True)
    assert rms(signal) > 0.5  # there is something to compare
    assert rms(theirs - ours) < ROUNDING * (4 * BLOCKS + 1) ** 0.5 * rms(signal)
    assert np.mean(np.exp(ours) * (ours - theirs)) * ours.shape[-1] < 1e-2  # KL divergence, nats a token


def test_layer_by_layer(converted, model, text, tmp_path):
    """One layer of an A type, the others decoded to F32: the same logits as torch with that layer's input rounded.

    With all layers rounded, no two implementations agree that well: a float that is off by its last bit rounds to
    another integer now and then, and every such step moves the inputs of later layers across many more thresholds.
    """
    layers = {f"blk.{BLOCKS - 1}.{name}.weight": module for name, module in LINEAR.items()}
    layers["token_embd.weight"] = "lm_head"
    with GGUFFile(converted) as file:
        types = {t.name: t.type_name for t in file if t.type_name != "F32"}
        decoded = {name: file.tensors[name].to_float32() for name in types}
    checked = 0
    for tensor, module in layers.items():
        if types[tensor] not in TYPES:
            continue
        one = tmp_path / "one.gguf"
        replace = {n: Replacement("F32", partial(quantize, w, "F32")) for n, w in decoded.items() if n != tensor}
        write_quantized(converted, one, replace, {}, file_type=0)
        tokens, theirs = llama_cpp(one, text, tmp_path)
        exact, rounded = torch_model(model, one), torch_model(model, one)
        path = module if module == "lm_head" else f"model.layers.{BLOCKS - 1}.{module}"
        round_input(rounded.get_submodule(path))
        far, near = (theirs - log_probabilities(m, tokens) for m in (exact, rounded))
        assert rms(near) < 0.1 * rms(far), tensor
        assert np.median(np.abs(near)) < 3e-4, tensor  # 16-bit log-probabilities: half a step is up to 1.2e-4
        checked += 1
    assert checked == len(LINEAR) + (types["token_embd.weight"] in TYPES)
