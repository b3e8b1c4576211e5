"""How the plots look: one style, and the few things every figure does to its axes. Matplotlib is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

STEPS = "iterations (optimizer steps)"
LR = "learning rate (log scale)"


def style() -> Any:
    """A context in which figures are drawn and saved: Okabe and Ito's colours (safe for the colour-blind), light grid."""
    import matplotlib
    from cycler import cycler

    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    settings: dict[str, Any] = {
        "axes.axisbelow": True, "axes.edgecolor": "0.3", "axes.grid": True, "axes.prop_cycle": cycler(color=colours),
        "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 12,
        "figure.dpi": 150, "font.size": 10.5, "grid.color": "0.9", "grid.linewidth": 0.7, "legend.fontsize": 9.5,
        "legend.frameon": False, "lines.markersize": 4, "savefig.dpi": 150,
        "svg.hashsalt": "autolrs",
    }  # fmt: skip
    return matplotlib.rc_context(settings)


def new_figure(width: float = 8.0, height: float = 4.5) -> Any:
    """An empty figure of `width` x `height` inches whose parts make room for each other. No window, any thread."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_numbers(most: int) -> Any:
    """A locator of at most `most` intervals, of 1, 2, 4 or 5 times a power of ten."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True, steps=[1, 2, 4, 5, 10])


def count_steps(axis: Any) -> None:
    """Whole numbers with thousands separators along an axis of optimizer steps."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_locator(whole_numbers(7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axis: Any, grouped: bool = False) -> None:
    """Plain decimals (0.05, not 5 x 10^-2) on a log axis, at 1, 2 and 5 of every decade, or at decades if there are many.

    grouped: with thousands separators, for steps.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if grouped else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scale_loss(axes: Any, values: Iterable[float]) -> str:
    """Make y logarithmic where the losses `values` span more than a factor of 10; returns what its label adds.

    Losses of 0 are drawn below the smallest that is not, on a scale that is linear there. Negative ones stay on a linear axis.
    """
    values = sorted(values)
    above = [value for value in values if value > 0.0]
    if not above or values[0] < 0.0 or above[-1] <= 10.0 * values[0]:
        return ""
    if values[0] > 0.0:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        return " (log scale)"
    if above[-1] <= 10.0 * above[0]:
        return ""
    axes.set_yscale("symlog", linthresh=max(above[0], 1e-6 * above[-1]), linscale=0.3)
    axes.set_ylim(bottom=0.0)
    return " (log scale above 0)"


def mark_steps(axes: Any, steps: Sequence[float], label: str) -> None:
    """Thin vertical lines at `steps`, in place of the grid's own, with one entry in the legend if `label` is not ""."""
    axes.grid(visible=False, axis="x")
    for i, step in enumerate(steps):
        axes.axvline(
            step, color="0.5", linewidth=0.9, linestyle=":", zorder=0, label=label if label and not i else None
        )


def legend_below(figure: Any, columns: int = 4) -> None:
    """One legend under all axes, where it covers nothing, with one entry for what several axes show."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def colours_of_lr(low: float, high: float) -> Any:
    """A matplotlib ScalarMappable from log LR to colour; the pale end of viridis, unseen on white, is left out."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    shades = [matplotlib.colormaps["viridis"](i / 255) for i in range(225)]
    return ScalarMappable(LogNorm(low, high), ListedColormap(shades))


def show_names_as_they_are(figure: Any) -> None:
    """A metric called "$x" is no formula."""
    from matplotlib.text import Text

    ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for text in figure.findobj(Text):
        if text not in ticks:
            text.set_parse_math(False)
