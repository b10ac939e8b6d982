"""`compare` and the model card: numbers against `eval`'s and the files', pictures and pages that stand alone."""

import json
import re
import shutil
from dataclasses import fields
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import athena_gguf
from athena_gguf import cli
from athena_gguf.conversion import convert
from athena_gguf.errors import AthenaError
from athena_gguf.gguf_file import GGUFFile, Replacement, quantize, write_quantized
from athena_gguf.report import page, plots
from athena_gguf.report.comparison import Comparison, Row
from athena_gguf.report.evaluate import Evaluation, evaluate
from athena_gguf.report.speed import Speed

pytestmark = pytest.mark.usefixtures("short_windows")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """The small model's linear layers in two standard types."""
    folder = tmp_path_factory.mktemp("files")
    with GGUFFile(tiny_base) as base:
        for kind, number in (("Q4_0", 2), ("Q8_0", 7)):

            def change(name, kind=kind):
                return Replacement(kind, lambda: quantize(base.tensors[name].to_float32(), kind))

            names = [t.name for t in base if t.name.startswith("blk.") and len(t.shape) == 2]
            write_quantized(tiny_base, folder / f"{kind}.gguf", {n: change(n) for n in names}, {}, file_type=number)
    return [folder / "Q4_0.gguf", folder / "Q8_0.gguf"]


class Resources(HTMLParser):
    """What a page asks for elsewhere, and the cells of its table."""

    def __init__(self):
        super().__init__()
        self.asked, self.cells, self.open = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.open = tag
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data") and not value.startswith("#"):
                self.asked.append(value)

    def handle_data(self, data):
        if self.open in ("td", "th") and data.strip():
            self.cells.append(data)


