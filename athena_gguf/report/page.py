"""The page of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from athena_gguf import __version__

if TYPE_CHECKING:
    from athena_gguf.report.comparison import Comparison
    from athena_gguf.report.plots import Picture

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left }
figure { margin: 2rem 0 } svg { max-width: 100%; height: auto } footer { color: #666; margin-top: 2rem }
"""


def comparison_page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    base, text = Path(comparison.base).name, Path(comparison.text).name
    windows = max(row.evaluation.windows for row in comparison.rows)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in comparison.headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) + "</tr>" for row in comparison.rows
    )
    doubt = f"<p>Note: {escape(comparison.doubt)}.</p>\n" if comparison.doubt else ""
    figures = "\n".join(f"<figure>{picture.svg()}</figure>" for picture in pictures)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Files against {escape(base)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Files against {escape(base)}</h1>
<p>KL divergence (KLD, mean over tokens with its standard error, in nats) of each file's predictions from those of
{escape(base)}, ratio of the perplexities, and how often the most probable token is the same: over {windows} windows of
512 tokens of {escape(text)}, the second half of each scored.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
{doubt}{figures}
<footer>athena-gguf {escape(__version__)}</footer>
</body>
</html>
"""
