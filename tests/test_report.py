"""`eval` and `run` with the built runtime, against what is known of the numbers."""

import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tiny_model as tiny

import athena_gguf
from athena_gguf.calibration.tokens import file_windows
from athena_gguf.errors import AthenaError
from athena_gguf.format import A3
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize, write_quantized
from athena_gguf.report.evaluate import evaluate, parse_statistics, print_evaluation
from athena_gguf.runtime import completion


class Ran(Exception):
    """A tool of the runtime would have been run."""


def never(*_):
    raise Ran


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.words(3000, seed=5))
    return path


@pytest.fixture(scope="module")
def quantized(tiny_base, tmp_path_factory):
    """The small model with its linear layers in Q4_0: near to the base, not equal."""
    path = tmp_path_factory.mktemp("quantized") / "q4.gguf"
    with GGUFFile(tiny_base) as base:
        names = [t.name for t in base if t.name.startswith("blk.") and len(t.shape) == 2]

        def replacement(name):
            return Replacement("Q4_0", lambda: quantize(base.tensors[name].to_float32(), "Q4_0"))

        write_quantized(tiny_base, path, {name: replacement(name) for name in names}, {}, file_type=2)
    return path


def test_a_file_equals_itself(runtime, tiny_base, text):
    found = evaluate(tiny_base, tiny_base, text, windows=2, threads=2)
    assert abs(found.kld) < 1e-5 and found.same_top > 0.99
    assert found.ppl == pytest.approx(found.ppl_base, rel=1e-4) and found.ppl_ratio == pytest.approx(1, abs=1e-4)
    assert found.windows == 2 and found.bytes == tiny_base.stat().st_size


def test_ratio_of_unlikely_text(runtime, tiny_base, text, tmp_path):
    """The kept logits do not reach down to tokens e^16 times less likely than the first; the perplexity does."""
    loud, logits, stamp = tmp_path / "loud.gguf", tmp_path / "logits", tmp_path / "logits.json"
    with GGUFFile(tiny_base) as base:
        norm = 40 * base.tensors["output_norm.weight"].to_float32()
    write_quantized(
        tiny_base, loud, {"output_norm.weight": Replacement("F32", lambda: quantize(norm, "F32"))}, {}, file_type=32
    )
    first = evaluate(loud, loud, text, windows=2, base_logits=logits, threads=2)
    assert first.ppl_base == pytest.approx(first.ppl, rel=1e-3) and first.ppl_ratio == pytest.approx(1, abs=1e-3)
    assert first.ppl > 1e6  # so there are such tokens
    made = stamp.stat().st_mtime_ns
    again = evaluate(loud, loud, text, windows=2, base_logits=logits, threads=2)
    assert again.ppl_base == first.ppl_base and stamp.stat().st_mtime_ns == made
    old = json.loads(stamp.read_text())
    del old["ppl"]  # as earlier versions left it
    stamp.write_text(json.dumps(old))
    assert evaluate(loud, loud, text, windows=2, base_logits=logits, threads=2).ppl_base == first.ppl_base


def test_perplexity_is_that_of_torch(runtime, tiny_model, tiny_base, text):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids[: 3 * 512 + 1])
    ids = torch.cat([torch.tensor([1]), ids])[: 3 * 512]  # llama.cpp puts the BOS token first
    windows = ids.reshape(3, 512).clone()
    windows[:, 0] = 1  # and at the start of every window
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        logs = model(windows).logits.log_softmax(-1)
    scored = logs[:, 256:-1].gather(-1, windows[:, 257:, None])
    expected = float(torch.exp(-scored.mean()))
    found = evaluate(tiny_base, tiny_base, text, windows=3, threads=2)
    assert found.ppl == pytest.approx(expected, rel=2e-3)


