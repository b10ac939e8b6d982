"""The new types inside a built llama.cpp: its own type tests, llama-quantize, and what has to be refused."""

import struct
from pathlib import Path

import ggml_library
import numpy as np
import pytest
from ggml_library import run

from athena_gguf.gguf_file.reader import GGUFFile


def test_tables_header_is_current() -> None:
    import make_tables_header

    text = make_tables_header.HEADER.read_text()
    assert text == make_tables_header.header_text(), "run tools/make_tables_header.py"


def test_quantize_fns(runtime: Path) -> None:
    said = run(runtime / "test-quantize-fns", "-v")
    for name in ("a2", "a3", "a4"):
        assert f"Testing {name}\n" in said and f"{name} dot product error:              ok" in said
    assert "FAILED" not in said


@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"])
def test_backend_ops(runtime: Path, operation: str) -> None:
    chosen = "type(_a|_src|_dst)?=a[234]"
    said = run(runtime / "test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", chosen)
    assert "FAIL" not in said
    for name in ("a2", "a3", "a4"):
        assert f"={name}," in said


def signal_to_noise(truth: np.ndarray, other: np.ndarray) -> float:
    """In dB."""
    return 10 * float(np.log10((truth**2).sum() / ((truth - other) ** 2).sum()))


def matrices(path: Path, type_name: str) -> dict[str, np.ndarray]:
    """The decoded tensors of a type by name; through NumPy, not ggml."""
    with GGUFFile(path) as opened:
        return {t.name: t.to_float32().copy() for t in opened if t.type_name == type_name}


@pytest.mark.parametrize("name, least", [("A2", 8.5), ("A3", 14.0), ("A4", 18.0)])
def test_llama_quantize(runtime: Path, tiny_base: Path, tmp_path: Path, name: str, least: float) -> None:
    """--pure makes tensors that NumPy decodes to nearly the base's values, and llama.cpp decodes them the same way.

    Rows of 128 columns, four steps, are short for a trellis: long ones reach about 2 dB more.
    """
    out, again = tmp_path / "out.gguf", tmp_path / "again.gguf"
    run(runtime / "llama-quantize", "--pure", tiny_base, out, name, 2)
    ours = matrices(out, name)
    assert ours
    with GGUFFile(tiny_base) as base:
        truth = {t.name: t.to_float32().copy() for t in base if t.name in ours}
    for tensor, values in ours.items():
        assert signal_to_noise(truth[tensor], values) > least, tensor
    # several threads cut the tensor into pieces: they must be whole rows
    run(runtime / "llama-quantize", "--pure", "--allow-requantize", out, again, "Q8_0", 3)
    for tensor, values in matrices(again, "Q8_0").items():
        assert signal_to_noise(ours[tensor], values) > 38, tensor


def test_tensor_type_option(runtime: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run(
        runtime / "llama-quantize",
        "--tensor-type",
        "ffn_down=a2",
        "--tensor-type",
        "attn_q=a4",
        tiny_base,
        out,
        "A3",
        2,
    )
    with GGUFFile(out) as opened:
        kinds = {t.name: t.type_name for t in opened}
    assert {v for k, v in kinds.items() if "ffn_down" in k} == {"A2"}
    assert {v for k, v in kinds.items() if "attn_q." in k} == {"A4"}
    assert {v for k, v in kinds.items() if "ffn_up" in k} == {"A3"}


def test_not_a_number_is_refused(runtime: Path, tiny_base: Path, tmp_path: Path) -> None:
    with GGUFFile(tiny_base) as opened:
        tensor = next(t for t in opened if "ffn_up" in t.name and t.type_name == "BF16")
        name, data = tensor.name, tensor.data.tobytes()
    broken = tmp_path / "broken.gguf"
    raw = tiny_base.read_bytes()
    at = raw.index(data)
    broken.write_bytes(raw[:at] + b"\xc0\x7f" + raw[at + 2 :])
    said = run(runtime / "llama-quantize", "--pure", broken, tmp_path / "out.gguf", "A3", 1, status=None)
    assert f"tensor '{name}' has invalid data" in said


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
def test_not_for_the_kv_cache(runtime: Path, tiny_base: Path, option: str) -> None:
    said = run(runtime / "llama-completion", "-m", tiny_base, option, "a3", "-p", "x", "-n", "1", status=None)
    assert "Unsupported cache type: a3" in said


def test_unused_type_ids(runtime: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    """The ids 43 .. 118 and those of removed types: a name, no size, no functions; files with them are refused."""
    program = tmp_path / "unused_types"
    raw = tiny_gguf.read_bytes()
    name = b"linear.weight"
    at = raw.index(name) + len(name) + 4 + 8 * 2  # number of dimensions, two dimensions, then the type
    files = {}
    for ident in (30, 4, 43, 50, 118, 119, 121, 123, 1000):
        files[ident] = tmp_path / f"{ident}.gguf"
        files[ident].write_bytes(raw[:at] + struct.pack("<I", ident) + raw[at + 4 :])
    ggml_library.link_ggml(program, runtime, ggml_library.C_TESTS / "unused_types.c")
    said = run(program, *files.values()).splitlines()
    unused = [line.split()[1:] for line in said if line.startswith("unused")]
    assert {int(u[0]) for u in unused} >= set(range(43, 119))
    assert all(u[-2:] == ["0", "0"] and u[1] not in ("", "(null)") for u in unused)
    accepted = {ident for ident, path in files.items() if f"accepted {path}" in said}
    # a size other than BF16's makes the offsets of the following tensors wrong, so no other type is accepted
    assert accepted == {30}
    assert any("of type 50 (UNUSED)" in line for line in said)


def test_activations_are_no_weights(runtime: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    """Q8_A64, 119, is refused in a file even where its size would do: no operation takes it as weights."""
    raw = tiny_gguf.read_bytes()
    name = b"experts.weight"  # the last one: no offsets after it
    at = raw.index(name) + len(name) + 4 + 8 * 3
    program = tmp_path / "unused_types"
    ggml_library.link_ggml(program, runtime, ggml_library.C_TESTS / "unused_types.c")
    for ident, expected in ((119, "refused"), (121, "accepted")):
        file = tmp_path / f"{ident}.gguf"
        file.write_bytes(raw[:at] + struct.pack("<I", ident) + raw[at + 4 :])
        assert f"{expected} {file}" in run(program, file).splitlines()
