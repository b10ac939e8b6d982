"""GGUF reading and writing, with gguf-py as the independent truth."""

import shutil
from collections import namedtuple

import gguf
import numpy as np
import pytest

from athena_gguf.errors import AthenaError
from athena_gguf.format import A3, TYPES, decode_rows, pack_rows
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize, types, write_quantized
from athena_gguf.gguf_file.standard import STANDARD_TYPES


def random_rows(kind, rows, columns, seed=3):
    rng = np.random.default_rng(seed)
    symbols = rng.integers(0, 1 << kind.bits, (rows, columns), np.uint8)
    return pack_rows(kind, symbols, rng.integers(0, 256, (rows, columns // 64), np.uint8))


def test_types_are_known_to_gguf_py():
    types.register()
    types.register()
    assert [int(gguf.GGMLQuantizationType[name]) for name in ("A2", "A3", "A4")] == [120, 121, 122]
    assert gguf.GGMLQuantizationType(121).name == "A3" and gguf.GGMLQuantizationType(121) == 121
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(n)] for n in (120, 121, 122)]
    assert sizes == [(64, 17), (64, 25), (64, 33)]
    assert types.type_name(8) == "Q8_0" and types.type_name(4711) is None
    assert types.row_bytes("A4", 576) == 297 and types.row_bytes("Q8_0", 576) == 612


def test_reader_agrees_with_gguf_py(tiny_gguf):
    theirs = gguf.GGUFReader(tiny_gguf)
    with GGUFFile(tiny_gguf) as ours:
        assert ours.metadata["a.string"] == "Größe"
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert ours.metadata[key] == field.contents(), key
        assert [t.name for t in ours] == [t.name for t in theirs.tensors]
        for mine, other in zip(ours, theirs.tensors, strict=True):
            assert mine.shape == tuple(int(n) for n in other.shape[::-1])
            assert (mine.type_name, mine.n_bytes) == (other.tensor_type.name, other.n_bytes)
            assert mine.n_elements == other.n_elements
            np.testing.assert_array_equal(mine.data.ravel(), other.data.view(np.uint8).ravel())
            expected = gguf.quants.dequantize(other.data, other.tensor_type)
            np.testing.assert_array_equal(mine.to_float32(), expected)
        np.testing.assert_array_equal(
            ours.tensors["linear.weight"].to_float32(slice(2, 4)), ours.tensors["linear.weight"].to_float32()[2:4]
        )


def test_write_replaces_and_keeps(tiny_gguf, tmp_path):
    linear = random_rows(A3, 6, 128)
    experts = random_rows(TYPES["A2"], 12, 64).reshape(3, 4, 17)
    replace = {
        "linear.weight": Replacement("A3", lambda: linear),
        "experts.weight": Replacement("A2", lambda: experts),
    }
    metadata = {
        "athena.format_version": 1,
        "athena.note": "x",
        "athena.list": [1.5, 2],
        "a.int8": -4,
        "athena.on": True,
    }
    out = tmp_path / "out.gguf"
    write_quantized(tiny_gguf, out, replace, metadata, file_type=121)
    before, after = gguf.GGUFReader(tiny_gguf), gguf.GGUFReader(out)
    expected = {k: f.contents() for k, f in before.fields.items() if not k.startswith("GGUF.")}
    expected |= metadata | {"general.file_type": 121, "general.quantization_version": 2}
    assert {k: f.contents() for k, f in after.fields.items() if not k.startswith("GGUF.")} == expected
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert list(new.shape) == list(old.shape)
        if old.name not in replace:
            assert new.tensor_type == old.tensor_type
            np.testing.assert_array_equal(new.data, old.data)
    kinds = {t.name: t.tensor_type.name for t in after.tensors}
    assert kinds["linear.weight"] == "A3" and kinds["experts.weight"] == "A2"
    with GGUFFile(out) as ours:
        np.testing.assert_array_equal(ours.tensors["linear.weight"].to_float32(), decode_rows(A3, linear, 128))
        assert ours.tensors["experts.weight"].to_float32().shape == (3, 4, 64)
        assert ours.tensors["linear.weight"].bits_per_weight == 3.125
    again = tmp_path / "again.gguf"
    write_quantized(tiny_gguf, again, replace, metadata, file_type=121)
    assert again.read_bytes() == out.read_bytes()


def test_truncated_anywhere_is_refused(tiny_gguf, tmp_path):
    data = tiny_gguf.read_bytes()
    end = max(int(t.data_offset) + t.n_bytes for t in gguf.GGUFReader(tiny_gguf).tensors)
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1200), *range(1200, end, 37), end - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(AthenaError, match=r"cut\.gguf"):
            GGUFFile(cut)
    cut.write_bytes(data[:end])
    GGUFFile(cut).close()


