"""Curvature against gradients taken another way, and the cutting and writing of calibration text."""

import numpy as np
import pytest
import torch
import transformers

from athena_gguf.calibration import Lookup, measure_curvature, self_generated_windows, store, text_windows
from athena_gguf.calibration import curvature as curvature_module
from athena_gguf.errors import AthenaError
from athena_gguf.model import LinearLayer, linear_layers, load_model, load_tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def layers(model):
    return [
        LinearLayer(name, name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


@pytest.fixture(scope="module")
def windows():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 50, (5, 12)))


def reference(model, layers, windows, cap):
    """Curvature of one input by definition: gradients of an added zero at every reader's output, in NumPy."""
    inputs, zeros = [], []
    handles = []
    for layer in layers:

        def add(module, args, output):
            zero = torch.zeros_like(output, requires_grad=True)
            inputs.append(args[0])
            zeros.append(zero)
            return output + zero

        handles.append(layer.module.register_forward_hook(add))
    logits = model(input_ids=windows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, zeros)
    for handle in handles:
        handle.remove()
    x = inputs[0].detach().double().numpy().reshape(-1, inputs[0].shape[-1])
    squares = sum(g.double().numpy().reshape(len(x), -1) ** 2 @ np.ones(g.shape[-1]) for g in gradients)
    u = np.sqrt(squares)
    powers = [layer.module.weight.double().square().mean(1) for layer in layers]
    norms = [
        (g.double().square() * p / p.mean()).sum(-1).sqrt().numpy() for g, p in zip(gradients, powers, strict=True)
    ]
    capped = [np.minimum(n[a : a + 2], cap * n[a : a + 2].mean()) for n in norms for a in (0, 2, 4)]
    means = [sum(float((c**2).sum()) for c in capped[i : i + 3]) / len(x) for i in range(0, len(capped), 3)]
    return (x * u[:, None]).T @ x / u.sum(), u.sum() ** 2 / (u**2).sum(), means


@pytest.mark.parametrize("cap", [10, 1.1])
def test_curvature_is_that_of_the_definition(cap, model, layers, windows, monkeypatch):
    monkeypatch.setattr(curvature_module, "_CAP", cap)
    found = {c.about.tensor_names: c for c in measure_curvature(model, layers, windows, batch_windows=2)}
    blocks = ("model.layers.0.", "model.layers.1.")
    readers = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    assert set(found) == {tuple(block + name for name in names) for block in blocks for names in readers}
    by_name = {layer.tensor_name: layer for layer in layers}
    for names, curvature in found.items():
        matrix, effective, squares = reference(model, [by_name[n] for n in names], windows, cap)
        assert curvature.about.tokens == windows.numel()
        assert curvature.about.effective_tokens == pytest.approx(effective, rel=1e-4)
        assert curvature.about.gradient_squares == pytest.approx(squares, rel=1e-4)
        np.testing.assert_allclose(curvature.matrix, matrix, rtol=2e-4, atol=1e-5 * np.abs(matrix).max())


@pytest.mark.parametrize("tokens", [1, 77, 1000])
@pytest.mark.parametrize("mixed", [False, True])
def test_sums_of_products_are_those_of_float64(mixed, tokens, monkeypatch):
    """Rounded to bfloat16 first, each input is off by up to 2^-8 of itself (here torch multiplies on the CPU)."""
    rng = np.random.default_rng(tokens)
    x = (rng.standard_normal((tokens, 48)) * np.exp(3 * rng.standard_normal(48))).astype(np.float32)
    if mixed:
        monkeypatch.setattr(curvature_module, "mixed", lambda device: True)

        def addmm(total, a, b, *, out_dtype, out):
            assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32) and out is total
            return out.add_(a.float() @ b.float())

        monkeypatch.setattr(torch, "addmm", addmm)
    total = torch.zeros(48, 48)
    for part in torch.from_numpy(x).split(200):
        curvature_module.add_products(total, part)
    exact = x.astype(np.float64).T @ x
    sizes = np.abs(x.astype(np.float64)).T @ np.abs(x)
    error = np.abs(total.numpy() - exact) / sizes
    assert error.max() < (2.1 * 2**-8 if mixed else 1e-5)
    damping = 0.01 * exact.diagonal().mean()
    assert np.linalg.eigvalsh(total.double().numpy() + damping * np.eye(48)).min() > 0.99 * damping


