"""Models that are run block by block: the same curvature and the same files as from the whole model."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import tiny_model as tiny
import torch

import athena_gguf.calibration.blockwise as blockwise
import athena_gguf.encode.finished as finished
from athena_gguf.calibration import Lookup, measure_curvature
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.calibration.stage import Memory, Stage
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.gguf_file import GGUFFile, write_base
from athena_gguf.model import LinearLayer, load_model
from athena_gguf.model.blocks import BlockModel, open_blocks
from athena_gguf.model.experts import ExpertLayers
from athena_gguf.plan import make_plan

CPU = torch.device("cpu")


def linear(model):
    found = [LinearLayer(n, n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):  # experts
            half = module.gate_up_proj.shape[1] // 2
            gate, up = (ExpertLayers(module, "gate_up_proj", rows) for rows in (slice(half), slice(half, None)))
            parts = {"gate": gate, "up": up, "down": ExpertLayers(module, "down_proj", slice(None))}
            found += [LinearLayer(name, f"{name}.{part}", layers) for part, layers in parts.items()]
    return found


@pytest.mark.parametrize(
    ("devices", "family", "config"),
    [
        (1, "Llama", {}),
        (2, "Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
        (1, "Gemma3Text", {"head_dim": 32, "sliding_window": 8}),  # layers with masks and positions of their own
        (3, "Granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),  # work around the blocks
        (1, "Phi3", {"pad_token_id": 0}),
        (2, "Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),  # each expert in tensors of its own
        (1, "GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2}),  # tensors of other names
    ],
)
def test_curvature_is_that_of_the_whole_model(devices, family, config, tmp_path, monkeypatch):
    """On one device or shared among several (here all of them the CPU)."""
    monkeypatch.setattr(blockwise, "measuring", nullcontext)  # full precision
    folder = tiny.make(tmp_path / "model", family, **config)
    windows = torch.randint(0, 300, (5, 32), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, CPU, torch.float32)
    models = [open_blocks(folder, CPU, torch.float32) for _ in range(devices)]
    lookup, by_blocks = Lookup(), Lookup()
    whole = {c.about.tensor_names: c for c in measure_curvature(model, linear(model), windows, 2, lookup=lookup)}
    shelves = [Shelf(CPU, 20_000, 40_000, tmp_path / f"{n}") for n in range(devices)]
    first, *others = (
        blockwise.LocalPart(*of, 2) for of in zip(models, shelves, windows.tensor_split(devices), strict=True)
    )
    passes = blockwise.Passes(first, windows.numel(), others=others)
    passes.forward()
    measured = passes.backward(linear(models[0].model), by_blocks)
    seen = []
    for found in measured:
        expected = whole.pop(found.about.tensor_names)
        torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-4, atol=1e-6 * float(expected.matrix.max()))
        assert found.about.effective_tokens == pytest.approx(expected.about.effective_tokens, rel=1e-4)
        if devices == 1:  # outliers are judged by the mean of their batch
            assert found.about.gradient_squares == pytest.approx(expected.about.gradient_squares, rel=1e-3)
        seen.append(found.about.tensor_names[0])
        if "layers.1" in seen[-1]:  # weights are there only while their block is at work
            assert all(p.is_meta for model in models for block in model.blocks for p in block.parameters())
    assert not whole and by_blocks.power == pytest.approx(lookup.power, rel=1e-3 if devices == 1 else 0.1)
    assert [name for name in seen if "layers" in name] == sorted((n for n in seen if "layers" in n), key=_backwards)
    assert any(shelf.spilled for shelf in shelves) and not any(shelf.held for shelf in shelves)
    assert not list(tmp_path.glob("[0-9]/*"))


def _backwards(name):
    return -int(name.split("layers.")[1].split(".")[0])


def test_shelf_uses_host_memory_that_becomes_free(tmp_path):
    """It asks for it, once the first tensor would go to a file; what does not fit even then goes to one."""
    freed = iter([5_000])
    shelf = Shelf(torch.device("meta"), 0, 1_000, tmp_path, lambda: next(freed, 0))
    tensors = [torch.full((size,), float(size)) for size in (200, 600, 500, 400)]
    for number, tensor in enumerate(tensors):
        shelf.put(number, tensor)
    assert [place for place, _ in shelf.held.values()] == ["host", "host", "host", "file"]
    assert shelf.spilled == 1600 and shelf.room["host"] == 6_000 - 4 * 1300
    shelf.drop(3)
    shelf.drop(1)
    assert sorted(shelf.held) == [0, 2] and shelf.room["host"] == 6_000 - 4 * 700
    assert not list(tmp_path.iterdir())


def test_what_is_finished_is_not_measured(tiny_model, tmp_path):
    blocks = open_blocks(tiny_model, CPU, torch.float32)
    windows = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    layers = linear(blocks.model)
    done = {layer.tensor_name for layer in layers if "layers.1" in layer.tensor_name or "head" in layer.tensor_name}
    shelf = Shelf(CPU, 1 << 20, 0, tmp_path)
    passes = blockwise.Passes(blockwise.LocalPart(blocks, shelf, windows, 2), windows.numel())
    passes.forward()
    found = list(passes.backward(layers, Lookup(), done))
    assert len(found) == 4 and all("layers.0" in c.about.tensor_names[0] for c in found)


def test_a_block_that_cannot_repeat_its_bits_is_measured_all_the_same(tiny_model, tmp_path, monkeypatch, capsys):
    """As torch has operations that refuse where the same bits are asked for."""
    windows = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    asked, refusals, run = [], [], BlockModel.run

    @contextmanager
    def repeatable():
        asked.append(True)
        try:
            yield
        finally:
            asked.clear()

    def refusing(blocks, index, hidden):
        if asked and index == 0 and torch.is_grad_enabled():
            refusals.append(index)
            raise RuntimeError("cumsum does not have a deterministic implementation, but you set more")
        return run(blocks, index, hidden)

    def measured(name):
        blocks, shelf = open_blocks(tiny_model, CPU, torch.float32), Shelf(CPU, 1 << 20, 0, tmp_path / name)
        passes = blockwise.Passes(blockwise.LocalPart(blocks, shelf, windows, 2), windows.numel())
        passes.forward()
        found = list(passes.backward(linear(blocks.model), Lookup()))
        assert not shelf.held
        return found

    plain = measured("plain")
    monkeypatch.setattr(blockwise, "repeatable", repeatable)
    monkeypatch.setattr(BlockModel, "run", refusing)
    for one, other in zip(plain, measured("again"), strict=True):
        assert one.about == other.about and torch.equal(one.matrix, other.matrix)
    assert len(refusals) == 1
    assert (
        "may differ in their last bits: cumsum does not have a deterministic implementation" in capsys.readouterr().err
    )


def test_windows_of_a_batch_do_not_follow_every_byte_that_is_free():
    windows = torch.zeros(100, 512, dtype=torch.long)
    assert [blockwise.largest_batch(windows, n, 10) for n in (0, 19, 20, 39, 75, 80, 1000)] == [1, 1, 2, 2, 4, 8, 16]
    assert blockwise.largest_batch(windows[:5], 1000, 10) == 5


def test_what_stays_on_a_gpu_leaves_room_for_the_rest(tiny_model, tmp_path, monkeypatch):
    """Embeddings and output stay there too; a block at work and its encoding come on top."""
    base = tmp_path / "base.gguf"
    write_base(tiny_model, base)
    with GGUFFile(base) as header:
        plan = make_plan(header, "A3", "Q8_0")
    stage = Stage(tiny_model, base, plan, tmp_path, [torch.device("cuda")], ConvertOptions(), 64, 32, lambda *_: None)
    monkeypatch.setattr("athena_gguf.model.blocks.open_blocks", lambda folder, device, dtype, resident: resident)
    model = load_model(tiny_model, CPU, torch.bfloat16)
    outer = sum(p.nbytes for name, p in model.named_parameters() if p.ndim > 1 and ".layers." not in name)
    stage.__dict__["memory"] = Memory(0, 0)  # too small for two things at once
    working = stage._working_bytes(1)
    for left, stays in ((10_000_000, 10_000_000 - outer), (outer // 2, 0)):
        stage.__dict__["memory"] = Memory(working + left, 0)
        found = stage._blocks()
        assert found == stays


def test_weights_under_other_names_are_not_run_by_blocks(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.make(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name.replace("mlp", "ffn"): w for name, w in weights.items()}, folder / "model.safetensors")
    assert open_blocks(folder, CPU, torch.float32) is None


def test_conversion_in_little_memory_gives_the_same_file(tiny_model, options, tmp_path, short_windows):
    """Activations on disk, one block in memory; a file of a given size, whose types rest on the curvatures too."""
    for number, changes in enumerate(({}, {"bpw": 4.0})):
        whole, blocks = tmp_path / f"whole{number}.gguf", tmp_path / f"blocks{number}.gguf"
        convert(tiny_model, whole, options(**changes))
        convert(tiny_model, blocks, options(host_memory="1KiB", **changes))
        assert whole.read_bytes() == blocks.read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("host_memory", [None, "1KiB"])
def test_conversion_goes_on_where_it_was_cut_off(host_memory, tiny_model, options, tmp_path, monkeypatch):
    whole, out, work = tmp_path / "whole.gguf", tmp_path / "out.gguf", tmp_path / "work"
    convert(tiny_model, whole, options())
    put, made, kinds = finished.FinishedTensors.put, [], {}

    def stop_at_sixth(self, name, kind, encoded):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(name)
        kinds[name] = kind
        put(self, name, kind, encoded)

    settings = options(work_dir=work, host_memory=host_memory)
    monkeypatch.setattr(finished.FinishedTensors, "put", stop_at_sixth)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out, settings)
    assert not out.exists() and len(list((work / "encoded").iterdir())) == 5
    damaged = work / "encoded" / f"{made[0]}.{kinds[made[0]]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again = []
    monkeypatch.setattr(finished.FinishedTensors, "put", lambda *args: (again.append(args[1]), put(*args)))
    convert(tiny_model, out, settings)
    assert out.read_bytes() == whole.read_bytes()
    assert len(again) == 11 and made[0] in again and not set(made[1:]) & set(again)


def test_experts_in_little_memory(runtime, text, tmp_path, short_windows, monkeypatch):
    """A file as good; transformers computes experts in another order where none is watched, and last bits differ."""
    by_blocks, forward = [], blockwise.Passes.forward
    monkeypatch.setattr(blockwise.Passes, "forward", lambda passes: by_blocks.append(passes) or forward(passes))
    model = tiny.make(tmp_path / "model", "Mixtral", num_local_experts=3, num_experts_per_tok=2)
    settings = {"calibration": (str(text),), "calibration_tokens": 512, "device": "cpu", "embedding_type": "Q8_0"}
    files = [tmp_path / "whole.gguf", tmp_path / "blocks.gguf"]
    convert(model, files[0], ConvertOptions(work_dir=tmp_path / "work", **settings))
    assert not by_blocks
    convert(model, files[1], ConvertOptions(base=tmp_path / "work" / "base.gguf", host_memory="1KiB", **settings))
    assert len(by_blocks) == 1
    with GGUFFile(files[0]) as whole, GGUFFile(files[1]) as blocks, GGUFFile(tmp_path / "work" / "base.gguf") as base:
        assert {t.name: t.type_name for t in whole} == {t.name: t.type_name for t in blocks}
        for tensor in (t for t in whole if t.type_name == "A3"):
            weights = base.tensors[tensor.name].to_float32()
            one, other = (np.square(t.to_float32() - weights).sum() for t in (tensor, blocks.tensors[tensor.name]))
            assert other == pytest.approx(one, rel=0.1)
