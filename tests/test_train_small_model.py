"""The small model for benchmarks: leaving nothing out changes nothing, and the loss is that of the formula."""

import math
import re
import time

import pytest
import tiny_model
import torch
import train_small_model
from torch.nn import functional
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 heads that share 2 key heads, 128 channels; norms' weights differ from 1."""
    return tiny_model.make(tmp_path_factory.mktemp("small") / "teacher", vectors=0.2)


@pytest.fixture(scope="module")
def teacher(folder):
    return train_small_model.load_teacher(folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokens(teacher):
    return torch.randint(teacher.config.vocab_size, (6, 64), generator=torch.Generator().manual_seed(0))


def pruned(teacher, tokens, hidden, heads, layers=2):
    config = train_small_model.student_config(teacher.config, hidden, heads, layers)
    return train_small_model.pruned_student(teacher, config, *train_small_model.measure(teacher, tokens))


def test_a_student_of_all_channels_and_heads_is_the_teacher(teacher, tokens):
    student = pruned(teacher, tokens, 128, 4)
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, atol=2e-3, rtol=0)
    assert student.config.num_key_value_heads == 2


def test_channels_that_hold_nothing_and_heads_that_do_nothing_can_go(folder, tokens):
    teacher = train_small_model.load_teacher(folder, torch.device("cpu"), torch.float32)
    empty = torch.arange(3, 128, 4)  # 32 of 128 channels
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, empty] = 0
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight[empty] = 0
            layer.self_attn.o_proj.weight[empty] = 0
            layer.self_attn.o_proj.weight[:, 64:96] = 0  # the third head
        student = pruned(teacher, tokens, 96, 3)
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, atol=2e-3, rtol=0)
    assert student.config.num_key_value_heads == 3  # heads 0 and 1 shared one


def test_the_head_goes_that_the_others_stand_in_for():
    x = torch.randn(400, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 4:8] = x[:, :4] @ torch.randn(4, 4, dtype=torch.float64) + x[:, 8:] @ torch.randn(4, 4, dtype=torch.float64)
    x[:, :4] *= 3
    out = torch.randn(5, 12, dtype=torch.float64)
    kept, weight = train_small_model.chosen_heads(out, x.T @ x, 2, 4)
    assert len(kept) == 2
    columns = [4 * head + i for head in kept for i in range(4)]
    torch.testing.assert_close(x[:, columns] @ weight.T, x @ out.T, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("chunk", [3, 10, 100])
def test_loss_and_gradients_are_those_of_the_formula(chunk):
    def numbers(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    hidden, head = numbers(10, 6).requires_grad_(), numbers(17, 6).requires_grad_()
    wanted_hidden, wanted_head, text = numbers(10, 8), numbers(17, 8), 0.3
    targets = torch.arange(10)
    loss, kl, entropy = train_small_model.Loss.apply(
        hidden, head, wanted_hidden, wanted_head, targets, text, chunk, train_small_model.distillation
    )
    got = torch.autograd.grad(2 * loss, (hidden, head))
    own, wanted = hidden @ head.T, (wanted_hidden @ wanted_head.T).log_softmax(-1)
    plain_kl = functional.kl_div(own.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    plain_entropy = functional.cross_entropy(own, targets)
    torch.testing.assert_close((kl, entropy), (plain_kl.detach(), plain_entropy.detach()))
    plain = (1 - text) * plain_kl + text * plain_entropy
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(got, torch.autograd.grad(2 * plain, (hidden, head)))


@pytest.fixture
def train(folder, tmp_path, monkeypatch, capsys):
    """Runs the program with more options; what it says, and the folder of the model."""

    def run(*more):
        text, out = tmp_path / "text", tmp_path / "student"
        text.write_text("\0".join(tiny_model.words(300, seed) for seed in range(40)))
        options = ["--hidden", "64", "--heads", "2", "--length", "32", "--batch", "4", "--rate", "3e-3"]
        options += ["--sample", "8", "--separator", "</s>", "--eager", "--text", "0.9"]
        monkeypatch.setattr("sys.argv", ["train", str(folder), str(out), str(text), *options, *more])
        monkeypatch.setattr(train_small_model, "STARTED", time.monotonic())
        monkeypatch.setattr(train_small_model, "SAVING", 0.0)
        train_small_model.main()
        return capsys.readouterr().out, out

    return run


def test_a_run_ends_with_the_clock_and_a_model_that_knows_the_text(train):
    said, out = train("--warm-up", "5", "--held-out", "8", "--seconds", "6")
    before, after = (float(value) for value in re.findall(r"held-out cross entropy ([\d.]+)", said))
    assert before == pytest.approx(math.log(320), abs=0.3) and after < before - 1
    student = AutoModelForCausalLM.from_pretrained(out)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (64, 2)
    assert student.dtype == torch.bfloat16 and (out / "tokenizer.json").exists()


def test_neither_warm_up_nor_validation(train):
    said, out = train("--warm-up", "0", "--held-out", "0", "--seconds", "1.5")
    assert "held-out" not in said and "step 1: " in said and "rate 3.00e-03" in said and out.is_dir()


@pytest.mark.parametrize("option", ["--batch", "--length", "--chunk", "--sample", "--warm-up", "--held-out"])
def test_numbers_that_cannot_be_are_refused(option, train, capsys):
    with pytest.raises(SystemExit):
        train(option, "-1")
    assert f"argument {option}: -1 is less than" in capsys.readouterr().err


@pytest.mark.parametrize("hidden,heads,layers", [(256, 4, 2), (128, 5, 2), (128, 3, 2), (128, 4, 3)])
def test_widths_that_cannot_be_are_refused(teacher, hidden, heads, layers):
    with pytest.raises(SystemExit, match="--"):
        train_small_model.student_config(teacher.config, hidden, heads, layers)


def test_text_files_and_documents(tmp_path):
    import lzma
    import random

    (tmp_path / "a.txt").write_text("one\0two")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"three"))
    found = train_small_model.read_documents([tmp_path / "a.txt", tmp_path / "b.txt.xz"], random.Random(0))
    assert sorted(found) == ["one", "three", "two"]
