"""Encoding in order: the targets solve the least-squares problems that they are for, of the inputs that layers really
have behind the tensors of the file."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model as tiny
import torch

from athena_gguf.calibration import measure_curvature, precision, prefix
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.calibration.stage import Memory, Stage
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.encode import EncodeOptions, encode_matrix
from athena_gguf.encode.finished import FinishedTensors
from athena_gguf.encode.in_order import InOrder
from athena_gguf.errors import UsageError
from athena_gguf.format import TYPES, decode_rows
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.model import LinearLayer, load_model
from athena_gguf.model.blocks import open_blocks
from athena_gguf.model.rows import rows_in_file
from athena_gguf.plan import make_plan

CPU = torch.device("cpu")
BLOCK = "model.layers.1"
READERS = [
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
    (("self_attn.o_proj",), "input_layernorm"),
    (("mlp.gate_proj", "mlp.up_proj"), None),
    (("mlp.down_proj",), "post_attention_layernorm"),
]
FILE_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def exact_products(monkeypatch):
    for module in (prefix, precision):
        monkeypatch.setattr(module, "measuring", lambda device=None: contextlib.nullcontext())


def regression(x, y, u, lack, weights, damping):
    """For each of `weights` [rows, columns] the matrix V that minimizes sum u |W x + lack - V y|^2 + damping |V - W|^2,
    by NumPy's solver; `damping` relative to the mean diagonal of sum u y y^T."""
    root = np.sqrt(u)[:, None]
    wide = root * y
    damping *= np.mean(wide**2) * len(wide)
    rows = np.concatenate([wide, math.sqrt(damping) * np.eye(y.shape[1])])
    found = []
    for weight in weights:
        wanted = x @ weight.T + (0 if lack is None else lack)
        sides = np.concatenate([root * wanted, math.sqrt(damping) * weight.T])
        found.append(np.linalg.lstsq(rows, sides, rcond=None)[0].T)
    return found


def part_that_holds(x, y, u, lack, weights, damping, half):
    """The product's part of how much of the regression on the tokens that `half` marks lowers the error on the others
    most, and the other way round, for twice the tokens."""
    gained = power = 0.0
    for seen, others in ((half, ~half), (~half, half)):
        lacks = [None if lack is None else lack[of] for of in (seen, others)]
        found = regression(x[seen], y[seen], u[seen], lacks[0], weights, damping)
        for weight, solution in zip(weights, found, strict=True):
            made_up = y[others] @ (solution - weight).T
            error = (x[others] - y[others]) @ weight.T + (0 if lack is None else lacks[1])
            gained += (u[others, None] * made_up * error).sum()
            power += (u[others, None] * made_up**2).sum()
    b = min(1, max(0, gained / power))
    return prefix._PART * 2 * b / (1 + b)


