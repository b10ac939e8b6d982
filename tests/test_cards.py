"""Cards worked on by processes of their own, here with the CPU as every card: the same numbers and files as from one
process, and an end as clean."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cards_there as there
import pytest
import tiny_model as tiny
import torch
from test_blockwise import linear

import athena_gguf.calibration.stage
import athena_gguf.cards.card
import athena_gguf.encode.card_queue as card_queue
import athena_gguf.encode.row_queue as row_queue
from athena_gguf.calibration import Lookup, blockwise, prefix, remote, remote_prefix
from athena_gguf.calibration.shelf import Shelf
from athena_gguf.calibration.stage import Stage
from athena_gguf.cards import Card, Cards, wire
from athena_gguf.cards.child import Here, set_share
from athena_gguf.conversion import convert
from athena_gguf.encode import EncodeOptions, EncodePool
from athena_gguf.errors import AthenaError
from athena_gguf.model.blocks import open_blocks
from athena_gguf.model.trust import running_code

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def importable():
    """This folder, for the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        yield


@pytest.fixture(scope="module")
def card(importable):
    with Cards(CPU, [CPU]) as cards:
        yield cards[0]


class Inline:
    """As a `Card`, without a process."""

    def __init__(self, device, gpu_memory=None):
        self.here = Here(device)

    def call(self, function, *args, **named):
        if function is remote._open:  # later: two threads of one process cannot open models at the same time
            self.model = args
            return True
        if function is remote._start:
            remote._open(self.here, *self.model)
        return function(self.here, *args, **named)

    def agree(self, device):
        pass

    end = close = lambda self: None


@pytest.fixture
def two_cards(monkeypatch):
    """Conversions see two devices, and run the model block by block."""
    monkeypatch.setattr(athena_gguf.calibration.stage, "all_of", lambda device: [device, device])
    monkeypatch.setattr(Stage, "_whole_bytes", lambda stage: 1 << 60)


