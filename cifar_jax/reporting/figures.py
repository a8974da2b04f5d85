"""The figures of the page of a run, as SVG that stands in its HTML.

Drawn by matplotlib with the pictures' own functions. Text stays text, and colours become the page's
CSS variables, so that a figure is dark where the page is. Each is as wide as a phone: 4.6 inches at
the page's letter size.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cifar_jax.reporting import confusion as confusion_matrix
from cifar_jax.reporting import distribution, plots, scores

WIDTH, HEIGHT = 4.6, 3.1  # inches
_COLORS = {
    plots.INK: "ink",
    plots.QUIET: "quiet",
    plots.FAINT: "faint",
    plots.BLUE: "blue",
    plots.ORANGE: "orange",
    plots.GREEN: "green",
    plots.RED: "red",
}


class Svg(str):
    """Markup that jinja2 takes as it is."""

    def __html__(self) -> str:
        return self


class _Holder:
    svg = Svg()


@contextlib.contextmanager
def _drawing(
    name: str,
    about: str,
    width: float = WIDTH,
    height: float = HEIGHT,
    margins: tuple[float, float] | None = (0.72, 0.52),
) -> Iterator:
    """Yields a figure and what holds its `svg` after the block.

    Args:
      name: of the figure in its page: what its ids begin with.
      about: what a reader who does not see it is told.
      margins: what is left free for labels on the left and below, in inches; None lets matplotlib
        measure every label, twice, which takes longer than all the drawing.
    """
    plots.load_matplotlib()
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "cifar_jax", "axes.facecolor": "none"}
    with matplotlib.style.context(["default", plots.STYLE, style]):
        figure = Figure(figsize=(width, height), dpi=72)
        FigureCanvasSVG(figure)
        holder, file = _Holder(), io.StringIO()
        if margins:
            left, below = margins
            figure.subplots_adjust(
                left / width, below / height, 1 - 0.15 / width, 1 - 0.3 / height, hspace=0.12
            )
        else:
            figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
        yield figure, holder
        if not margins:
            # Saving would draw all once more only to lay it out.
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine(None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    holder.svg = Svg(_inline(file.getvalue(), name, about))


def _inline(text: str, name: str, about: str) -> str:
    """Returns an SVG file's element as a part of a page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in _COLORS.items():
        text = re.sub(color, f"var(--{variable})", text, flags=re.I)
    text = text.replace("'DejaVu Sans'", "var(--letters)").replace(
        "stroke: #ffffff", "stroke: var(--paper)"
    )
    box = re.search(r'viewBox="[^"]*"', text).group()
    label = html.escape(about, quote=True)
    head = f'<svg role="img" aria-label="{label}" {box} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :])


def curve(rows: Sequence[Mapping], what: str) -> Svg:
    """The `loss` or `accuracy` by epoch."""
    about = f"{what.capitalize()} of training and validation by epoch; the table below has numbers"
    with _drawing(what, about, height=3.3, margins=(0.72, 0.95)) as (figure, holder):
        axis = figure.subplots()
        plots.draw_curve(axis, rows, what)
        axis.title.set_fontsize(9)
        figure.legend(loc="lower center", ncols=2, fontsize=8.5)
    return holder.svg


