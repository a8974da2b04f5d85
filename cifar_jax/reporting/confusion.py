"""The picture of a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import plots, scores


def confusion_matrix(
    counts: np.ndarray, class_names: Sequence[str], path: str | Path
) -> str | Path:
    """Draws how often each true class (row) was called each class (column); see
    `draw`.

    Args:
      counts: int [C, C], `counts[true, predicted]`.
      class_names: C names.
      path: where the PNG goes.
    """
    side = side_of(len(counts))
    with plots.drawing(path, side + 3.0, side + 1.3, palette=256) as figure:
        draw(figure, counts, class_names)
    return path


def side_of(classes: int) -> float:
    """Returns the inches that a side of the matrix takes."""
    return 0.52 * max(classes, 4) if classes <= 20 else max(10.0, min(0.115 * classes, 20.0))


def draw(figure, counts: np.ndarray, class_names: Sequence[str], most_names: int = 1000) -> None:
    """Draws the matrix on a figure of matplotlib. Right answers (blue) and mistakes (orange) have a
    scale each, or the mistakes would all look white; a colour is a share of its row. Up to 20
    classes counts are written, and in margins each class's recall and precision; of more than
    `most_names` classes not every one is named."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    counts = np.asarray(counts)
    classes = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    written = classes <= 20
    side = side_of(classes)
    font = 8.5 if written or most_names < classes else max(4.0, min(8.5, 57.6 * side / classes))
    every = math.ceil(
        max(classes / (72 * side / 5), classes / most_names)
    )  # names further apart when too many
    right, total = int(np.trace(counts)), int(counts.sum())
    off = ~np.eye(classes, dtype=bool)
    highest = float(share[off].max()) if classes > 1 else 0.0
    top = np.where(off, highest or 1.0, 1.0)
    axis = figure.subplots()
    bars = []
    for color, shown, end, label in (
        (plots.BLUE, ~off, 1.0, "right, share of the true class"),
        (plots.ORANGE, off, highest or 1.0, "mistaken, share of the true class"),
    ):
        # From nothing to the colour, on whatever the background is.
        ramp = LinearSegmentedColormap.from_list(label, [(*to_rgb(color), a) for a in (0, 1)])
        values = np.ma.masked_array(share, ~shown)
        picture = axis.imshow(values, cmap=ramp, vmin=0, vmax=end, interpolation="nearest")
        bars.append((picture, label))
    title = f"Accuracy {100 * right / max(total, 1):.2f} % ({right}/{total})"
    axis.set_title(title, pad=10 if classes > 5 else 24)  # a narrow one's would reach "recall"
    names = [plots.short(name, 20) for name in class_names][::every]
    at = range(0, classes, every)
    axis.set_xticks(at, names, rotation=90 if classes > 20 else 45, fontsize=font)
    for label in axis.get_xticklabels():
        label.set(ha="center" if classes > 20 else "right", rotation_mode="default")
        if classes <= 20:
            label.set_rotation_mode("anchor")
    axis.set_yticks(at, names, fontsize=font)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="predicted", ylabel="true")
    for picture, label in bars:
        bar = figure.colorbar(picture, ax=axis, shrink=0.6, aspect=28, pad=0.015)
        bar.set_label(label, fontsize=8.5)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    if not written:
        return
    # Within the axes, so that the layout need not measure each.
    middle = {"fontsize": 8.5, "ha": "center", "va": "center", "in_layout": False}
    for (row, column), count in np.ndenumerate(counts):
        dark = share[row, column] / top[row, column] > 0.55
        ink = "white" if dark else (plots.INK if count else plots.QUIET)
        axis.text(column, row, f"{count}", color=ink, **middle)
    axis.set(xlim=(-0.5, classes + 0.55), ylim=(classes + 0.35, -0.5))
    for k, row in enumerate(scores.by_class(counts)):
        recall, precision = (_whole_percent(row[name]) for name in ("recall", "precision"))
        axis.text(classes, k, recall, color=plots.QUIET, **middle)
        axis.text(k, classes - 0.1, precision, color=plots.QUIET, **middle)
    axis.text(classes, -0.62, "recall", color=plots.QUIET, fontsize=8, ha="center", va="bottom")
    axis.text(classes - 0.3, classes - 0.1, "precision", color=plots.QUIET, fontsize=8, va="center")


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "-"
