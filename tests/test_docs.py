"""docs/format.md says what the code does: its tables, and its worked examples decoded from the bytes as printed."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import typer
import update_format_doc
from make_golden import decode_plainly

from athena_gguf.cli import app
from athena_gguf.format import FORMAT_VERSION, TYPES, decode_rows, decode_scale

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
KINDS = list(TYPES.values())
UPDATE = "docs/format.md is not current: run python tools/update_format_doc.py"


def field(pattern: str) -> list[str]:
    found = re.findall(pattern, TEXT, flags=re.M)
    assert found, f"docs/format.md has no line like {pattern}"
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_tables_are_those_of_the_code(kind):
    for n, table in ((1, kind.table1), (2, kind.table2)):
        (printed,) = field(rf"^{kind.name} T{n} = \[([\d, ]+)\]$")
        assert [int(x) for x in printed.split(",")] == table.tolist(), UPDATE


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_worked_examples_decode_to_the_printed_values(kind):
    (printed,) = field(rf"^{kind.name} bytes = ([0-9a-f ]+)$")
    (scale,) = field(rf"^{kind.name} scale = ([\d.e-]+)$")
    levels = np.array([int(x) for line in field(rf"^{kind.name} levels = (.+)$") for x in line.split()])
    data = bytes.fromhex(printed)
    row = np.frombuffer(data, np.uint8)
    weights = np.float32(scale) * levels.astype(np.float32)
    np.testing.assert_array_equal(decode_rows(kind, row[None], levels.size)[0], weights, err_msg=UPDATE)
    np.testing.assert_array_equal(decode_plainly(kind, data, levels.size), weights, err_msg=UPDATE)
    for column, level, weight in field(rf"^{kind.name} lane .*column (\d+): .* = (-?\d+), weight (\S+)$"):
        assert (levels[int(column)], weights[int(column)]) == (int(level), float(weight))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_numbers_of_the_types(kind):
    assert f"| {kind.name} | {kind.ggml_type} | {kind.file_type} |" in TEXT
    row = rf"\| {kind.name} \| {kind.bits} \| {kind.group_bytes} \| {kind.bits_per_weight} \|.*"
    assert re.search(row + rf"\| {kind.delay} \| {kind.states} \|", TEXT)


def test_scale_range_and_version():
    low, high = decode_scale(np.array([0, 255], np.uint8))
    assert "b = 0 is 2^-19, b = 255 is 0.12109375" in TEXT and (low, high) == (2.0**-19, 0.12109375)
    assert f"Format version {FORMAT_VERSION}," in TEXT


def test_generated_parts_are_current():
    assert update_format_doc.updated(TEXT) == TEXT, UPDATE


def test_links_between_documents_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def options_of(words: list[str]) -> set[str]:
    """The options of a command such as ["runtime", "build"]; fails if there is no such command."""
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_the_readme_names_commands_and_options_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `athena-gguf ([a-z]+(?: [a-z]+)*)(.*)$", text, flags=re.M)
    assert {words.split()[0] for words, _ in rows} == set(typer.main.get_command(app).commands)
    for words, rest in rows:
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest)) <= options_of(words.split()), words


def commands_in(text: str) -> list[list[str]]:
    """The words of every indented or quoted `athena-gguf` command, continued lines joined."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"^ {4}athena-gguf (.+?)(?: #.*)?$", text, flags=re.M) + re.findall(
        r"`athena-gguf ([^`]+)`", text
    )
    return [re.split(r"\s+", line.strip()) for line in found]


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_documents_name_commands_and_options_that_exist(name):
    for words in commands_in((ROOT / "docs" / name).read_text(encoding="utf-8")):
        if words[0].startswith("-"):
            assert words[0] in ("--install-completion", "--show-completion", "--help", "--version"), words
            continue
        command = words[: 2 if words[0] == "runtime" else 1]
        options = {w for w in words if re.fullmatch(r"--?[a-z][a-z-]*", w)}
        assert options <= options_of(command), words


def test_the_quickstart_says_how_it_is_used():
    script = ROOT / "scripts" / "quickstart"
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "scripts/quickstart [PROMPT]" in done.stdout
    done = subprocess.run([script, "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "--fast" in done.stderr


def test_the_quickstart_uses_commands_and_options_that_exist():
    text = (ROOT / "scripts" / "quickstart").read_text(encoding="utf-8")
    calls = re.findall(r"athena-gguf ([a-z]+(?: (?:build|path))?)\b(.*)$", text, flags=re.M)
    assert {words for words, _ in calls} >= {"runtime build", "base", "convert", "run"}
    for words, rest in calls:
        options = {word for word in re.split(r"[\s)\"]+", rest) if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        if words != "runtime path":  # what follows there belongs to llama-bench
            assert options <= options_of(words.split()), words
