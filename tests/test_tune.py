"""Tuning: the student predicts what the file does, learns what autograd says, and ends closer to the original."""

import contextlib
import io

import numpy as np
import pytest
import tiny_model as tiny
import torch

from athena_gguf import conversion as convert_module
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.format import GROUP, TYPES, decode_rows, decode_scale, encode_scale, unpack_rows
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.plan import Plan
from athena_gguf.report.evaluate import evaluate
from athena_gguf.tune import Quantized, TuneOptions, tune
from athena_gguf.tune.stage import windows_at_once
from athena_gguf.tune.student import ScaledLinear, round_scale


def random_rows(kind, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    data = np.asarray(rng.integers(0, 256, (rows, columns // GROUP * kind.group_bytes)), np.uint8)
    data[:, :: kind.group_bytes] = rng.integers(90, 110, data[:, :: kind.group_bytes].shape)
    return data


def test_round_scale():
    scale = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 0.13 + 1e-7
    np.testing.assert_array_equal(round_scale(scale).numpy(), decode_scale(encode_scale(scale.numpy())))
    scale.requires_grad_(True)
    round_scale(scale).sum().backward()
    assert (scale.grad == 1).all()


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_layer_is_the_tensor(kind):
    """Forward and gradient against a plain linear layer with the decoded rows, in another order."""
    rng = np.random.default_rng(1)
    order, data = rng.permutation(24), random_rows(kind, 24, 192)
    layer = ScaledLinear(kind, data, order, None).double()
    assert (layer.data() == data).all()
    weight = torch.from_numpy(decode_rows(kind, data, 192)[order]).double().requires_grad_(True)
    x = torch.from_numpy(rng.standard_normal((2, 7, 192))).requires_grad_(True)
    y = x.detach().clone().requires_grad_(True)
    target = torch.from_numpy(rng.standard_normal((2, 7, 24)))
    (layer(x) * target).sum().backward()
    (torch.nn.functional.linear(y, weight) * target).sum().backward()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(y, weight))
    torch.testing.assert_close(x.grad, y.grad)
    # d weight / d log scale is the weight itself
    torch.testing.assert_close(layer.log_scale.grad, (weight.grad * weight).detach().view(24, -1, GROUP).sum(-1))


def test_layer_writes_its_scales_in_the_files_order():
    kind, order = TYPES["A3"], np.array([2, 0, 1])
    layer = ScaledLinear(kind, random_rows(kind, 3, 128), order, None)
    with torch.no_grad():
        layer.log_scale[0] = np.log(2)  # the module's row 0 is the file's row 2
    symbols, codes = unpack_rows(kind, layer.data(), 128)
    before_symbols, before = unpack_rows(kind, random_rows(kind, 3, 128), 128)
    assert (symbols == before_symbols).all() and (codes[:2] == before[:2]).all() and (codes[2] == before[2] + 16).all()


def test_nothing_to_gain_changes_nothing(tiny_model):
    """A student that is its teacher stays: no result, and no change that the held-out text does not want."""
    from athena_gguf.model import load_model

    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    windows = torch.randint(3, 300, (24, 16), generator=torch.Generator().manual_seed(0))
    norms = {"model.norm": "output_norm.weight"}
    found = tune(model, {}, norms, lambda name: None, windows, TuneOptions(steps=4, batch=4))
    assert found.before == pytest.approx(0, abs=1e-6) and not found.data and not found.norms


def test_windows_at_a_time_change_nothing(tiny_model):
    """A batch learns the same in one part and in several."""
    from athena_gguf.model import load_model

    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    name, kind = "model.layers.0.mlp.down_proj", TYPES["A3"]
    rows = model.get_submodule(name).weight.detach().to(torch.bfloat16).float().numpy()
    encoded = Quantized(kind, random_rows(kind, *rows.shape), rows)
    windows = torch.randint(3, 300, (24, 16), generator=torch.Generator().manual_seed(0))
    options = TuneOptions(steps=3, batch=4)
    norms = {"model.norm": "output_norm.weight"}
    found = [
        tune(model, {name: "down"}, norms, lambda n: encoded, windows, options, at_once=most) for most in (None, 3, 0)
    ]
    for other in found[1:]:
        assert other.after == pytest.approx(found[0].after, rel=1e-3)
        np.testing.assert_allclose(other.norms["output_norm.weight"], found[0].norms["output_norm.weight"], atol=1e-4)


def test_memory_of_windows():
    """SmolLM2-135M: 8 windows of 512 tokens took 13 GiB; a card of 8 GiB still learns, one window by one."""
    shapes = {"token_embd.weight": (49152, 576)}
    for n in range(30):
        shapes |= {f"blk.{n}.attn.weight": (1536, 576), f"blk.{n}.ffn_down.weight": (1728, 1536)}
    plan = Plan("llama", shapes, {})
    assert windows_at_once(plan, 512, 17 << 30) in (8, 9)
    assert windows_at_once(plan, 512, 8 << 30) > 0
    assert windows_at_once(plan, 512, 1 << 30) == 0


@pytest.mark.parametrize(
    ("asked", "at_once", "tunes"),
    [(None, None, False), (None, 0, False), (None, 3, True), (False, 3, False), (True, None, True), (True, 0, True)],
)
def test_who_tunes(asked, at_once, tunes, capsys):
    """If nothing was said, a GPU with memory for a window; one without says so."""
    dense = Plan("llama", {"token_embd.weight": (64, 64)}, {})
    assert convert_module._tunes(ConvertOptions(tune=asked), dense, at_once) is tunes
    assert ("memory is too small" in capsys.readouterr().err) == (asked is None and at_once == 0)
    experts = Plan("llama", {"blk.0.ffn_up_exps.weight": (2, 64, 64)}, {})
    assert convert_module._tunes(ConvertOptions(tune=asked), experts, at_once) is False


def test_tuned_file_is_closer(tiny_model, tiny_base, runtime, tmp_path, monkeypatch):
    """llama.cpp measures what tuning claims, on text that neither curvature nor tuning saw."""
    monkeypatch.setattr(convert_module, "WINDOW", 64)
    monkeypatch.setattr(convert_module, "TUNE_TOKENS", 8192)
    monkeypatch.setattr("athena_gguf.tune.stage.TuneOptions", lambda: TuneOptions(steps=40, batch=16))
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(tiny.words(9000, seed=5))
    other.write_text(tiny.words(4000, seed=6))
    options = {
        "calibration": (str(text),),
        "calibration_tokens": 1024,
        "base": tiny_base,
        "device": "cpu",
        "type": "A2",
        "sequential": False,  # which leaves more to be done
    }
    plain, tuned = tmp_path / "plain.gguf", tmp_path / "tuned.gguf"
    convert(tiny_model, plain, ConvertOptions(tune=False, **options))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        convert(tiny_model, tuned, ConvertOptions(tune=True, **options))
    assert "tuning: KL divergence on text held out" in stderr.getvalue()
    before = evaluate(plain, tiny_base, other, windows=3, threads=2).kld
    after = evaluate(tuned, tiny_base, other, windows=3, threads=2).kld
    assert after < 0.9 * before
    with GGUFFile(plain) as one, GGUFFile(tuned) as two:
        assert one.n_bytes == two.n_bytes
        assert two.metadata["athena.tuned"] is True and one.metadata["athena.tuned"] is False
        kind = TYPES["A2"]
        for tensor in one:
            if tensor.type_name == "A2":  # symbols stay
                symbols = [unpack_rows(kind, f.tensors[tensor.name].data, tensor.columns)[0] for f in (one, two)]
                assert (symbols[0] == symbols[1]).all()
        assert (one.tensors["blk.0.attn_norm.weight"].data != two.tensors["blk.0.attn_norm.weight"].data).any()


def test_rows_of_another_model(tiny_model):
    from athena_gguf.errors import AthenaError
    from athena_gguf.model import load_model

    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    rows = np.zeros((128, 128), np.float32)
    name = "model.layers.0.self_attn.q_proj"
    windows = torch.randint(3, 300, (8, 16))
    with pytest.raises(AthenaError, match=r"attn_q\.weight holds other rows than the model"):
        tune(model, {name: "blk.0.attn_q.weight"}, {}, lambda n: Quantized(None, rows, rows), windows, TuneOptions())