def learning_rate(rows: Sequence[Mapping]) -> Svg:
    """The learning rate at each epoch's last step."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row for row in rows if row["kind"] == "epoch"]
    with _drawing("rate", "Learning rate at the end of each epoch", height=2.2) as (figure, holder):
        axis = figure.subplots()
        x, y = ([row[name] for row in epochs] for name in ("epoch", "learning_rate"))
        axis.plot(x, y, color=plots.BLUE, lw=1.8, marker="o", ms=3)
        axis.set(xlabel="epoch", ylim=(0, 1.08 * max(max(y), 1e-12)))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.set_title("Learning rate at the end of each epoch", fontsize=9)
        axis.grid(axis="y")
    return holder.svg


def overlaid_curves(rows_of: Mapping[str, Sequence[Mapping]]) -> Svg:
    """The accuracy of several runs by epoch, on validation images where there are any."""
    about = "Accuracy by epoch of each run, on validation images or else in training"
    height = 3.1 + 0.18 * len(rows_of)
    margins = (0.72, 0.6 + 0.18 * len(rows_of))
    with _drawing("overlaid", about, height=height, margins=margins) as (figure, holder):
        axis = figure.subplots()
        for k, (name, rows) in enumerate(rows_of.items()):
            epochs = [row for row in rows if row["kind"] == "epoch"]
            part = "validation" if any("validation_accuracy" in row for row in epochs) else "train"
            x = [row["epoch"] for row in epochs]
            y = [100 * (row.get(f"{part}_accuracy") or np.nan) for row in epochs]
            color = plots.SERIES[k % len(plots.SERIES)]
            dashes = ("-", (0, (5, 2)), (0, (1, 1.2)))[k // len(plots.SERIES) % 3]
            label = f"{plots.short(name, 34)} ({part})"
            axis.plot(x, y, color=color, ls=dashes, marker="o", ms=3, lw=1.6, label=label)
        axis.set(xlabel="epoch")
        axis.set_title("Accuracy, %", fontsize=9)
        axis.grid(axis="y")
        figure.legend(loc="lower center", fontsize=8.5)
    return holder.svg


def confusion(counts: np.ndarray, class_names: Sequence[str]) -> Svg:
    """The confusion matrix."""
    side = min(confusion_matrix.side_of(len(counts)), 6.5)
    about = (
        "Confusion matrix: true classes in rows, predicted in columns; the most frequent mistakes "
        "are listed after it"
    )
    longest = max(len(plots.short(name, 20)) for name in class_names)
    left = 0.4 + 0.075 * longest  # inches; a letter at 8.5 points
    below = 0.35 + (0.055 if len(counts) <= 20 else 0.075) * longest  # at 45 degrees, or upright
    size = side + 1.6 + left, side + 0.4 + below
    margins = (left, below) if len(counts) > 5 else None
    with _drawing("confusion", about, *size, margins=margins) as (figure, holder):
        confusion_matrix.draw(figure, counts, class_names, most_names=20)
    return holder.svg


def reliability(found: scores.Reliability, after: scores.Reliability | None) -> Svg:
    """The reliability diagram: accuracy by confidence, and how many predictions are how sure.

    Args:
      found: of the predictions as they are.
      after: of the same after temperature scaling.
    """
    bins = len(found.count)
    edges, width = np.arange(bins) / bins, 1 / bins
    about = (
        f"Reliability diagram: share right against confidence in {bins} bins; below, the share of "
        "predictions in each bin"
    )
    with _drawing("reliability", about, height=4.2, margins=(0.72, 0.78)) as (figure, holder):
        axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axis.plot([0, 1], [0, 1], color=plots.QUIET, lw=1, ls=(0, (4, 3)), label="calibrated")
        heights = np.nan_to_num(found.accuracy)
        axis.bar(edges, heights, width, align="edge", color=plots.BLUE, alpha=0.4, ec="none")
        for bins_of, color, label in (
            (found, plots.BLUE, "as trained"),
            (after, plots.ORANGE, "after temperature scaling"),
        ):
            if bins_of is not None:
                kept = bins_of.count > 0
                x, y = bins_of.confidence[kept], bins_of.accuracy[kept]
                axis.plot(x, y, color=color, marker="o", ms=4, lw=1.5, label=label)
        axis.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="share right")
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        share = 100 * found.count / max(found.count.sum(), 1)
        below.bar(edges, share, width, align="edge", color=plots.BLUE, alpha=0.6, ec="none")
        below.set(xlabel="confidence: probability of the class predicted", ylabel="images, %")
        figure.legend(loc="lower center", ncols=3, fontsize=8.5)
    return holder.svg


def selective(kept: np.ndarray, accuracy: np.ndarray) -> Svg:
    """Accuracy among the surest predictions, against the share kept."""
    about = "Accuracy among the most confident predictions against the share of them that is kept"
    with _drawing("selective", about) as (figure, holder):
        axis = figure.subplots()
        from_ = max(len(kept) // 100, 1) - 1  # a handful of images says nothing yet
        few = np.unique(np.linspace(from_, len(kept) - 1, 300).astype(int))
        axis.plot(100 * kept[few], 100 * accuracy[few], color=plots.BLUE, lw=1.8)
        axis.set(xlim=(0, 100), xlabel="share kept, the most confident first, %")
        axis.set_title("Accuracy among those kept, %", fontsize=9)
        axis.grid()
    return holder.svg


def spread(
    percent: Sequence[float], found: Mapping, ensemble: float | None, published: Sequence[float]
) -> Svg:
    """The distribution of the test accuracy over runs, in percent."""
    about = f"Test accuracy of {len(percent)} runs, from {min(percent):.2f} to {max(percent):.2f} %"
    with _drawing("spread", about, width=6.4, height=3.2, margins=None) as (figure, holder):
        axis = figure.subplots()
        distribution.draw_histogram(axis, percent, found, ensemble=ensemble, published=published)
        axis.set(xlabel="test accuracy, %")
        figure.legend(loc="outside lower center", ncols=1, fontsize=8.5)
    return holder.svg


def seeds_right(right: np.ndarray, runs: int) -> Svg:
    """How many images are classified rightly by how many of the runs.

    Args:
      right: int [N], of each image how many runs are right.
    """
    about = "How many test images are classified rightly by how many of the runs"
    with _drawing("seeds_right", about) as (figure, holder):
        axis = figure.subplots()
        shares = 100 * np.bincount(right, minlength=runs + 1) / max(len(right), 1)
        axis.bar(np.arange(runs + 1), shares, 0.9, color=plots.BLUE, alpha=0.6, ec="none")
        axis.set(xlabel="runs that are right")
        axis.set_title("Images, %", fontsize=9)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
    return holder.svg