def test_base_logits_are_used_again(runtime, tiny_base, quantized, text, tmp_path, capfd):
    logits = tmp_path / "logits"
    first = evaluate(quantized, tiny_base, text, windows=2, base_logits=logits, threads=2)
    assert 0 < first.kld < 0.1 and first.kld_median <= first.kld_99 <= first.kld_max and first.kld_error < first.kld
    assert 0.5 < first.same_top <= 1 and first.bpw < 16
    assert "Logits of" in capfd.readouterr().err
    second = evaluate(quantized, tiny_base, text, windows=2, base_logits=logits, threads=2)
    assert "Logits of" not in capfd.readouterr().err
    assert second.kld == pytest.approx(first.kld, abs=1e-6)
    evaluate(quantized, tiny_base, text, windows=3, base_logits=logits, threads=2)
    assert "Logits of" in capfd.readouterr().err


def test_base_of_another_model(tiny_base, text, tmp_path, monkeypatch, capfd):
    """Said before anything is run. A tied output is written out by some programs, and not by others."""
    monkeypatch.setattr("athena_gguf.report.evaluate.binary", lambda name: name)
    monkeypatch.setattr("athena_gguf.report.evaluate._run", never)

    def change(name, fields=(), drop=(), **shapes):
        path = tmp_path / f"{name}.gguf"
        with GGUFFile(tiny_base) as base:
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_array("tokenizer.ggml.tokens", fields or base.metadata["tokenizer.ggml.tokens"])
            for tensor in base:
                shape = shapes.get(tensor.name.replace(".", "_"), tensor.shape)
                if tensor.name not in drop:
                    writer.add_tensor(tensor.name, np.zeros(shape, np.float32))
            if name == "untied":
                writer.add_tensor("output.weight", np.zeros(base.tensors["token_embd.weight"].shape, np.float32))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return path

    def said(file, base=tiny_base):
        with pytest.raises(Ran):
            evaluate(file, base, text, windows=1)
        return [line for line in capfd.readouterr().err.splitlines() if "swapped" not in line and "warning" in line]

    tokens = GGUFFile(tiny_base).metadata["tokenizer.ggml.tokens"]
    assert said(tiny_base) == said(change("same")) == said(change("untied")) == said(tiny_base, change("untied")) == []
    [line] = said(change("short", drop=("blk.1.ffn_up.weight",)))
    assert "short.gguf and" in line and "tensor blk.1.ffn_up.weight is absent in the one and [192" in line
    [line] = said(change("wide", blk_0_attn_q_weight=(256, 128)))
    assert "not seem to be of one model: tensor blk.0.attn_q.weight is [256, 128] in the one" in line
    [line] = said(change("words", [*tokens[:-1], "another"]))
    assert line.endswith("their vocabularies differ")
    with pytest.raises(AthenaError, match=rf"fewer\.gguf has {len(tokens) - 1} tokens .* {len(tokens)}: they are"):
        evaluate(change("fewer", tokens[:-1]), tiny_base, text, windows=1)


def test_foreign_logits_file_is_left_alone(runtime, tiny_base, text, tmp_path):
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary")
    with pytest.raises(AthenaError, match=r"diary\.txt exists and holds no logits"):
        evaluate(tiny_base, tiny_base, text, windows=1, base_logits=diary)
    assert diary.read_text() == "dear diary"