def test_messages():
    sent = [
        torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        torch.tensor(1.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(300, 1000),
        {"path": Path("/a"), "slice": slice(1, None), "types": (torch.int8, None)},
    ]
    file = io.BytesIO()
    for number in (7, 8):
        wire.write(file, number, wire.packed(sent, share=True))
    file.seek(0)
    for number in (7, 8):
        found, parts = wire.read(file)
        *tensors, rest = wire.unpacked(parts)
        assert found == number and rest == sent[-1]
        for one, other in zip(tensors, sent[:-1], strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    with pytest.raises(EOFError):
        wire.read(file)


def test_calls(card):
    assert card.call(there.add, torch.ones(3), torch.ones(3), more=1).tolist() == [3, 3, 3]
    with ThreadPoolExecutor(4) as threads:  # beside each other
        assert list(threads.map(lambda _: card.call(there.meet), range(4))) == [card.process.pid] * 4
    assert card.call(there.code) is False
    with running_code(True), Cards(CPU, [CPU]) as cards:
        assert cards[0].call(there.code) is True


@pytest.mark.parametrize(
    ("kind", "raised", "text"),
    [
        ("athena", AthenaError, "too odd"),
        ("memory", AthenaError, "cpu: its memory is too small: too odd; close"),
        ("key", KeyError, "too odd"),
        ("odd", RuntimeError, "Odd: this"),
        ("end", RuntimeError, "SystemExit: too odd"),  # and does not end this process
    ],
)
def test_errors_come_back(kind, raised, text, card):
    with pytest.raises(raised) as found:
        card.call(there.raises, kind)
    assert text in str(found.value)
    assert "in raises" in str(found.value.__cause__)
    assert card.call(there.add, 1, 2) == 3


@pytest.mark.parametrize(("look", "why"), [("refuse", "peer access is not supported"), ("misread", "other numbers")])
def test_data_by_way_of_the_host(look, why, card, monkeypatch, capsys):
    """Where one process cannot look at the other's tensors on GPUs, neither has to, and calls go on."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))  # of the first GPU
    with monkeypatch.context() as patch:
        patch.setattr(athena_gguf.cards.card, "look", getattr(there, look))
        card.agree(torch.device("cuda"))
    said = capsys.readouterr().err
    assert f"by way of the host's memory: {why}" in said and "between" not in said
    assert card.share is False and card.call(there.shares) is False
    card.agree(torch.device("cuda"))
    assert card.share is True and card.call(there.shares) is True and not capsys.readouterr().err
    card.share = False
    card.call(set_share, False)


def test_memory_of_the_first_device_is_named():
    """As that of the others is."""

    def encode(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    place = card_queue._Local(SimpleNamespace(device=CPU, encode=encode), None)
    with pytest.raises(AthenaError, match=r"cpu: .* too small: tried .*--gpu-memory.*CUDA_VISIBLE_DEVICES"):
        place.encode(None, None, ["a"])


def test_killed_process():
    with Cards(CPU, [CPU]) as cards:
        with pytest.raises(AthenaError, match=r"cpu: .* \(killed by SIGKILL.*--work-dir"):
            cards[0].call(there.die)
        with pytest.raises(AthenaError, match="killed by SIGKILL"):
            cards[0].call(there.add, 1, 2)


def test_code_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    """It may be that of a model."""
    (tmp_path / "transformers.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(there.__file__).parent))
    with Cards(CPU, [CPU]) as cards:
        assert cards[0].call(there.add, 1, 2) == 3


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process cannot be stopped here")
def test_process_that_does_not_read_is_ended(monkeypatch):
    monkeypatch.setattr(athena_gguf.cards.card, "_SECONDS", 0.5)
    card = Card(CPU)
    assert card.call(there.add, 1, 2) == 3
    os.kill(card.process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(card.call, there.add, torch.zeros(1 << 22))  # more than a pipe holds
        time.sleep(0.2)
        card.close()
        with pytest.raises(AthenaError, match="the work on it has ended"):
            call.result(60)
    assert card.process.returncode == -signal.SIGKILL


def test_process_ends_with_its_parent():
    """Killed, so that nobody closes anything."""
    script = (
        "import torch, cards_there, threading\n"
        "from athena_gguf.cards import Card\n"
        "card = Card(torch.device('cpu'))\n"
        "print(card.call(cards_there.sleep, 0), flush=True)\n"
        "card.call(cards_there.sleep, 600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # whoever inherits it may not look after it


@pytest.mark.parametrize(
    ("family", "config"),
    [("Llama", {}), ("GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2})],
)
def test_curvatures_are_those_of_one_process(family, config, card, tmp_path):
    folder = tiny.make(tmp_path / "model", family, **config)
    windows = torch.randint(0, 300, (5, 32), generator=torch.Generator().manual_seed(0))
    shares = windows.tensor_split(2)
    found = []
    for name, process in (("here", None), ("there", card)):
        model = open_blocks(folder, CPU, torch.float32)
        first = blockwise.LocalPart(model, Shelf(CPU, 20_000, 40_000, tmp_path / f"{name}0"), shares[0], 2)
        place = tmp_path / f"{name}1"
        if process is None:
            copy = open_blocks(folder, CPU, torch.float32)
            other = blockwise.LocalPart(copy, Shelf(CPU, 20_000, 40_000, place), shares[1], 2)
        else:
            assert remote.open_there(card, folder, torch.float32, 0)
            other = remote.RemotePart(card, shares[1], 2, 20_000, 40_000, place)
        passes = blockwise.Passes(first, windows.numel(), others=[other])
        passes.forward()
        lookup = Lookup()
        found.append((list(passes.backward(linear(model.model), lookup)), lookup))
        passes.close()
        assert place.exists()  # the share was put away there
    other.close()
    assert not place.exists()
    (here, one), (processes, two) = found
    assert one.power == two.power and len(here) == len(processes) > 4
    for a, b in zip(here, processes, strict=True):
        assert a.about == b.about and torch.equal(a.matrix, b.matrix)


@pytest.mark.usefixtures("two_cards", "short_windows")
@pytest.mark.parametrize("sequential", [False, True])
def test_same_file(sequential, tiny_model, options, tmp_path, monkeypatch):
    files = tmp_path / "one.gguf", tmp_path / "two.gguf"
    settings = options(host_memory="1KiB", sequential=sequential)
    called, call = [], Card.call
    monkeypatch.setattr(Card, "call", lambda *of, **named: called.append(of[1]) or call(*of, **named))
    convert(tiny_model, files[1], settings)
    # Whole inputs go to the one or the other, of those in order some rows of each of 8.
    assert called.count(row_queue._encode) == 8 if sequential else 0 < called.count(card_queue._encode) < 8
    monkeypatch.setattr(athena_gguf.cards.card, "Card", Inline)
    convert(tiny_model, files[0], settings)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.usefixtures("two_cards", "short_windows")
def test_in_order_as_on_one_device(tiny_model, options, tmp_path, monkeypatch):
    """Sums over two shares of the windows, of odd size, are those over all, but for their last bits: whatever is asked
    of all parts is done by both."""
    wanted, real = [], prefix.targets

    def disturbed(weights, *of):
        """Encoded is the same in both conversions, whatever the last bits are."""
        wanted.append(real(weights, *of))
        generator = torch.Generator().manual_seed(len(wanted) % 8)
        noise = (0.1 * w.std() * torch.randn(w.shape, generator=generator) for w in weights)
        return torch.eye(weights[0].shape[1]), [w + n for w, n in zip(weights, noise, strict=True)]

    monkeypatch.setattr(prefix, "targets", disturbed)
    settings = options(host_memory="1KiB", calibration_tokens=6 * 64)
    convert(tiny_model, tmp_path / "two.gguf", settings)
    monkeypatch.setattr(athena_gguf.calibration.stage, "all_of", lambda device: [device])
    convert(tiny_model, tmp_path / "one.gguf", settings)
    assert len(wanted) == 16
    for (h, two), (same, one) in zip(wanted[:8], wanted[8:], strict=True):
        for a, b in zip((h, *two), (same, *one), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.std()))


def test_fewer_rows_than_devices(card):
    weights = {
        name: torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)) for name, rows in (("a", 1), ("b", 9))
    }
    kinds = dict.fromkeys(weights, "A3")
    with EncodePool(EncodeOptions(), 1) as pool:
        alone, both = (row_queue.RowEncoders(pool, CPU, cards) for cards in ([], [card, card]))
        with alone, both:
            for some in (weights, {"b": weights["b"]}):
                expected = dict(alone.encode(torch.eye(64), some, kinds))
                for name, found in both.encode(torch.eye(64), some, kinds):
                    assert found.data.tobytes() == expected[name].data.tobytes()
                    assert found.loss == pytest.approx(expected[name].loss)


@pytest.mark.usefixtures("two_cards")
def test_no_process_for_what_is_no_model(tiny_model, tiny_base, options, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(athena_gguf.cards.card, "Card", never)
    out, model = tmp_path / "out.gguf", shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for wrong, said in (tmp_path / "absent", "no such folder"), (model, "truncated"), (tiny_base, "leave --base out"):
        with pytest.raises(AthenaError, match=said):
            convert(wrong, out, options())
    with pytest.raises(AssertionError, match="a process was started"):
        convert(tiny_model, out, options())


@pytest.mark.usefixtures("two_cards", "short_windows")
def test_cards_without_windows_encode_only(tiny_model, options, tmp_path, monkeypatch):
    """Of three devices and two windows."""
    called = []

    class Noted(Inline):
        def __init__(self, *of):
            super().__init__(*of)
            self.functions = []
            called.append(self.functions)

        def call(self, function, *args, **named):
            self.functions.append(function)
            return super().call(function, *args, **named)

    monkeypatch.setattr(athena_gguf.calibration.stage, "all_of", lambda device: [device] * 3)
    monkeypatch.setattr(athena_gguf.cards.card, "Card", Noted)
    convert(tiny_model, tmp_path / "out.gguf", options(calibration_tokens=128, host_memory="1KiB", sequential=False))
    one, two = ({function.__module__ for function in functions} for functions in called)
    assert one == {remote.__name__, card_queue.__name__} and two == {card_queue.__name__}
    assert card_queue._encode in called[1]


@pytest.mark.usefixtures("two_cards", "short_windows")
@pytest.mark.parametrize(
    ("sequential", "function", "step"),
    [
        (False, remote._summed, "backward"),
        (False, card_queue._encode, None),
        (True, remote_prefix._step, "moments"),
        (True, row_queue._encode, None),
    ],
    ids=["curvature", "encoding", "in order, inputs", "in order, encoding"],
)
def test_conversion_with_a_killed_process(sequential, function, step, tiny_model, options, tmp_path, monkeypatch):
    """It ends with an error, and the same command goes on from there."""
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    settings = {"host_memory": "1KiB", "sequential": sequential}
    count, call = [], Card.call

    def killed_at_second(card, called, *of, **named):
        if called is function and step in (None, *of[:1]):
            count.append(of)
            if len(count) == 2:
                os.kill(card.process.pid, signal.SIGKILL)
        return call(card, called, *of, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Card, "call", killed_at_second)
        with pytest.raises(AthenaError, match="killed by SIGKILL"):
            convert(tiny_model, out, options(work_dir=work, **settings))
    assert len(count) >= 2 and not out.exists() and not list(work.glob("shelf*"))
    monkeypatch.setattr(athena_gguf.cards.card, "Card", Inline)
    convert(tiny_model, out, options(work_dir=work, **settings))
    convert(tiny_model, tmp_path / "whole.gguf", options(**settings))
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.usefixtures("two_cards", "short_windows")
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_an_error_here_ends_the_others(step, tiny_model, options, tmp_path, monkeypatch):
    """What they would still write to the work directory does not stay there."""
    work, cards = tmp_path / "work", []

    class Noted(Card):
        def __init__(self, *of):
            super().__init__(*of)
            cards.append(self)

    def fail(part, *more):
        raise AthenaError("the first device is gone")

    monkeypatch.setattr(athena_gguf.cards.card, "Card", Noted)
    monkeypatch.setattr(blockwise.LocalPart, step, fail)
    with pytest.raises(AthenaError, match="the first device is gone"):
        convert(tiny_model, tmp_path / "out.gguf", options(work_dir=work, host_memory="1KiB"))
    assert [card.process.poll() for card in cards] == [0] and not list(work.glob("shelf*"))
