"""Conversion to a target: exact sizes, the limits, what the file says, and losses against whole encodings."""

import json
from dataclasses import replace
from types import SimpleNamespace

import bench_quality
import numpy as np
import pytest
import tiny_model as tiny
import torch

from athena_gguf.allocate import PRESETS, losses, parse_target
from athena_gguf.allocate.losses import candidates, measure_losses
from athena_gguf.allocate.target import BATCH, PROGRAM, kv_cache_bytes, runtime_bytes
from athena_gguf.calibration import store
from athena_gguf.calibration.stage import Stage
from athena_gguf.conversion import ConvertOptions, convert
from athena_gguf.encode import EncodeOptions, EncodePool, Metric, encode_matrix
from athena_gguf.errors import AthenaError, UsageError
from athena_gguf.format import TYPES, decode_rows
from athena_gguf.gguf_file import GGUFFile, Tensor, quantize
from athena_gguf.plan import make_plan

FREE = {"A2", "A3", "A4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"}
pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Shared by all conversions of this file, so that the curvature is measured once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def options(options, work):
    return lambda **changes: options(**({"work_dir": work} | changes))


def planned(capsys):
    """Size and predicted KL divergence that a dry run has printed."""
    out = capsys.readouterr().out
    size = next(line for line in out.splitlines() if line.startswith("size: "))
    kld = next(line for line in out.splitlines() if line.startswith("predicted KL divergence"))
    return out, int(size.split()[1].replace(",", "")), float(kld.split(": ")[1].split()[0])


@pytest.mark.parametrize(
    "target",
    [{"bpw": 4.0}, {"bpw": 9.3}, {"size": "150KiB"}, {"size": "200000"}, {"fit_memory": "131.58MiB", "context": 32}],
    ids=str,
)
def test_file_is_as_planned_and_as_large_as_it_may_be(target, tiny_model, options, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(**target, dry_run=True))
    said, size, predicted = planned(capsys)
    assert not out.exists() and list(tmp_path.iterdir()) == []
    convert(tiny_model, out, options(**target))
    assert out.stat().st_size == size
    with GGUFFile(out) as file:
        metadata = file.metadata
        kinds = {t.name: t.type_name for t in file if len(t.shape) == 2}
        assert set(kinds.values()) <= FREE and len(set(kinds.values())) > 1
        bpw = 8 * sum(t.n_bytes for t in file) / file.n_elements
        smallest_step = 1024  # bytes: what one of the small matrices can grow by, about
        if "bpw" in target:
            assert target["bpw"] - 8 * smallest_step / file.n_elements < bpw <= target["bpw"]
        else:
            limit = {"150KiB": 153600, "200000": 200000}.get(target.get("size"))
            if limit is None:
                limit = int(131.58 * 2**20) - runtime_bytes(metadata, 32)
            assert limit - smallest_step < size <= limit
        for name, kind in kinds.items():
            assert said.count(f" {kind}") and file.tensors[name].to_float32().shape == file.tensors[name].shape
    assert metadata["athena.type"] == "mixed" and "athena.embedding_type" not in metadata
    assert metadata["athena.predicted_kld"] == pytest.approx(predicted, rel=1e-3)
    assert metadata["general.file_type"] in {k.file_type for k in TYPES.values()} | {2, 3, 7, 8, 9, 32}
    messages = capsys.readouterr().err
    assert f"predicted KL divergence from the base file: {predicted:.4g}" in messages
    assert "losses of the types: taken from the work directory" in messages


def test_one_type_is_planned_too(tiny_model, options, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(type="A3", dry_run=True))
    said, size, _ = planned(capsys)
    assert "A3 14 tensors" in said and "Q8_0 1 tensors" in said
    convert(tiny_model, out, options(type="A3"))
    assert out.stat().st_size == size
    with GGUFFile(out) as file:
        assert "athena.predicted_kld" not in file.metadata


def test_a_dry_run_warns_of_too_few_tokens_as_the_conversion_does(tiny_model, options, tmp_path, capsys):
    few = options(bpw=4.0, calibration_tokens=128, work_dir=tmp_path / "work")
    warned = []
    for dry_run in (True, False):
        convert(tiny_model, tmp_path / "out.gguf", replace(few, dry_run=dry_run))
        warned.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")])
    (warning,) = warned[0]
    assert "fewer than 4 tokens a column; the predicted KL divergence is too low" in warning
    assert warned[1] == [warning]