def linear_layers(model):
    return [LinearLayer(name, name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize(("readers", "stream"), READERS, ids=["attention", "its output", "inner", "down"])
def test_targets_are_least_squares(tiny_model, exact_products, tmp_path, readers, stream):
    tokens = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    model, student = (load_model(tiny_model, CPU, torch.float32) for _ in range(2))
    names = [f"{BLOCK}.{name}" for name in readers]
    layers = [layer for layer in linear_layers(model) if layer.module_name in names]
    (curvature,) = measure_curvature(model, layers, tokens, 3, with_weights=True)
    u = curvature.weights

    models = [open_blocks(tiny_model, CPU, torch.float32) for _ in range(2)]
    part = prefix.LocalPart(*models, tokens, 3, Shelf(CPU, 100_000, 0, tmp_path / "shelf"))
    run = prefix.Prefix(linear_layers(models[0].model), part)
    run.begin()
    generator = torch.Generator().manual_seed(1)

    def disturb(index, module):
        weight = student.get_submodule(f"model.layers.{index}.{module}").weight
        weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))
        run.put(index, module, weight)

    with run.block(0) as anatomy:
        assert anatomy.order == tuple(FILE_NAMES)
        assert anatomy.streams == {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
        for module in FILE_NAMES:
            disturb(0, module)
        run.go_on(0)
    with run.block(1) as anatomy:
        if stream:
            disturb(1, "self_attn.q_proj")
        first = readers[0]
        weights = [run.weight(1, name).float() for name in readers]
        (h, found), (_, half), (_, held) = (
            prefix.targets(weights, run.moments(1, first, u, anatomy.streams.get(first)), 0.02, correction)
            for correction in (1.0, 0.5, None)
        )

    places = [names[0], *([f"{BLOCK}.{stream}"] if stream else [])]
    x, y = (tiny.inputs(m, places, tokens) for m in (model, student))
    lack = x[places[1]] - y[places[1]] if stream else None
    known = [weight.double().numpy() for weight in weights]
    x, y, u = x[names[0]], y[names[0]], u.double().numpy()
    expected = regression(x, y, u, lack, known, 0.02)
    np.testing.assert_allclose(h, (y * u[:, None]).T @ y / u.sum(), rtol=1e-4, atol=1e-5 * np.mean(y**2))
    odd = np.repeat(np.arange(len(tokens)) % 2 == 1, tokens.shape[1])
    share = part_that_holds(x, y, u, lack, known, 0.02, odd)
    assert 0.01 < share < 0.99
    for target, part, best, weight, solution in zip(found, half, held, weights, expected, strict=True):
        moved = np.abs(solution - weight.numpy()).mean()
        assert moved > 0.01 * weight.abs().mean()
        np.testing.assert_allclose(target.numpy(), solution, atol=0.002 * moved)
        torch.testing.assert_close(part, (weight + target) / 2)
        torch.testing.assert_close(best - weight, share * (target - weight), rtol=0.01, atol=0.002 * moved)


def test_conversion(tiny_model, tiny_base, options, short_windows, exact_products, monkeypatch, tmp_path):
    """Each tensor is the encoding of what the tensors before it in the file leave to be done (q and k are there in
    another order of rows)."""
    kept = []
    real = prefix.LocalPart.__init__
    monkeypatch.setattr(prefix.LocalPart, "__init__", lambda *args: (kept.append(args[3]), real(*args))[1])
    convert(tiny_model, tmp_path / "out.gguf", options(embedding_type="A3"))
    (tokens,) = kept
    odd = np.repeat(np.arange(len(tokens)) % 2 == 1, tokens.shape[1])
    model, behind = (load_model(tiny_model, CPU, torch.float32) for _ in range(2))
    curvatures = {}
    for layer_group in measure_curvature(model, linear_layers(model), tokens, 2, with_weights=True):
        curvatures |= dict.fromkeys(layer_group.about.tensor_names, layer_group)
    shares = []
    with GGUFFile(tmp_path / "out.gguf") as file, GGUFFile(tiny_base) as base:
        assert file.metadata["athena.sequential"] is True
        rows = torch.from_numpy(file.tensors["token_embd.weight"].to_float32())
        behind.get_input_embeddings().weight = torch.nn.Parameter(rows, requires_grad=False)
        for index in range(2):
            for readers, stream in READERS:
                names = [f"model.layers.{index}.{name}" for name in readers]
                places = [names[0], *([f"model.layers.{index}.{stream}"] if stream else [])]
                x, y = (tiny.inputs(m, places, tokens) for m in (model, behind))
                lack = x[places[1]] - y[places[1]] if stream else None
                u = curvatures[names[0]].weights.double().numpy()
                weights = [model.get_submodule(name).weight.double().numpy() for name in names]
                given = x[names[0]], y[names[0]], u, lack, weights, EncodeOptions.damping
                wanted, share = regression(*given), part_that_holds(*given, odd)
                shares.append(share)
                h = torch.from_numpy((y[names[0]] * u[:, None]).T @ y[names[0]] / u.sum()).float()
                for name, weight, solution in zip(names, weights, wanted, strict=True):
                    tensor_name = f"blk.{index}.{FILE_NAMES[name.removeprefix(f'model.layers.{index}.')]}.weight"
                    in_file = torch.from_numpy(base.tensors[tensor_name].to_float32())
                    order = rows_in_file(in_file, torch.from_numpy(weight).float()).numpy()
                    target = np.empty_like(weight)
                    target[order] = weight + share * (solution - weight)
                    expected = encode_matrix(torch.from_numpy(target).float(), h, TYPES["A3"], EncodeOptions())
                    got = file.tensors[tensor_name]
                    # Sums in another order take some rows along another path, as good as this one.
                    losses = []
                    for data in (got.data, expected.data):
                        off = target - decode_rows(TYPES["A3"], data, target.shape[1])
                        losses.append(np.einsum("ri,ij,rj->", off, h.double().numpy(), off))
                    assert losses[0] == pytest.approx(losses[1], rel=0.02), tensor_name
                    module = behind.get_submodule(name)
                    module.weight.copy_(torch.from_numpy(got.to_float32()[order]))
    assert max(shares) > 0.1


def test_rows_of_the_file():
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    rows[7] = rows[9]
    order = torch.randperm(300)
    assert rows_in_file(rows, rows).tolist() == list(range(300))
    torch.testing.assert_close(rows[rows_in_file(rows, rows[order])], rows[order], rtol=0, atol=0)
    assert sorted(rows_in_file(rows, rows[order]).tolist()) == list(range(300))
    rounded = rows_in_file(rows.half().float(), rows[order].bfloat16().float())
    torch.testing.assert_close(rows[rounded], rows[order], rtol=2**-7, atol=0)
    twice = torch.cat([rows[:150], torch.zeros(6, 64), rows[:150]])
    order = torch.randperm(306)
    found = rows_in_file(twice, twice[order])
    assert torch.equal(twice[found], twice[order]) and sorted(found.tolist()) == list(range(306))
    assert rows_in_file(rows, -rows) is None and rows_in_file(rows[1:], rows) is None
    assert rows_in_file(rows, rows[[0, 0, *range(2, 300)]]) is None  # which the file has once


def test_one_window(tiny_model, options, short_windows, tmp_path):
    """Nothing says what of a regression on it would hold elsewhere."""
    moved, real = [], prefix.targets

    def noted(weights, *of):
        h, found = real(weights, *of)
        moved.extend(float((a - b).abs().max()) for a, b in zip(found, weights, strict=True))
        return h, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "targets", noted)
        convert(tiny_model, tmp_path / "out.gguf", options(calibration_tokens=64))
    assert moved and not any(moved)


