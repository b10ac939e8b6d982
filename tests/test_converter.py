"""The process of llama.cpp's converter: the bytes that it writes on its own, whatever is made faster."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import gguf
import numpy as np
import pytest
import tiny_model

import athena_gguf.runtime
from athena_gguf.bfloat16 import to_bfloat16
from athena_gguf.model import converter
from athena_gguf.model.lazy_tensors import make_ahead

BF16 = gguf.GGMLQuantizationType.BF16


def never(values):
    raise AssertionError("not rounded by torch")


def test_rounding_is_that_of_gguf():
    """Random bits: of one sign, whose sum is no NaN, subnormal, and with NaN in all pieces."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, (3, 1001, 400), np.uint32)
    finite = np.where((bits & 0x7F800000) == 0x7F800000, bits & 0x807FFFFF, bits)
    plain = gguf.quants.BF16.quantize_blocks
    infinite = np.array([[np.inf, -np.inf, np.nan, 3.4e38]], np.float32).view(np.uint32)
    for values, with_nan in (
        (finite & 0x7FFFFFFF, never),
        (finite | 0x80000000, never),
        (bits & 0x807FFFFF, never),
        (bits & 0xBFFFFFFF, never),  # smaller than 2
        ((bits & 0xBFFFFFFF).transpose(2, 0, 1), never),
        (bits, plain),
        (infinite, plain),
    ):
        weights = values.view(np.float32)
        np.testing.assert_array_equal(to_bfloat16(weights, with_nan), gguf.quants.quantize(weights, BF16))


def test_samples_show_every_case_of_rounding():
    """All upper halves; below, at and above the middle between two neighbours; torch rounds all but NaN."""
    positive, negative, nan = converter._float32_samples()
    bits = np.concatenate([positive, negative, nan]).view(np.uint32)
    assert len(np.unique(bits >> 16)) == 1 << 16
    for values in (positive, negative):
        assert len(to_bfloat16(values, never))
        rest = values.view(np.uint32) & 0xFFFF
        assert all((rest == at).any() for at in (0, 0x8000)) and (rest < 0x8000).any() and (rest > 0x8000).any()


class Truncating:
    """What BF16 of gguf.quants might do one day."""

    qtype = BF16

    @classmethod
    def quantize_rows(cls, rows):
        return rows.view(np.uint8).reshape(-1, 4)[:, 2:].reshape(*rows.shape[:-1], -1)

    quantize_blocks = quantize_rows


@pytest.mark.parametrize("grouped", [True, False])
def test_other_rounding_stays(grouped):
    def by_rows(func, arr):
        return func(arr)

    def quantize(data, kind):
        apply = quants._apply_over_grouped_rows if grouped else by_rows
        return apply(Truncating.quantize_rows, arr=data)

    quants = SimpleNamespace(BF16=Truncating, quantize=quantize, _apply_over_grouped_rows=by_rows)
    converter.round_faster(quants)
    assert quants._apply_over_grouped_rows is by_rows


def test_other_gguf_stays(tmp_path):
    """One with other insides is left as it is; so is a folder without one."""
    program = "import sys; from pathlib import Path; from athena_gguf.model import converter; "
    program += "converter.hasten(Path(sys.argv[1])); print('gguf' in sys.modules)"
    (tmp_path / "gguf").mkdir()
    for text, imported in ((None, "False"), ("quants = None", "True"), ("import absent_module", "False")):
        if text is not None:
            (tmp_path / "gguf" / "__init__.py").write_text(text)
        done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, imported, "")


@pytest.fixture
def hastened(monkeypatch):
    """gguf's classes of this process with their tensors made ahead."""
    for owner, name in ((gguf.GGUFWriter, "write_tensors_to_file"), (gguf.LazyNumpyTensor, "tofile")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    make_ahead(gguf)


def lazy(array, made=None):
    def load(path):
        if made is not None:
            made.append(path)
        return array.copy()

    meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(array.dtype, array.shape)
    return gguf.LazyNumpyTensor(meta=meta, args=("path",), func=load)


def write(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read(path):
    return {t.name: t.data.copy() for t in gguf.GGUFReader(path).tensors}


def test_parts_in_common_are_computed_once_and_in_order(hastened, tmp_path):
    """Tensors that change a part which they have in common in place see the changes of those before them."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((200, 300)).astype(np.float32) for _ in range(40)]
    tensors, expected, made = {}, {}, []
    for n, array in enumerate(arrays):
        part = lazy(array, made)
        for step in range(4):
            part = part.__iadd__(np.float32(1))
            tensors[f"{n}.{step}"] = part * np.float32(2)
            expected[f"{n}.{step}"] = (array + np.float32(1) * (step + 1)) * np.float32(2)
        tensors[f"{n}.plain"] = expected[f"{n}.plain"] = array
    write(tmp_path / "out.gguf", tensors)
    found = read(tmp_path / "out.gguf")
    assert found.keys() == expected.keys() and len(made) == len(arrays)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


def test_a_tensor_that_cannot_be_made(hastened, tmp_path):
    def fail(array):
        raise ValueError("tensor 7 is broken")

    tensors = {str(n): lazy(np.ones((4, 32), np.float32)) for n in range(20)}
    broken = tensors["7"]
    tensors["7"] = gguf.LazyNumpyTensor(meta=broken._meta, args=(broken,), func=fail)
    with pytest.raises(ValueError, match="tensor 7 is broken"):
        write(tmp_path / "out.gguf", tensors)
    again = {"a": lazy(np.ones((4, 32), np.float32))}  # nothing is left of it
    write(tmp_path / "again.gguf", again)
    np.testing.assert_array_equal(read(tmp_path / "again.gguf")["a"], np.ones((4, 32)))


def changed(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name: change(weight) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def with_nan(weight):
    """NaN of both signs, signalling ones too, and infinities."""
    import torch

    bits = weight.clone().view(torch.int16)
    bits[..., 3:8] = torch.tensor([0x7F81, -0x7F, 0x7FC1, 0x7F80, -0x80], dtype=torch.int16)
    return bits.view(torch.bfloat16)


def test_files_are_those_of_the_converter_alone(runtime, tmp_path):
    """BF16, with NaN too, F16 and F32 checkpoints of an architecture whose rows the converter permutes; experts, and
    two tensors made of one."""
    import torch

    models = {
        "bf16": tiny_model.make(tmp_path / "bf16", vectors=0.1),
        "nan": changed(tiny_model.make(tmp_path / "nan"), with_nan),
        "f16": changed(tiny_model.make(tmp_path / "f16", vectors=0.1), torch.Tensor.half),
        "f32": changed(tiny_model.make(tmp_path / "f32"), lambda weight: weight.float() * 1.01),
        "experts": families.make(tmp_path / "experts", "GraniteMoe"),
        "stacked": families.make(tmp_path / "stacked", "Mixtral"),
    }
    script = athena_gguf.runtime.source_tree() / "convert_hf_to_gguf.py"
    for how in ("plain", "fast"):
        out = {name: f"{tmp_path / name}.{how}.gguf" for name in models}
        pairs = [str(path) for name in models for path in (models[name], out[name])]
        command = [sys.executable, Path(__file__).parent / "convert_all.py", how, script, *pairs]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in models:
        plain, fast = (Path(f"{tmp_path / name}.{how}.gguf").read_bytes() for how in ("plain", "fast"))
        assert plain == fast, name