def test_curvature_of_experts_is_that_of_the_definition(windows, monkeypatch):
    """Every expert's from the tokens that it was sent, as seen by a stand-in for torch's own product."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    model = transformers.MixtralForCausalLM(config).eval().requires_grad_(False)
    experts = model.model.layers[0].mlp.experts
    names = {f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    shapes = {name: (4, 32, 48) if "down" in name else (4, 48, 32) for name in names}
    layers = [layer for layer in linear_layers(model, "llama", shapes)]
    assert {layer.tensor_name for layer in layers} == names
    found = {c.about.tensor_names: c for c in measure_curvature(model, layers, windows, len(windows))}
    assert set(found) == {("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"), ("blk.0.ffn_down_exps.weight",)}

    seen, product = [], torch.nn.functional.linear

    def spy(x, weight, bias=None):
        y = product(x, weight, bias)
        for stacked in (experts.gate_up_proj, experts.down_proj):
            for expert in range(4):
                if weight.data_ptr() == stacked[expert].data_ptr():
                    zero = torch.zeros_like(y, requires_grad=True)
                    seen.append((stacked, expert, x.detach().double().numpy(), zero))
                    y = y + zero
        return y

    model.set_experts_implementation("eager")
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    logits = model(input_ids=windows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [zero for *_, zero in seen])
    monkeypatch.undo()
    assert len(seen) == 8
    squares = {name: np.zeros(4) for name in names}
    for (stacked, expert, x, _), gradient in zip(seen, gradients, strict=True):
        g, weight = gradient.double().numpy(), stacked[expert].double().numpy()
        readers = (
            {"gate": slice(0, 48), "up": slice(48, 96)} if stacked is experts.gate_up_proj else {"down": slice(32)}
        )
        u = np.sqrt(np.square(g).sum(1))
        curvature = found[tuple(f"blk.0.ffn_{reader}_exps.weight" for reader in readers)]
        expected = (x * u[:, None]).T @ x / u.sum()
        np.testing.assert_allclose(curvature.matrix[expert], expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())
        for reader, rows in readers.items():
            power = np.square(weight[rows]).mean(1)
            norms = np.sqrt((np.square(g[:, rows]) * power / power.mean()).sum(1))
            squares[f"blk.0.ffn_{reader}_exps.weight"][expert] = np.square(np.minimum(norms, 10 * norms.mean())).sum()
    for curvature in found.values():
        assert curvature.about.tokens == windows.numel() and curvature.about.unreached == 0
        for name, square in zip(curvature.about.tensor_names, curvature.about.gradient_squares, strict=True):
            assert square == pytest.approx(squares[name].sum() / windows.numel(), rel=1e-4)
        of_experts = sum(squares[name] for name in curvature.about.tensor_names)
        np.testing.assert_allclose(curvature.about.shares, of_experts / of_experts.sum(), rtol=1e-4)


def test_power_of_looked_up_rows_is_that_of_the_definition(model, layers, windows, monkeypatch):
    monkeypatch.setattr(curvature_module, "_CAP", 1.5)
    rows = model.model.embed_tokens(windows).clone().requires_grad_(True)
    logits = model(inputs_embeds=rows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, rows)
    products = gradient.double().square().sum(-1) * rows.detach().double().square().sum(-1)
    lookup = Lookup()
    measure_curvature(model, layers, windows, batch_windows=2, lookup=lookup)
    capped = [batch.clamp(max=1.5 * float(batch.mean())) for batch in products.split(2)]
    assert any(float(batch.max()) < float(whole.max()) for batch, whole in zip(capped, products.split(2), strict=True))
    assert lookup.power == pytest.approx(float(torch.cat(capped).mean()), rel=1e-4)


def test_layers_that_run_twice_or_never_get_no_curvature(model, layers, windows):
    first, second = model.model.layers
    kept = second.mlp
    second.mlp = first.mlp
    try:
        found = measure_curvature(model, [*layers, LinearLayer("x", "x", torch.nn.Linear(32, 32))], windows, 5)
    finally:
        second.mlp = kept
    names = {name.partition("layers.")[2] for c in found for name in c.about.tensor_names}
    assert names == {f"{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qkvo"}


def test_nothing_stays_attached_to_the_model(model, layers, windows):
    measure_curvature(model, layers, windows, batch_windows=5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sampled_labels_follow_the_seed(model, layers, windows):
    one, again, other = (
        measure_curvature(model, layers[:1], windows, 5, labels="sampled", seed=seed)[0].matrix for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_curvature_that_is_not_finite_names_the_tensor(model, layers, windows):
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    weight[0, 0] = float("inf")
    try:
        with pytest.raises(AthenaError, match=r"NaN or Inf") as error:
            measure_curvature(model, layers, windows, 5)
        assert "model.layers.1." in str(error.value)
    finally:
        weight[0, 0] = kept


def test_text_windows_are_cut_without_overlap(tiny_model, tmp_path):
    import tiny_model as maker

    tokenizer = load_tokenizer(tiny_model)
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(maker.words(400, seed=number), encoding="utf-8")
    whole = [tokenizer(f.read_text(), add_special_tokens=False)["input_ids"] for f in files]
    possible = {tuple(ids[a : a + 32]) for ids in whole for a in range(0, len(ids) - 31, 32)}
    some = text_windows(tokenizer, files, 10 * 32, 32, seed=3)
    assert some.shape == (10, 32)
    assert {tuple(w.tolist()) for w in some} <= possible
    everything = text_windows(tokenizer, files, 10**6, 32, seed=3)
    assert len(everything) == sum(len(ids) // 32 for ids in whole)
    assert torch.equal(some, text_windows(tokenizer, files, 10 * 32, 32, seed=3))
    assert not torch.equal(some, text_windows(tokenizer, files, 10 * 32, 32, seed=4))
    with pytest.raises(AthenaError, match="shorter than one window"):
        text_windows(tokenizer, files, 100, 10**5, seed=0)
    with pytest.raises(AthenaError, match="cannot read"):
        text_windows(tokenizer, [tmp_path / "none.txt"], 100, 32, seed=0)


def test_the_model_writes_its_own_text(tiny_model):
    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(tiny_model)
    count = []
    some = self_generated_windows(model, tokenizer, 5 * 24, 24, seed=1, batch=2, advance=count.append)
    assert some.shape == (5, 24) and (some[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(w.tolist()) for w in some}) == 5
    assert sum(count) == pytest.approx(5 * 24, abs=5 * 2)
    assert torch.equal(some, self_generated_windows(model, tokenizer, 5 * 24, 24, seed=1, batch=2))
    assert torch.equal(some, self_generated_windows(model, tokenizer, 5 * 24, 24, seed=1, batch=2, threads=3))
    assert not torch.equal(some, self_generated_windows(model, tokenizer, 5 * 24, 24, seed=2, batch=2))


def test_an_interruption_does_not_wait_for_whole_windows(tiny_model):
    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    steps = []

    def interrupt(tokens):
        steps.append(tokens)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_generated_windows(
            model, load_tokenizer(tiny_model), 6 * 48, 48, seed=1, batch=2, threads=3, advance=interrupt
        )
    assert len(steps) <= 3  # a step of every thread, of 46


def test_kept_curvature_is_found_again_only_under_its_key(model, layers, windows, tmp_path):
    measured, asked = [], []

    def measure(finished, lookup, pause):
        asked.append(set(finished))
        measured[:] = measure_curvature(model, layers, windows, 5, lookup=lookup)
        for curvature in measured:
            if not set(finished).issuperset(curvature.about.tensor_names):
                yield curvature

    names = [layer.tensor_name for layer in layers]

    def calibration(key, keep=True):
        return store.Calibration(key, [*names, "none"], tmp_path, keep, measure)

    first = calibration("a")
    assert len(list(first.stream())) == len(first.inputs) == 8
    assert first.absent == {"none"} and first.lookup.power > 0 and asked == [set()]

    again = calibration("a")
    kept = {c.about.tensor_names: c for c in again.stream()}
    assert len(asked) == 1 and again.lookup == first.lookup and again.absent == {"none"}
    for want in measured:
        got = kept[want.about.tensor_names]
        assert got.about == want.about and torch.equal(got.matrix, want.matrix)

    damaged = tmp_path / f"input.{names[-1]}.safetensors"
    damaged.write_bytes(b"damaged")
    assert len(list(again.stream())) == 8 and asked[1] == set(names) - {names[-1]}

    # Its readers' gradients count together, so a part of them is not enough to measure it.
    shared = next(c.about.tensor_names for c in measured if len(c.about.tensor_names) > 1)
    (tmp_path / f"input.{shared[0]}.safetensors").write_bytes(b"damaged")
    assert len(list(again.stream(finished=shared[:1]))) == 8 and asked[2] == set(names) - set(shared)

    assert not list(again.stream(finished=names)) and len(again.inputs) == 8
    for _ in calibration("b", keep=False).stream():
        break
    assert asked[3] == set() and not list(tmp_path.glob("*.safetensors"))