def test_more_bytes_lose_less_and_a_mix_beats_one_type(tiny_model, options, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(dry_run=True, type="A3"))
    _, size, one_type = planned(capsys)
    found = []
    for more in (0, 20_000, 60_000):
        convert(tiny_model, out, options(dry_run=True, size=str(size + more)))
        found.append(planned(capsys)[2])
    assert found[0] < one_type
    assert found[0] > found[1] > found[2] > 0


def test_embeddings_can_be_forced(tiny_model, options, tmp_path):
    out = tmp_path / "out.gguf"
    convert(tiny_model, out, options(bpw=4.5, embedding_type="Q5_1"))
    with GGUFFile(out) as file:
        assert file.tensors["token_embd.weight"].type_name == "Q5_1"
        assert file.metadata["athena.embedding_type"] == "Q5_1"
        assert 8 * sum(t.n_bytes for t in file) / file.n_elements <= 4.5


@pytest.mark.parametrize("made_before", [True, False])
def test_limits_are_said_before_any_calibration(made_before, tiny_model, options, tmp_path, monkeypatch):
    """From the header of a base file that is there, or still being written."""

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Stage, "kept_windows", never)
    out = tmp_path / "out.gguf"
    cases = (
        ({"size": "60KiB"}, r"--size: file of 60KiB is too small .* 0\.\d to 0\.6 MiB"),
        ({"bpw": 2.0}, r"--bpw: 2 bits a weight is too small .* 2\.\d+ to 1[67]\.\d+ bits a weight"),
        ({"bpw": 20.0}, r"20 bits a weight is more than .* 2\.\d+ to 1[67]\.\d+ bits a weight"),
        ({"size": "1GB"}, r"file of 1GB is more than .* to 0\.6 MiB"),
        (
            {"fit_memory": "100MiB"},
            r"--fit-memory: 100MiB of memory with 4096 tokens .* to 13\d\.\d MiB, 13\d\.\d MiB of it beside",
        ),
    )
    for target, match in cases if made_before else cases[:1]:
        settings = options(**target) if made_before else options(**target, base=None)
        with pytest.raises(AthenaError, match=match):
            convert(tiny_model, out, settings)
        assert list(tmp_path.iterdir()) == []


def test_more_memory_than_the_model_can_use_gives_the_weights_of_the_base_file(
    tiny_model, tiny_base, options, tmp_path, capsys
):
    out = tmp_path / "out.gguf"
    result = convert(tiny_model, out, options(fit_memory="16GiB"))
    said = capsys.readouterr().err
    assert said.count("16GiB of memory with 4096 tokens of context is all that this model can use, or more") == 1
    assert result.predicted_kld == 0 and result.bytes == out.stat().st_size
    with GGUFFile(out) as file, GGUFFile(tiny_base) as base:
        assert {t.name: t.type_name for t in file} == {t.name: t.type_name for t in base}
        assert all((t.data == base.tensors[t.name].data).all() for t in file)


def test_smallest_preset_fits_the_tiny_model(tiny_model, options, tmp_path):
    convert(tiny_model, tmp_path / "out.gguf", options(preset="tiny", dry_run=True))


def test_targets_exclude_each_other(tiny_model, options, tmp_path):
    for chosen, match in (
        ({"type": "A3", "bpw": 3.0}, "--type A3 .* --bpw chooses"),
        ({"size": "1GB", "bpw": 3.0}, "--bpw and --size exclude"),
        ({"preset": "small", "fit_memory": "1GB"}, "--fit-memory and --preset exclude"),
        ({"context": 100}, "--context .* --fit-memory"),
        ({"preset": "enormous"}, "--preset enormous: choose from tiny, small"),
        ({"size": "5 giga"}, "--size 5 giga: give a size such as"),
        ({"size": "0"}, "--size 0"),
        ({"size": "5"}, r"--size 5: 5 bytes\? say 5GiB or 5MiB"),
        ({"fit_memory": "8.5"}, r"--fit-memory 8\.5: 8\.5 bytes\?"),
        ({"gpu_memory": "12", "device": "auto"}, r"--gpu-memory 12: 12 bytes\?"),
        ({"host_memory": "32000"}, r"--host-memory 32000: 32000 bytes\?"),
        ({"bpw": -1.0}, "--bpw -1"),
    ):
        with pytest.raises(UsageError, match=match):
            convert(tiny_model, tmp_path / "out.gguf", options(**chosen))


def test_sizes_and_presets_are_understood():
    for text, expected in (("5.5GiB", 5905580032), ("8GB", 8 * 10**9), ("700 mib", 700 * 2**20), ("123456", 123456)):
        assert parse_target(size=text).size == expected
    for name, bpw in PRESETS.items():
        assert parse_target(preset=name).bpw == bpw
    assert parse_target() is None
    assert parse_target(fit_memory="1KiB").context == 4096


