"""The curvature that begins while the base file is made, as on a GPU (here on the CPU): the same file, and errors as
from one after the other."""

import json
import shutil
from contextlib import contextmanager
from functools import partial
from threading import Event

import gguf
import numpy as np
import pytest
from test_convert import refused

import athena_gguf.gguf_file
import athena_gguf.model.blocks
from athena_gguf import conversion
from athena_gguf.calibration.blockwise import Passes
from athena_gguf.calibration.stage import Stage
from athena_gguf.conversion import convert
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile
from athena_gguf.model.trust import runs_code

pytestmark = pytest.mark.usefixtures("short_windows")


@pytest.fixture
def beside(options, tiny_base, monkeypatch):
    """Options of a conversion that begins early; it makes its base file, in no time."""
    monkeypatch.setattr(conversion, "BESIDE", ("cpu",))
    make_base(monkeypatch, tiny_base)
    return partial(options, base=None, host_memory="64GiB")


@pytest.fixture
def by_blocks(monkeypatch):
    """As where the model does not fit whole, but its activations do."""
    monkeypatch.setattr(Stage, "_whole_bytes", lambda stage: 1 << 40)


@pytest.fixture
def forward(monkeypatch):
    """Set when a forward pass begins, and when it has ended well."""
    begun, done = Event(), Event()
    run = Passes.forward

    def noted(passes):
        begun.set()
        run(passes)
        done.set()

    monkeypatch.setattr(Passes, "forward", noted)
    return begun, done


def make_base(monkeypatch, made, before_end=lambda: None):
    """The base file `made` is complete only after `before_end` has returned."""

    @contextmanager
    def writing_base(model_dir, path, sync):
        with GGUFFile(made) as header:
            yield header
        before_end()
        shutil.copy(made, path)

    monkeypatch.setattr(athena_gguf.gguf_file, "writing_base", writing_base)


@pytest.mark.usefixtures("by_blocks")
@pytest.mark.parametrize("changes", [{}, {"bpw": 4.0}, {"calibration": ("self",), "calibration_tokens": 128}])
def test_same_file(changes, tiny_model, tiny_base, options, beside, forward, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BESIDE", ())
    convert(tiny_model, tmp_path / "plain.gguf", options(host_memory="64GiB", **changes))
    monkeypatch.setattr(conversion, "BESIDE", ("cpu",))
    forward[1].clear()
    waited = []
    make_base(monkeypatch, tiny_base, lambda: waited.append(forward[1].wait(60)))
    result = convert(tiny_model, tmp_path / "beside.gguf", beside(work_dir=tmp_path / "work", **changes))
    assert waited == [True]  # the pass had ended before the base file was complete
    assert (tmp_path / "beside.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert result.beside["curvature"] > 0 and result.spans["curvature"][0] < result.spans["base file"][1]
    again = tmp_path / "again.gguf"
    convert(tiny_model, again, beside(work_dir=tmp_path / "work", **changes))
    assert again.read_bytes() == (tmp_path / "plain.gguf").read_bytes() and waited == [True]


def test_files_wait_for_the_base_file(tiny_model, tiny_base, options, beside, forward, tmp_path, monkeypatch):
    """They would take room that it was promised."""
    convert(tiny_model, tmp_path / "plain.gguf", options(host_memory="1KiB"))
    forward[0].clear(), forward[1].clear()
    work, seen = tmp_path / "work", []

    def look():
        seen.append(forward[0].wait(60))
        seen.append(forward[1].wait(0.5))
        seen.append((work / "shelf0").exists())

    make_base(monkeypatch, tiny_base, look)
    convert(tiny_model, tmp_path / "beside.gguf", beside(host_memory="1KiB", work_dir=work))
    assert seen == [True, False, False] and forward[1].is_set()
    assert (tmp_path / "beside.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.usefixtures("by_blocks")
def test_base_file_that_fails_in_the_end(tiny_model, tiny_base, beside, forward, tmp_path, monkeypatch):
    """Nothing goes on, be it in the forward pass, waiting for the disk, or while the model writes text."""

    def fail():
        forward[0].wait(60)
        raise AthenaError("the disk is gone")

    make_base(monkeypatch, tiny_base, fail)
    refused(tiny_model, tmp_path / "out.gguf", beside(), "the disk is gone")
    forward[0].clear(), forward[1].clear()
    refused(tiny_model, tmp_path / "out.gguf", beside(host_memory="1KiB"), "the disk is gone")
    assert forward[0].is_set() and not forward[1].is_set()
    forward[0].set()
    many = {"calibration": ("self",), "calibration_tokens": 1 << 20}
    refused(tiny_model, tmp_path / "out.gguf", beside(**many), "the disk is gone")


def test_model_that_the_converter_refuses(tiny_model, options, runtime, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the model was refused")

    monkeypatch.setattr(conversion, "BESIDE", ("cpu",))
    monkeypatch.setattr(Stage, "begin", never)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsForCausalLM"]}))
    refused(model, tmp_path / "out.gguf", options(base=None), "NobodyKnowsForCausalLM is not supported")


@pytest.mark.usefixtures("by_blocks")
def test_errors_come_in_the_same_order(tiny_model, tiny_base, text, beside, tmp_path):
    """Of two, the one that comes first where nothing is done beside the base file: its own before the text's."""
    out, short = tmp_path / "out.gguf", tmp_path / "short.txt"
    short.write_text("the sea")
    refused(tiny_model, out, beside(calibration=(str(short),)), r"short\.txt.*shorter")
    (tmp_path / "base").mkdir()
    base = shutil.copy(tiny_base, tmp_path / "base" / "base.gguf")
    reader = gguf.GGUFReader(base, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.view(np.uint16)[7, 9] = 0x7FC0
    reader.data.flush()
    for chosen in (str(short), str(text)):
        refused(tiny_model, out, beside(base=base, calibration=(chosen,)), r"blk\.1\.ffn_up\.weight holds NaN or Inf")
    tensor.data.view(np.uint16)[:] = 0x3F80
    reader.data.flush()
    refused(tiny_model, out, beside(base=base), r"blk\.1\.ffn_up\.weight holds other weights")


@pytest.mark.usefixtures("by_blocks")
def test_a_model_that_cannot_be_opened(tiny_model, beside, tmp_path, monkeypatch):
    def fail(*_):
        raise AthenaError("no such weights")

    monkeypatch.setattr(athena_gguf.model.blocks, "open_blocks", fail)
    refused(tiny_model, tmp_path / "out.gguf", beside(), "no such weights")


def test_what_the_user_allowed_is_known(tiny_model, beside, tmp_path, monkeypatch):
    allowed, windows = [], Stage.windows

    def noted(*arguments):
        allowed.append(runs_code())
        return windows(*arguments)

    monkeypatch.setattr(Stage, "windows", noted)
    for code in (True, False):
        convert(tiny_model, tmp_path / "out.gguf", beside(trust_remote_code=code))
    assert allowed == [True, False]