def test_memory_too_small(tiny_model, options, short_windows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Stage, "fits_in_order", False)
    convert(tiny_model, tmp_path / "out.gguf", options())
    assert "the GPU's memory is too small" in capsys.readouterr().err
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.metadata["athena.sequential"] is False


def test_memory_that_is_wanted(tiny_model, tiny_base, tmp_path):
    """Of a card, by the numbers in the docstring; an 8B model wants some 16 GB."""
    with GGUFFile(tiny_base) as base:
        plan = make_plan(base, "A3", "Q8_0")
    stage = Stage(
        tiny_model, tiny_base, plan, tmp_path, [torch.device("cuda")], ConvertOptions(), 0, 512, contextlib.nullcontext
    )
    wanted = stage._in_order_bytes(1)
    for memory, fits in ((wanted - 1, False), (wanted, True)):
        stage.__dict__["memory"] = Memory(memory, 1 << 40)
        assert stage.fits_in_order is fits
    shapes = {
        f"blk.0.{n}.weight": s
        for n, s in {
            "attn_q": (4096, 4096),
            "attn_k": (1024, 4096),
            "attn_v": (1024, 4096),
            "attn_output": (4096, 4096),
            "ffn_gate": (14336, 4096),
            "ffn_up": (14336, 4096),
            "ffn_down": (4096, 14336),
        }.items()
    }
    outer = dict.fromkeys(("token_embd.weight", "output.weight"), (128256, 4096))
    stage.plan = SimpleNamespace(
        shapes=shapes | outer,
        curved=shapes.keys(),
        experts_used=None,
        elements=lambda name: math.prod((shapes | outer)[name]),
    )
    for cached in ("_widest", "_width"):
        stage.__dict__.pop(cached, None)
    assert 15e9 < stage._in_order_bytes(1) < 17e9