def test_damaged_header_never_escapes(tiny_gguf, tmp_path):
    """Any byte of the header set to any of some values: a clear error, or a file that can be read."""
    data = bytearray(tiny_gguf.read_bytes())
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for at in range(int(gguf.GGUFReader(tiny_gguf).tensors[0].data_offset)):
        for value in (0, 0x7F, 0xFF):
            changed = data.copy()
            changed[at] = value
            damaged.write_bytes(changed)
            try:
                with GGUFFile(damaged) as file:
                    for tensor in file:
                        assert int(tensor.data.sum()) >= 0
            except AthenaError as error:
                refused += 1
                assert "damaged.gguf" in str(error)
    assert refused > 500


def test_overlapping_tensors_are_refused(tiny_gguf):
    data = bytearray(tiny_gguf.read_bytes())
    at = data.index(b"linear.weight") + len("linear.weight") + 4 + 8 * 2 + 4  # dimensions, their number, the type
    assert int.from_bytes(data[at : at + 8], "little") == 384  # after 96 floats
    data[at : at + 8] = (352).to_bytes(8, "little")
    tiny_gguf.write_bytes(data)
    with pytest.raises(AthenaError, match=r"tensors norm\.weight and linear\.weight overlap"):
        GGUFFile(tiny_gguf)


def test_absent_or_foreign_files(tmp_path):
    with pytest.raises(AthenaError, match=r"absent\.gguf"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(AthenaError):
        GGUFFile(tmp_path)
    (tmp_path / "text").write_text("no model at all")
    with pytest.raises(AthenaError, match="no GGUF"):
        GGUFFile(tmp_path / "text")


def test_newer_format_version_is_refused(tiny_gguf, tmp_path):
    for version, known in ((1, True), (2, False)):
        out = tmp_path / f"{version}.gguf"
        write_quantized(tiny_gguf, out, {}, {"athena.format_version": version}, file_type=121)
        if known:
            GGUFFile(out)
        else:
            with pytest.raises(AthenaError, match=r"2\.gguf: .*format version 2"):
                GGUFFile(out)


def _failing_with(exception):
    def fail():
        raise exception

    return Replacement("A3", fail)


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), AthenaError("NaN in linear.weight"), MemoryError()])
def test_interrupted_write_leaves_nothing(tiny_gguf, tmp_path, exception):
    out = tmp_path / "out.gguf"
    with pytest.raises(type(exception)):
        write_quantized(tiny_gguf, out, {"linear.weight": _failing_with(exception)}, {}, file_type=121)
    assert sorted(tmp_path.iterdir()) == [tiny_gguf]
    out.write_text("an older file")
    with pytest.raises(type(exception)):
        write_quantized(tiny_gguf, out, {"linear.weight": _failing_with(exception)}, {}, file_type=121)
    assert out.read_text() == "an older file" and len(list(tmp_path.iterdir())) == 2


def test_write_refuses_what_does_not_fit(tiny_gguf, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"

    def attempt(name, kind, data):
        write_quantized(tiny_gguf, out, {name: Replacement(kind, lambda: data)}, {}, file_type=121)

    with pytest.raises(AthenaError, match="nowhere"):
        attempt("nowhere", "A3", np.zeros((6, 50), np.uint8))
    with pytest.raises(AthenaError, match=r"linear\.weight.*shape"):
        attempt("linear.weight", "A3", np.zeros((6, 49), np.uint8))
    with pytest.raises(AthenaError, match=r"norm\.weight.*64 columns, not 96"):
        attempt("norm.weight", "A3", np.zeros(50, np.uint8))
    with pytest.raises(AthenaError, match="unknown type A9"):
        attempt("linear.weight", "A9", np.zeros((6, 50), np.uint8))
    with pytest.raises(AthenaError, match="missing"):
        write_quantized(tiny_gguf, tmp_path / "missing" / "out.gguf", {}, {}, file_type=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(AthenaError, match="MiB free"):
        attempt("linear.weight", "A3", random_rows(A3, 6, 128))
    assert not out.exists() and list(tmp_path.iterdir()) == [tiny_gguf]


@pytest.mark.parametrize("name", STANDARD_TYPES)
def test_standard_types_round_trip(name):
    values = np.random.default_rng(1).standard_normal((2, 3, 96)).astype(np.float32)
    data = quantize(values, name)
    assert data.dtype == np.uint8 and data.shape == (2, 3, types.row_bytes(name, 96))
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(values.shape)
    error = np.abs(back - values).max()
    bound = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(name, 0.4)
    assert error <= bound


def test_standard_types_refuse():
    with pytest.raises(AthenaError, match="32 columns, not 40"):
        quantize(np.zeros((2, 40), np.float32), "Q8_0")
    with pytest.raises(AthenaError, match="Q2_K"):
        quantize(np.zeros((2, 256), np.float32), "Q2_K")
