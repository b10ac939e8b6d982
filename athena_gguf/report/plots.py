"""Pictures of sizes, divergences, speeds and losses, through matplotlib (the extra `plots`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from athena_gguf.errors import AthenaError
from athena_gguf.plan import block_of

_DOTS = 150  # an inch
_LABEL = 44  # characters of a line of a label: half a picture
_NARROW = 5.0  # a smaller ratio of values gets ticks at even distances


def require() -> None:
    """Raise AthenaError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AthenaError("pictures need matplotlib: pip install 'athena-gguf[plots]'") from None


@dataclass(frozen=True)
class Picture:
    """Points (name, MiB, value) with sizes along and values up, logarithmically if `log`. `value_label`: what they
    are, with their unit."""

    name: str
    title: str
    points: Sequence[tuple[str, float, float]]
    value_label: str
    log: bool

    def write_png(self, path: Path) -> None:
        self._figure().savefig(path, format="png", dpi=_DOTS)

    def svg(self) -> str:
        """An `svg` element for an HTML page."""
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": self.name}):  # the same ids every time
            out = io.StringIO()
            self._figure().savefig(
                out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
            )
        return out.getvalue()[out.getvalue().index("<svg") :]

    def _figure(self) -> Any:
        from matplotlib.figure import Figure  # no window system, and nothing global

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots()
        shown = [(n, x, y) for n, x, y in self.points if np.isfinite(y) and (y > 0 or not self.log)]
        axes.scatter([x for _, x, _ in shown], [y for _, _, y in shown], zorder=3)
        if self.log and shown:
            _log_axis(axes, [y for _, _, y in shown])
        axes.set(title=self.title, xlabel="size of the file, MiB", ylabel=self.value_label)
        axes.margins(x=0.15, y=0.1)
        middle = np.mean(axes.get_xlim())
        for name, x, y in shown:  # towards the middle, where there is room
            side, shift = ("left", 5) if x <= middle else ("right", -5)
            text = fill(name, _LABEL)
            axes.annotate(text, (x, y), xytext=(shift, 4), textcoords="offset points", fontsize=8, ha=side)
        axes.grid(which="both", alpha=0.3)
        return figure


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Plain decimals, as many as are of use for a wide range and for a narrow one, which may hold no power of ten."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    narrow = max(values) < _NARROW * min(values)
    axes.yaxis.set_major_locator(AutoLocator() if narrow else LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: np.format_float_positional(float(f"{v:.6g}"), trim="-")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def write_loss_picture(path: Path, title: str, losses: Mapping[str, float], types: Mapping[str, str]) -> None:
    """A PNG of the losses of encoded tensors (shares of their power under the curvature), blocks down and kinds of
    tensors across; what belongs to no block in a row of its own. Cells name the type where there are several."""
    from matplotlib.figure import Figure

    cells: dict[tuple[int, str], str] = {}
    for name in losses:
        cells[block_of(name) or (-1, name.removesuffix(".weight"))] = name
    blocks = sorted({block for block, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    values = np.full((len(blocks), len(kinds)), np.nan)
    figure = Figure(figsize=(2.5 + 0.9 * len(kinds), 2 + 0.28 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    several = len({types[name] for name in losses}) > 1
    for (block, kind), name in cells.items():
        row, column = blocks.index(block), kinds.index(kind)
        values[row, column] = 100 * losses[name]
        if several:
            color = "black" if losses[name] > 0.6 * max(losses.values()) else "white"  # the map is light at its top
            axes.text(column, row, types[name], ha="center", va="center", fontsize=7, color=color)
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(blocks)), [str(b) if b >= 0 else "other" for b in blocks], fontsize=7)
    axes.set(title=f"{title}: loss, % of the power under the curvature", ylabel="block")
    figure.colorbar(image, label="%")
    figure.savefig(path, format="png", dpi=_DOTS)
