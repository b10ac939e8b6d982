"""The ablation's default is the library's encoding, its targets solve the least-squares problems that they are for."""

import contextlib
import math

import bench_ablation as bench
import numpy as np
import pytest
import tiny_model as tiny
import torch

from athena_gguf.calibration import measure_curvature, prefix
from athena_gguf.encode import EncodeOptions, encode_matrix
from athena_gguf.format import TYPES, decode_rows
from athena_gguf.model import load_model

KIND = TYPES["A2"]
BLOCK = "model.layers.1"


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    for module in (bench, prefix):
        monkeypatch.setattr(module, "measuring", lambda device=None: contextlib.nullcontext())


@pytest.fixture
def tokens():
    return torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(tiny_model, tokens):
    device = torch.device("cpu")
    blocks = bench.opened(tiny_model, device)
    return bench.Bench(
        blocks,
        lambda: bench.opened(tiny_model, device),
        bench.block_layers(blocks, None),
        KIND,
        lambda factor, seed: tokens[: round(factor * 8)],
        lambda: tokens,
        tokens[8:],
    )


def gradient_sizes(model, names, tokens):
    """u_t = |g_t| of layers that read one input: gradients of zeros that are added to their outputs."""
    zeros, handles = [], []

    def add(module, args, output):
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handles = [model.get_submodule(name).register_forward_hook(add) for name in names]
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, zeros)
    for handle in handles:
        handle.remove()
    return torch.cat(gradients, -1).flatten(0, 1).double().norm(dim=1).numpy()


def test_default_is_what_the_library_encodes(made, tiny_model, tokens):
    line = made.line(bench.Change())
    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    original = load_model(tiny_model, torch.device("cpu"), torch.float32)
    by_name = {layer.tensor_name: layer.of(original) for layer in made.layers}
    assert len(by_name) == 2 * 7
    for curvature in measure_curvature(original, list(by_name.values()), tokens[:8], 2):
        for name in curvature.about.tensor_names:
            weight = by_name[name].module.weight
            data = encode_matrix(weight, curvature.matrix, KIND, EncodeOptions()).data
            model.get_submodule(name).weight.copy_(torch.from_numpy(decode_rows(KIND, data, weight.shape[1])))
    with torch.no_grad():
        p, q = (m(input_ids=tokens[8:]).logits.double().softmax(-1).numpy()[:, 16:31] for m in (original, model))
    np.testing.assert_allclose(line.klds, (p * np.log(p / q)).sum(-1).mean(1), rtol=1e-3)


def test_weights_of_tokens(made, tokens):
    """Without gradients the curvature is the mean square of the inputs; a layer of its own has its own gradients."""
    model = made.model
    names = [f"{BLOCK}.self_attn.{x}_proj" for x in "qkv"]
    x = tiny.inputs(model, names, tokens[:8])[names[0]]
    plain = made.measure(bench.change_of("u-power-0"))
    found = {c.about.tensor_names: c for c in plain.curvatures}[tuple(names)]
    np.testing.assert_allclose(found.matrix.numpy(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert found.about.effective_tokens == pytest.approx(len(x))
    own = made.measure(bench.change_of("own"))
    assert [c.about.tensor_names for c in own.curvatures] == [(layer.tensor_name,) for layer in made.layers]
    np.testing.assert_allclose(own.weights[names[2]], gradient_sizes(model, names[2:], tokens[:8]), rtol=1e-3)


def test_in_order(made, monkeypatch):
    """Without a correction and with nothing quantized the targets are the weights, and the inputs the original's."""
    change = bench.change_of("sequential-0")
    measured = made.measure(change)
    with monkeypatch.context() as patch:
        patch.setattr(bench.Prefix, "put", lambda *_: None)
        found = made.encode_in_order(change, measured)
    expected = made.encode_under(change, measured.curvatures)
    assert found.keys() == expected.keys()
    same = [np.mean(found[name].data == expected[name].data) for name in expected]
    assert np.mean(same) > 0.99


def test_ratio():
    """Errors that both measurements share cancel."""
    one = np.array([1.0, 2.0, 4.0, 3.0])
    assert bench.ratio(0.5 * one, one) == (0.5, pytest.approx(0, abs=1e-12))
    value, error = bench.ratio(one + 0.1 * np.array([1, -1, 1, -1]), one)
    assert value == pytest.approx(1) and error == pytest.approx(0.2 / math.sqrt(3) / 2 / 2.5)


def test_table(tiny_model, tmp_path, monkeypatch, capsys):
    """A line that fails leaves the others, and a second run takes them from the file."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(tiny.words(1500))
    other.write_text(tiny.words(400, seed=1))
    options = ["--text", other, "--calibration", text, "--type", "A2", "--device", "cpu", "--window", "32"]
    options += ["--tokens", "256", "--windows", "3", "--blocks", "1", "--tune-tokens", "1024", "--tune-steps", "2"]
    options += ["--only", "default", "broken", "sequential-1+own+tuned", "--results", tmp_path / "results.json"]
    monkeypatch.setitem(bench.PARTS, "broken", {"tokens": math.nan})
    monkeypatch.setattr("sys.argv", ["bench", str(tiny_model), *map(str, options)])
    assert bench.main() == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip().split(":")[0] for line in table[2:]] == [
        "default",
        "broken",
        "sequential-1+own+tuned",
    ]
    assert "256, " in table[2] and "1.0000 ± 0.0000" in table[2]
    assert "failed: ValueError" in table[3]
    assert float(table[4].split("|")[3].split()[0]) >= 0

    monkeypatch.setattr(bench.Bench, "line", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("sys.argv", ["bench", str(tiny_model), *(str(o) for o in options if o != "broken")])
    assert bench.main() == 0
    assert capsys.readouterr().out.splitlines() == [*table[:3], table[4]]
    monkeypatch.setattr("sys.argv", ["bench", str(tiny_model), *map(str, options), "--windows", "2"])
    with pytest.raises(bench.AthenaError, match="other settings"):
        bench.main()