def test_memory_beside_the_file():
    """By hand, for an 8B model of 32 layers: 2 x 8 heads of 128 x 2 bytes x 32 layers = 128 KiB a token."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14336,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "tokenizer.ggml.tokens": ["x"] * 1000,
    }
    assert kv_cache_bytes(metadata, 4096) == 4096 * 128 * 1024
    assert runtime_bytes(metadata, 4096) == 2**29 + PROGRAM + BATCH * 4 * (1000 + 2 * 14336 + 8 * 4096)
    some = metadata | {"llama.attention.head_count_kv": [8, 0] * 16, "llama.attention.key_length": 256}
    assert kv_cache_bytes(some, 10) == 10 * 16 * 8 * (256 + 128) * 2


def test_losses_are_those_of_whole_tensors(tiny_model, tiny_base, options, work, tmp_path):
    """Samples of rows against every row, encoded and decoded, with the definition of the loss in NumPy."""
    convert(tiny_model, tmp_path / "out.gguf", options(dry_run=True))
    power = json.loads((work / "curvature" / "complete.json").read_text())["lookup"]
    losses = json.loads((work / "losses.json").read_text())["losses"]
    settings = EncodeOptions()
    ratios = []
    with GGUFFile(tiny_base) as base:
        for c in store.kept_curvatures(work / "curvature"):
            h = c.matrix.double().numpy()
            for name, square in zip(c.about.tensor_names, c.about.gradient_squares, strict=True):
                weight = base.tensors[name].to_float32()
                encoded = encode_matrix(torch.from_numpy(weight), c.matrix, TYPES["A3"], settings)
                error = decode_rows(TYPES["A3"], encoded.data, weight.shape[1]) - weight
                loss = square / 2 / len(weight) * np.trace(error @ h @ error.T)
                if name == "token_embd.weight":
                    loss += power / 2 / weight.shape[1] * np.square(error).sum() / np.square(weight).sum()
                ratios.append(losses[name]["A3"] / loss)
                of = losses[name]
                assert of["A2"] > of["A3"] > of["A4"] > of["Q8_0"] > of["BF16"] == 0
    assert len(ratios) == 15
    assert min(ratios) > 0.6 and max(ratios) < 1.6 and np.mean(ratios) == pytest.approx(1, abs=0.1)


def test_experts(runtime, text, tmp_path):
    """Losses of samples of some experts against all experts, each under its own curvature; a file of a given size."""
    model = tiny.make(tmp_path / "model", "Mixtral", num_local_experts=6, num_experts_per_tok=2)
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    settings = {"calibration": (str(text),), "calibration_tokens": 1024, "device": "cpu", "work_dir": work}
    convert(model, out, ConvertOptions(bpw=4.0, **settings))
    losses = json.loads((work / "losses.json").read_text())["losses"]
    ratios: dict[str, list[float]] = {"Q4_0": [], "A3": []}

    def decoded(weight, matrix, kind):
        if kind == "Q4_0":
            return Tensor("", weight.shape, kind, quantize(weight, kind)).to_float32()
        encoded = encode_matrix(torch.from_numpy(weight), matrix, TYPES[kind], EncodeOptions())
        return decode_rows(TYPES[kind], encoded.data, weight.shape[1])

    with GGUFFile(work / "base.gguf") as base, GGUFFile(out) as file:
        kinds = {t.name: t.type_name for t in file if "exps" in t.name}
        assert set(kinds.values()) & set(TYPES) and set(kinds.values()) <= FREE
        assert 3.95 < 8 * sum(t.n_bytes for t in file) / file.n_elements <= 4.0
        assert all(file.tensors[name].shape == base.tensors[name].shape for name in kinds)
        for c in store.kept_curvatures(work / "curvature"):
            if c.matrix.ndim == 2:
                continue
            assert sum(c.about.shares) == pytest.approx(1)
            for name, square in zip(c.about.tensor_names, c.about.gradient_squares, strict=True):
                assert losses[name]["A2"] > losses[name]["A3"] > losses[name]["A4"] > losses[name]["Q8_0"] > 0
                for kind in ("Q4_0", "A3") if "blk.0" in name else ("Q4_0",):
                    loss = 0.0
                    for weight, h, share in zip(base.tensors[name].to_float32(), c.matrix, c.about.shares, strict=True):
                        error = decoded(weight, h, kind) - weight
                        whole = np.trace(error @ h.double().numpy() @ error.T)
                        loss += share * square / 2 / len(weight) * whole
                    ratios[kind].append(losses[name][kind] / loss)
    assert len(ratios["Q4_0"]) == 6 and ratios["Q4_0"] == pytest.approx([1] * 6, abs=0.2)
    assert len(ratios["A3"]) == 3 and min(ratios["A3"]) > 0.6 and max(ratios["A3"]) < 1.6


def test_what_cannot_be_encoded_gets_a_standard_type(runtime, text, tmp_path, capsys):
    """Untied, and with rows of 160 and of 40 columns."""
    model = tiny.make(tmp_path / "model", intermediate_size=160, tie_word_embeddings=False)
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    settings = {"calibration": (str(text),), "calibration_tokens": 512, "device": "cpu", "work_dir": work}
    convert(model, out, ConvertOptions(bpw=4.6, **settings))
    assert "ffn_down.weight [128, 160] cannot be an A type: its row width" in capsys.readouterr().err
    with GGUFFile(out) as file:
        kinds = {t.name: t.type_name for t in file if len(t.shape) == 2}
        assert kinds["blk.0.ffn_down.weight"] in FREE - set(TYPES)
        assert {kinds["token_embd.weight"], kinds["output.weight"]} <= FREE
        assert 4.5 < 8 * sum(t.n_bytes for t in file) / file.n_elements <= 4.6
    losses = json.loads((work / "losses.json").read_text())["losses"]
    assert set(losses["blk.0.ffn_down.weight"]) == FREE - set(TYPES)
    assert losses["token_embd.weight"]["A2"] > losses["token_embd.weight"]["A4"] > 0


def test_bench_quality_prints_what_was_asked_for(tiny_model, tiny_base, runtime, text, tmp_path, monkeypatch, capsys):
    targets = ["A3", "4.5bpw", "160KiB"]
    arguments = [tiny_model, tiny_base, tmp_path, *targets, "--text", text, "--windows", 1, "--threads", 2, "--keep"]
    more = ["--calibration", text, "--calibration-tokens", 1024, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench_quality.py", *map(str, arguments + more)])
    assert bench_quality.main() == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == targets
    columns = {title: [row[n] for row in rows[2:]] for n, title in enumerate(rows[0])}
    for target, mib, kld in zip(targets, columns["MiB"], columns["KLD, calibration"], strict=True):
        assert float(mib) == pytest.approx((tmp_path / f"{target}.gguf").stat().st_size / 2**20, abs=0.006)
        assert float(kld.split()[0]) < 0.2
    assert "A3" in columns["types"][0] and float(columns["bits a weight"][1]) <= 4.5


def test_unmeasured_tensors_count_as_the_average(tiny_base, tmp_path):
    """Without any curvature, the loss is the squared error relative to the tensor's power, a weight of the model."""
    with GGUFFile(tiny_base) as base:
        plan = make_plan(base, None, None)
    nothing = store.Calibration("none", [], tmp_path, False, lambda *arguments: iter(()))
    losses = measure_losses(tiny_base, plan, nothing, EncodeOptions(sweeps=0), torch.device("cpu"), seed=0)
    name = "blk.0.attn_k.weight"
    assert candidates(plan, name) == (*TYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")
    with GGUFFile(tiny_base) as base:
        weight = base.tensors[name].to_float32()
    step = np.abs(weight).reshape(-1, 32).max(1) / 127
    expected = np.square(step).mean() / 12 / np.square(weight).mean() * weight.size
    assert losses[name]["Q8_0"] == pytest.approx(expected, rel=0.1)


def test_samples_encoded_together_as_on_a_gpu(tiny_base):
    """Have the losses of each on its own: tensors of one input, of which one cannot become every type."""
    metric = Metric(torch.diag(torch.linspace(0.5, 2, 128)), 0.01)
    with GGUFFile(tiny_base) as base, EncodePool(EncodeOptions(sweeps=1), 2) as pool:
        samples = []
        for name, kinds in (("q", (*TYPES, "BF16")), ("k", ("A3", "Q8_0", "BF16")), ("v", (*TYPES, "BF16"))):
            tensor = base.tensors[f"blk.0.attn_{name}.weight"]
            sensitivity = losses._Sensitivity(0.5, 0.0, np.square(tensor.to_float32()).sum(1))
            samples.append(losses._sample(tensor, kinds, sensitivity, np.random.default_rng(1), 1))
        on_gpu = SimpleNamespace(gpu=True, submit_together=pool.submit_together, executor=pool.executor)
        alone, together = (
            [start() for start in losses._start(samples, metric.plain, metric, p)] for p in (pool, on_gpu)
        )
    assert [set(found) for found in together] == [set(TYPES), {"A3", "Q8_0"}, set(TYPES)]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
