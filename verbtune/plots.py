"""Pictures, drawn with matplotlib if it is there."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .tuning import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_confusion", "draw_curves", "draw_history", "draw_methods", "draw_reliability", "figure", "svg"]

INK = "#24292f"  # of text and axes; `svg` makes it the colour of the page's text
MAIN_COLOR = "#2f81f7"
OTHER_COLOR = "#8b949e"
COLORS = ("#d9822b", "#2da44e", "#bf4b8a", "#8957e5", "#c9a227", "#1b9aaa", "#cf222e")
MARKERS = "osD^vPX"
MOST_TICKS = 8  # of a logarithmic axis, at the points; for more of them there are those at powers of ten


def figure(width: float, height: float) -> Figure:
    """An empty figure that no window and no global state knows of.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; pip install 'verbtune[bench]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_history(history: History) -> Figure:
    """Loss and validation score, learning rate, and the gradient norm of every prompt token, by step."""
    steps = [s for s in history.steps if s.step > 0]
    drawing = figure(7, 7)
    loss, rate, norms = drawing.subplots(3, 1, sharex=True, height_ratios=(2, 1, 2))
    at = [s.step for s in steps]
    loss.plot(at, [s.loss for s in steps], color="C0", label="training loss")
    checked = [s for s in history.steps if s.validation_score is not None]
    if checked:
        loss.plot(
            [s.step for s in checked],
            [-(s.validation_score or 0) for s in checked],
            "o-",
            color="C1",
            label="validation loss",
        )
    loss.axvline(history.best_step, color="grey", linestyle=":", label=f"kept: step {history.best_step}")
    loss.set_ylabel("loss (nats)")
    loss.legend()
    rate.plot(at, [s.learning_rate for s in steps], color="C2")
    rate.set_ylabel("learning rate")
    if steps and steps[0].gradient_norms:
        grid = np.array([s.gradient_norms for s in steps]).T  # (P, steps)
        image = norms.imshow(
            grid, aspect="auto", origin="lower", extent=(0.5, len(steps) + 0.5, -0.5, len(grid) - 0.5), cmap="viridis"
        )
        drawing.colorbar(image, ax=norms, label="gradient norm")
    norms.set_ylabel("prompt token")
    norms.set_xlabel("step")
    return drawing


def draw_methods(panels: Mapping[str, Mapping[str, Sequence[float]]], *, main: str, xlabel: str) -> Figure:
    """One panel a task: a dot for every seed, the mean, and a bar of one standard deviation to each side.

    Parameters
    ----------
    panels : mapping of str to mapping of str to sequence of float
        Title → method → a value for each seed.
    main : str
        The method to stand out.
    xlabel : str
    """
    methods = list(dict.fromkeys(method for values in panels.values() for method in values))
    lines, columns = _grid(len(panels))
    drawing = figure(3.0 + 2.6 * columns, 0.8 + (0.26 * len(methods) + 0.4) * lines)
    axes = drawing.subplots(lines, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for i, (ax, (title, values)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for y, method in enumerate(methods):
            seeds = np.array(values.get(method, []))
            if not len(seeds):
                continue
            color = MAIN_COLOR if method == main else OTHER_COLOR
            spread = seeds.std(ddof=1) if len(seeds) > 1 else 0
            ax.plot(seeds, np.full(len(seeds), y), ".", color=color, alpha=0.6, markersize=5)
            ax.errorbar(seeds.mean(), y, xerr=spread, fmt="o", color=color, markersize=6, capsize=3)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="x", color=OTHER_COLOR, alpha=0.25)
        if i + columns >= len(panels):
            ax.set_xlabel(xlabel)
            ax.tick_params(labelbottom=True)
    first = axes[0, 0]
    first.set_yticks(range(len(methods)), methods)
    first.invert_yaxis()
    return _inked(drawing)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    main: str,
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float],
    logarithmic: bool,
) -> Figure:
    """Draw a line of (x, mean, standard deviation) for each label, and dashed levels across.

    Parameters
    ----------
    curves : mapping of str to sequence of (float, float, float)
    main : str
        The label to stand out.
    xlabel, ylabel : str
    levels : mapping of str to float
    logarithmic : bool
        Whether the horizontal axis is.
    """
    drawing = figure(8, 4.6)
    ax = drawing.subplots()
    # Labels stand in the order of the lines' right ends, so that eye and legend agree.
    order = sorted(curves, key=lambda name: -curves[name][-1][1])
    colors = dict(zip([name for name in curves if name != main], _styles(), strict=False))
    for name in order:
        x, mean, std = map(np.array, zip(*curves[name], strict=True))
        color, marker, line = colors.get(name, (MAIN_COLOR, "o", "-"))
        ax.errorbar(
            x,
            mean,
            yerr=std,
            color=color,
            marker=marker,
            markersize=5,
            linestyle=line,
            linewidth=2.5 if name == main else 1.2,
            zorder=3 if name == main else 2,
            capsize=3,
            label=name,
        )
    for (name, level), line in zip(levels.items(), ("--", ":", "-."), strict=False):
        ax.axhline(level, color=MAIN_COLOR if name.startswith(main) else OTHER_COLOR, linestyle=line, label=name)
    if logarithmic:
        ax.set_xscale("log")
    ticks = sorted({x for curve in curves.values() for x, _, _ in curve})
    names = [f"{tick:g}" for tick in ticks]
    if logarithmic and len(ticks) > MOST_TICKS:
        powers = range(math.ceil(math.log10(ticks[0])), math.floor(math.log10(ticks[-1])) + 1)
        if len(powers) > 1:
            from matplotlib.ticker import EngFormatter

            ticks = [10.0**power for power in powers]
            names = [EngFormatter(sep="")(tick) for tick in ticks]
    ax.set_xticks(ticks, names)
    ax.minorticks_off()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(color=OTHER_COLOR, alpha=0.25)
    drawing.legend(loc="outside right center", frameon=False)
    return _inked(drawing)