def test_compare(runtime, tiny_base, files, text, tmp_path):
    pytest.importorskip("matplotlib")
    report = tmp_path / "new" / "report"
    arguments = ["compare", *files, "--base", tiny_base, "--text", text, "--windows", "2", "--threads", "2"]
    arguments += ["--speed", "--report", report, "--json"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((report / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["Q4_0", "Q8_0"]
    alone = evaluate(files[0], tiny_base, text, windows=2, threads=2)
    first, second = (row["evaluation"] for row in found["rows"])
    assert first["kld"] == pytest.approx(alone.kld, abs=1e-6) and first["kld"] > 10 * second["kld"]
    assert [row["evaluation"]["bytes"] for row in found["rows"]] == [f.stat().st_size for f in files]
    assert all(row["speed"]["prompt"] > 0 and row["speed"]["generation"] > 0 for row in found["rows"])
    for name in ("kld.png", "speed.png"):
        assert (report / name).read_bytes().startswith(PNG)
    page = (report / "index.html").read_text()
    parsed = Resources()
    parsed.feed(page)
    assert parsed.asked == [] and "url(" not in re.sub(r"url\(#", "", page) and "@import" not in page
    assert page.count("<svg") == page.count("</svg>") == 2
    assert f"{first['kld']:.4f} ± {first['kld_error']:.4f}" in parsed.cells and "tokens/s" in parsed.cells


@pytest.mark.parametrize("largest", [0.28, 8.0])
def test_labels_are_inside_and_ticks_are_decimals(largest):
    pytest.importorskip("matplotlib")
    names = ["SmolLM2-135M-Instruct-A3", "SmolLM2-135M-Instruct-A2-with-a-name-that-is-longer-than-half-of-a-picture"]
    points = list(zip(names, (70.1, 57.4), (0.21, largest), strict=True))
    figure = plots.Picture("kld", "KL divergence and size", points, "KL divergence, nats a token", True)._figure()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    inside = axes.get_window_extent()
    for label in axes.texts:
        box = label.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    low, high = axes.get_ylim()
    shown = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert len(shown) > 2 and all(re.fullmatch(r"\d+(\.\d+)?", text) for text in shown), shown


def test_unsteady_speeds_are_named():
    found = Evaluation(*(1 for _ in fields(Evaluation)))
    rows = [Row(n, f"{n}.gguf", found, Speed(100.0, 20.0, 3.0, d)) for n, d in (("calm", 1.5), ("wild", 2.5))]
    for count, noted in ((1, False), (2, True)):
        comparison = Comparison("base.gguf", "text.txt", tuple(rows[:count]))
        for said in (comparison.table(), page.comparison_page(comparison, [])):
            assert "100.0 ± 3.0" in said and "20.0 ± 1.5" in said
            assert ("runs of wild differed in speed by more than 10%" in said) == noted


def test_compare_table(runtime, tiny_base, files, text):
    arguments = ["compare", *files, "--base", tiny_base, "--text", text, "--windows", "1", "--threads", "2"]
    lines = CliRunner().invoke(cli.app, list(map(str, arguments))).stdout.splitlines()
    assert lines[0].split()[:2] == ["file", "MiB"] and [line.split()[0] for line in lines[1:]] == ["Q4_0", "Q8_0"]


def test_swapped_files_are_noticed(runtime, tiny_base, files, text, capfd):
    evaluate(tiny_base, files[0], text, windows=1, threads=2)
    assert "are they swapped?" in capfd.readouterr().err
    evaluate(files[0], tiny_base, text, windows=1, threads=2)
    assert "swapped" not in capfd.readouterr().err


def test_a_missing_file_is_said_before_the_others_are_measured(tiny_base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("athena_gguf.report.comparison.evaluate", None)
    with pytest.raises(AthenaError, match=r"none\.gguf: No such file"):
        athena_gguf.compare([tiny_base, tmp_path / "none.gguf"], tiny_base, text)


def test_model_card(tiny_model, tiny_base, runtime, text, tmp_path):
    """Two conversions, one card; licence and language are the model's own."""
    pytest.importorskip("matplotlib")
    model, card = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "card"
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- other\n---\nA model.\n")
    settings = {"calibration": str(text), "calibration_tokens": 512, "base": tiny_base, "device": "cpu"}
    results = {
        kind: athena_gguf.convert(
            model, tmp_path / f"{kind}.gguf", type=kind, report=card, report_text=text, **settings
        )
        for kind in ("A3", "A2")
    }
    read = ModelCard.load(card / "README.md")
    data = read.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"] and data["library_name"] == "gguf"
    assert {"gguf", "athena-gguf"} <= set(data["tags"]) and "other" not in data["tags"] and "base_model" not in data
    rows = [line.split(" | ") for line in read.text.splitlines() if re.match(r"\| A\d\.gguf", line)]
    assert [row[0] for row in rows] == ["| A2.gguf", "| A3.gguf"]  # by size
    for row, kind in zip(rows, ("A2", "A3"), strict=True):
        measured = evaluate(tmp_path / f"{kind}.gguf", tiny_base, text, windows=20)
        assert row[1:4] == [
            f"{results[kind].bytes / 2**20:.1f}",
            f"{results[kind].bpw:.3f}",
            f"{measured.kld:.4f} ± {measured.kld_error:.4f}",
        ]
        assert (card / f"losses-{kind}.png").read_bytes().startswith(PNG)
    assert "| calibration_tokens | 512 | 512 |" in read.text and "athena-gguf run A2.gguf" in read.text
    assert "pip install .\n" in read.text and "install athena-gguf" not in read.text  # no package index has it
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", read.text):
        assert (card / target).read_bytes().startswith(PNG)
    assert {e["file"] for e in json.loads((card / "files.json").read_text())} == {"A2.gguf", "A3.gguf"}


def test_card_is_refused_before_any_work(tiny_model, options, text, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    with pytest.raises(AthenaError, match="--report-text is for the model card"):
        convert(tiny_model, out, options(report_text=text))
    with pytest.raises(AthenaError, match=r"--report-text .*absent: no such file"):
        convert(tiny_model, out, options(report=tmp_path / "card", report_text=tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(AthenaError, match="is no folder"):
        convert(tiny_model, out, options(report=tmp_path / "file"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(AthenaError, match=r"pip install 'athena-gguf\[plots\]'"):
        convert(tiny_model, out, options(report=tmp_path / "card"))
    assert not out.exists() and not (tmp_path / "card").exists()