def test_text_too_short(runtime, tiny_base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the sea")
    with pytest.raises(AthenaError, match="at least 1024 tokens"):
        evaluate(tiny_base, tiny_base, short, windows=1)
    short.write_text("the sea " * 130)  # bytes enough, but not tokens
    with pytest.raises(AthenaError, match=r"short\.txt: evaluation needs at least 1024 tokens"):
        evaluate(tiny_base, tiny_base, short, windows=1)
    with pytest.raises(AthenaError, match=r"absent\.txt"):
        evaluate(tiny_base, tiny_base, tmp_path / "absent.txt", windows=1)


@pytest.mark.parametrize("content", [bytes(range(256)) * 20, "Größe ".encode("latin-1") * 1000])
def test_text_that_is_not_utf8(content, tiny_base, tmp_path, monkeypatch):
    """As convert --calibration says it, before anything is run."""
    monkeypatch.setattr("athena_gguf.report.evaluate._run", None)
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(AthenaError) as calibration:
        file_windows(None, path, 512)
    for verb, files in ((athena_gguf.eval, tiny_base), (athena_gguf.compare, [tiny_base])):
        with pytest.raises(AthenaError, match=r"text\.txt: cannot read the text: 'utf-8' codec") as found:
            verb(files, tiny_base, path)
        assert str(found.value) == str(calibration.value)


def test_text_shorter_than_asked_for(runtime, tiny_base, text, tmp_path, capfd):
    few = evaluate(tiny_base, tiny_base, text, windows=2, threads=2)
    assert few.windows == 2 and "asked for" not in capfd.readouterr().err
    many = 100_000
    print_evaluation(tiny_base, tiny_base, text, many, None, 2, False)
    said = capfd.readouterr()
    found = int(re.search(rf"windows +(\d+) \({many} asked for\)", said.out)[1])
    assert 2 < found < many and f"warning: {text} has only {found} windows of 512 tokens, {many} were" in said.err


def test_no_room_for_logits(runtime, tiny_base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(AthenaError, match=r"logits of .* needs .* MiB"):
        evaluate(tiny_base, tiny_base, text, windows=2, base_logits=tmp_path / "logits")
    assert list(tmp_path.iterdir()) == []


def test_eval_and_run_commands(runtime, tiny_base, quantized, text):
    main = "import sys; from athena_gguf.cli import main; sys.argv[0] = 'athena-gguf'; main()"
    arguments = ["eval", quantized, "--base", tiny_base, "--text", text, "--windows", "1", "--threads", "2", "--json"]
    result = subprocess.run([sys.executable, "-c", main, *map(str, arguments)], capture_output=True, text=True)
    found = json.loads(result.stdout)
    assert {"kld", "ppl", "ppl_base", "ppl_ratio", "same_top", "bytes", "bpw"} <= set(found)
    arguments = ["run", quantized, "-p", "the sea", "-n", "6", "--seed", "1", "--threads", "1", "--context", "64"]
    runs = [subprocess.run([sys.executable, "-c", main, *map(str, arguments)], capture_output=True) for _ in range(2)]
    assert runs[0].returncode == 0 and runs[0].stdout == runs[1].stdout and runs[0].stdout.strip()
    assert b"answer: " in runs[0].stderr and b"tokens/s" in runs[0].stderr


def test_system_prompt_needs_a_template(runtime, tiny_base):
    with pytest.raises(AthenaError, match="chat template"):
        completion.complete(tiny_base, "x", tokens=1, system="be kind")


def test_a_prompt_too_long_says_which_option_helps(runtime, tiny_base):
    with pytest.raises(AthenaError, match=r"the prompt has \d+ tokens, and a context of 16 takes \d+; .* with -c"):
        completion.complete(tiny_base, tiny.words(400), tokens=1, raw=True, context=16)


def test_a_type_tensors_run(runtime, tiny_base, text, tmp_path):
    """llama.cpp decodes A3 as the reference does: the same weights as F32 give the same predictions."""
    rng = np.random.default_rng(2)
    rows = np.asarray(rng.integers(0, 256, (128, 192 // 64 * A3.group_bytes)), np.uint8)
    rows[:, :: A3.group_bytes] = 40  # the scale bytes of tail blocks; 192 columns are three of them
    as_a3, as_f32 = tmp_path / "a3.gguf", tmp_path / "f32.gguf"
    metadata = {"athena.format_version": 1}
    name = "blk.0.ffn_down.weight"
    write_quantized(tiny_base, as_a3, {name: Replacement("A3", lambda: rows)}, metadata, file_type=121)
    with GGUFFile(as_a3) as file:
        decoded = file.tensors[name].to_float32()
    write_quantized(tiny_base, as_f32, {name: Replacement("F32", lambda: quantize(decoded, "F32"))}, {}, file_type=0)
    found = evaluate(as_a3, as_f32, text, windows=1, threads=2)
    assert abs(found.kld) < 1e-3 and found.same_top > 0.95
    assert evaluate(as_a3, tiny_base, text, windows=1, threads=2).kld > 10 * abs(found.kld)


def test_statistics_need_all_numbers():
    assert parse_statistics("Mean    KLD:   0.5 ±   0.1\n") is None