def draw_reliability(
    panels: Mapping[str, Mapping[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]], *, main: str
) -> Figure:
    """One panel a task: how often a method is right against how sure it is, the area of a dot by its share of texts.

    Parameters
    ----------
    panels : mapping of str to mapping of str to (confidence, accuracy, share)
        Title → method → what `metrics.reliability` gives.
    main : str
        The method to stand out.
    """
    lines, columns = _grid(len(panels))
    drawing = figure(1.2 + 3.0 * columns, 0.9 + 2.9 * lines)
    axes = drawing.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for i, (ax, (title, methods)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        ax.plot([0, 1], [0, 1], "--", color=OTHER_COLOR, linewidth=1, label="as sure as right")
        for method, (confidence, accuracy, share) in methods.items():
            color = MAIN_COLOR if method == main else COLORS[0]
            ax.plot(confidence, accuracy, "-", color=color, linewidth=1, alpha=0.6, label=method)
            ax.scatter(confidence, accuracy, s=4 + 250 * share, color=color, alpha=0.6, linewidth=0)
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
        ax.set_xlim(0, 1.04)
        ax.set_ylim(0, 1.04)
        ax.tick_params(labelbottom=i + columns >= len(panels))
        ax.grid(color=OTHER_COLOR, alpha=0.25)
    drawing.supxlabel("confidence: probability of the class predicted", fontsize=10, color=INK)
    drawing.supylabel("accuracy: share that is right", fontsize=10, color=INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return _inked(drawing)


def draw_confusion(counts: NDArray[Any], classes: Sequence[str]) -> Figure:
    """How a class's texts were classified, as percent of them; with numbers if there are at most 15 classes.

    Parameters
    ----------
    counts : ndarray of shape (C, C)
        True class by predicted class.
    classes : sequence of str, length C
    """
    n = len(classes)
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    named = n <= 40
    cell = 0.9 if n <= 4 else 0.5 if n <= 15 else 0.2 if named else 7 / n  # inches
    longest = 0.08 * max(map(len, classes)) * named
    slanted = longest > cell
    drawing = figure(cell * n + longest + 1.7, cell * n + (0.75 * longest if slanted else 0) + 0.8)
    ax = drawing.subplots()
    image = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    numbering = "" if named else f" (0 to {n - 1}, sorted by name)"
    ax.set_xlabel(f"predicted class{numbering}")
    ax.set_ylabel(f"true class{numbering}")
    if named:
        ax.set_xticks(
            range(n),
            classes,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor",
        )
        ax.set_yticks(range(n), classes)
    if n <= 15:
        for (i, j), value in np.ndenumerate(percent):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="#fff" if value > 55 else "#111")
    drawing.colorbar(image, ax=ax, label="% of the true class's texts", pad=0.02)
    return _inked(drawing)


def svg(drawing: Figure) -> str:
    """A figure as an `<svg>` element that takes the text colour of the page around it and needs nothing else."""
    import matplotlib as mpl

    stream = io.StringIO()
    # Text stays text, and the same figure gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "verbtune", "font.family": "sans-serif"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(stream, format="svg", transparent=True, metadata=nothing)
    element = stream.getvalue()
    return element[element.index("<svg") :].replace(INK, "currentColor")


def _grid(n: int) -> tuple[int, int]:
    """Lines and columns for n panels."""
    columns = 2 if n in (2, 4) else min(n, 3)
    return math.ceil(n / columns), columns


def _styles() -> list[tuple[str, str, str]]:
    """Colour, marker and line of one curve after another; a point alone shows no line, so that markers move on."""
    n = len(COLORS)
    return [(COLORS[i], MARKERS[(i + turn) % n], line) for turn, line in enumerate(("-", "--", ":")) for i in range(n)]


def _inked(drawing: Figure) -> Figure:
    """Give text, axes and ticks the colour of ink, and show `$` in a name as it is."""
    from matplotlib.text import Text

    for text in drawing.findobj(Text):
        text.set_parse_math(False)
    for ax in drawing.axes:
        ax.tick_params(colors=INK, labelcolor=INK)
        for spine in ax.spines.values():
            spine.set_color(INK)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(INK)
    for legend in drawing.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    return drawing