def test_other_embeddings(tiny_model, tiny_base, options, short_windows, monkeypatch, tmp_path, capsys):
    """Those that the model does not look up count as they are in the original, which is said."""
    given, real = [], prefix.LocalPart.begin
    monkeypatch.setattr(prefix.LocalPart, "begin", lambda self, rows: given.append(rows) or real(self, rows))
    convert(tiny_model, tmp_path / "out.gguf", options())
    monkeypatch.setattr(
        prefix.Prefix, "embeddings", property(lambda self: -self.original.model.get_input_embeddings().weight)
    )
    convert(tiny_model, tmp_path / "out.gguf", options())
    assert given[0] is not None and given[1] is None
    assert "token_embd.weight is not what the model looks up" in capsys.readouterr().err


def test_kept_without_weights(tiny_model, options, tmp_path, short_windows):
    """What a conversion on its own kept does for one in order only where it has the tokens' weights."""
    results = {}
    for name, sequential, work in (("a", True, "one"), ("b", False, "two"), ("c", True, "two"), ("d", False, "one")):
        (tmp_path / work).mkdir(exist_ok=True)
        out = tmp_path / f"{name}.gguf"
        convert(tiny_model, out, options(sequential=sequential, work_dir=tmp_path / work))
        results[name] = out.read_bytes()
    assert results["a"] == results["c"] and results["b"] == results["d"]
    assert results["a"] != results["b"]


def test_goes_on_where_it_was_cut_off(tiny_model, options, short_windows, monkeypatch, tmp_path, capsys):
    """With a size to reach; and what is left of another size, encoded behind other types, is of no use."""

    def made(bpw, work):
        (tmp_path / work).mkdir(exist_ok=True)
        out = tmp_path / work / "out.gguf"
        convert(tiny_model, out, options(type=None, bpw=bpw, work_dir=tmp_path / work))
        return out.read_bytes()

    wanted = {bpw: made(bpw, f"whole-{bpw}") for bpw in (3.5, 4.2)}
    put, left = FinishedTensors.put, [0]

    def cut_off(self, *of):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("cut off")
        put(self, *of)

    monkeypatch.setattr(FinishedTensors, "put", cut_off)
    for bpw, writes, some_found in ((3.5, 7, False), (3.5, 3, True), (4.2, 4, False)):
        left[0] = writes
        capsys.readouterr()
        with pytest.raises(RuntimeError, match="cut off"):
            made(bpw, "cut")
        assert ("finished tensors are taken" in capsys.readouterr().err) == some_found
    left[0] = 1000
    assert made(3.5, "cut") == wanted[3.5]
    assert "finished tensors are taken" in capsys.readouterr().err
    assert made(4.2, "cut") == wanted[4.2]


def test_experts_stay_on_their_own(text, short_windows, tmp_path, capsys):
    model = tiny.make(tmp_path / "model", "Mixtral", num_local_experts=2, num_experts_per_tok=1)
    options = ConvertOptions(type="A2", calibration=(str(text),), calibration_tokens=512, device="cpu", sequential=True)
    convert(model, tmp_path / "out.gguf", options)
    assert "--sequential is not possible" in capsys.readouterr().err
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.metadata["athena.sequential"] is False


def test_rows_rounded_to_another_type(tiny_model, tiny_base, options, short_windows, monkeypatch, tmp_path):
    """A base file of F16, as of a checkpoint of F16, is matched with the model too."""
    import gguf

    half = tmp_path / "half.gguf"
    with GGUFFile(tiny_base) as base:
        writer = gguf.GGUFWriter(half, "llama")
        for field in gguf.GGUFReader(tiny_base).fields.values():
            if field.name != "general.architecture" and not field.name.startswith("GGUF."):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        for tensor in base:
            data = tensor.to_float32()
            writer.add_tensor(tensor.name, data.astype(np.float16) if tensor.type_name == "BF16" else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = []
    real = InOrder._rows
    monkeypatch.setattr(InOrder, "_rows", lambda *args: rows.append(real(*args)) or rows[-1])
    convert(tiny_model, tmp_path / "out.gguf", options(base=half))
    assert len(rows) == 14 and all(found is not None for found in rows)


def test_not_on_a_cluster():
    with pytest.raises(UsageError, match="leave --ray out"):
        ConvertOptions(sequential=True, ray="auto").check()
