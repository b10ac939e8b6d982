"""Files against their base on several texts and in their answers; control tokens in texts."""

import struct

import bench_domains
import numpy as np
import pytest
import tiny_model
from ggml_library import run

from athena_gguf.gguf_file import GGUFFile

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


@pytest.fixture(scope="module")
def report(runtime, tiny_base, tmp_path_factory):
    """The lines that are printed, and the work folder."""
    folder = tmp_path_factory.mktemp("domains")
    run(runtime / "llama-quantize", "--pure", tiny_base, folder / "small.gguf", "Q4_0", 1)
    (folder / "plain").write_text(tiny_model.words(1200))
    (folder / "chat").write_text(" </s> ".join(tiny_model.words(30, seed) for seed in range(40)))
    files = [tiny_base, folder / "small.gguf"]
    options = ["--text", f"plain={folder / 'plain'}", "--text", f"chat={folder / 'chat'}", "--windows", "2"]
    options += ["--tokens", "6", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sys.argv", ["bench", *map(str, [tiny_base, folder / "work", *files]), *options])
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(" ".join(map(str, words)).splitlines()))
        bench_domains.main()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines], folder / "work"


def test_a_file_against_itself_and_a_smaller_one(report, tiny_base):
    lines, _ = report
    rows = {(line[0], line[2]): line for line in lines if len(line) == 7}
    for text in ("plain", "chat"):
        same, small = rows[tiny_base.stem, text], rows["small", text]
        assert same[4].startswith("0.0000") or same[4].startswith("-0.0000")
        assert float(same[5]) == pytest.approx(1, abs=1e-3) and float(same[6]) > 0.99
        assert float(small[4].split()[0]) > 1e-4 > abs(float(same[4].split()[0]))
    answers = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert answers[tiny_base.stem][0] == "20" and 0 < float(answers[tiny_base.stem][1]) <= 6
    assert float(answers["small"][1]) <= float(answers[tiny_base.stem][1])


def test_control_tokens_are_read_as_tokens_only_where_a_text_has_them(report):
    _, work = report
    for name, expected in (("plain", False), ("chat", True)):
        with open(work / f"logits-{name}", "rb") as handle:
            assert handle.read(8) == b"_logits_"
            length, _, windows = struct.unpack("<3I", handle.read(12))
            tokens = np.frombuffer(handle.read(4 * length * windows), "<i4")
        assert ((tokens == 2).sum() > 10) == expected  # </s>


def test_the_copy_with_renamed_control_tokens_differs_in_nothing_else(report, tiny_base):
    _, work = report
    with GGUFFile(tiny_base) as base, GGUFFile(next(work.glob("base-for-chat-*.gguf"))) as copy:
        changed = {key for key in base.fields if base.fields[key].value != copy.fields[key].value}
        assert changed == {TOKENS, TYPES} and base.fields.keys() == copy.fields.keys()
        old, new = (np.array(f.fields[TYPES].value) for f in (base, copy))
        np.testing.assert_array_equal(np.where(old == 3, 4, old), new)
        names = base.fields[TOKENS].value
        expected = ["\1" + name[1:] if kind == 3 else name for name, kind in zip(names, old, strict=True)]
        assert copy.fields[TOKENS].value == expected
        for name, tensor in base.tensors.items():
            np.testing.assert_array_equal(tensor.data, copy.tensors[name].data)


@pytest.mark.parametrize("a,b,count", [([], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [3, 2], 0)])
def test_tokens_before_the_first_that_differs(a, b, count):
    assert bench_domains.shared(a, b) == count == bench_domains.shared(b, a)
