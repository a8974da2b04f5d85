"""The picture of a figure's spread over several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import plots

FEW = 15  # runs, below which each is a dot: bars of so few would show the bins, not the runs


def histogram(
    values: Sequence[float],
    found: Mapping,
    path: str | Path,
    *,
    heading: str,
    value_name: str,
    ensemble: float | None = None,
    published: Sequence[float] = (),
) -> str | Path:
    """Draws `draw_histogram` into a picture of its own.

    Args:
      value_name: what the values are, with the unit; also that of `ensemble` and `published`.
    """
    with plots.drawing(path, 7.5, 4.2 if len(values) >= FEW else 3.0, palette=256) as figure:
        axis = figure.subplots()
        draw_histogram(axis, values, found, ensemble=ensemble, published=published)
        axis.set(title=heading, xlabel=value_name)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    return path


def draw_histogram(
    axis,
    values: Sequence[float],
    found: Mapping,
    *,
    ensemble: float | None = None,
    published: Sequence[float] = (),
) -> None:
    """Draws how many runs had which value, every run as a tick (below 15 runs as a dot, without
    bars), their mean with its 95 % interval, the ensemble and published figures.

    Args:
      axis: of Matplotlib.
      values: one a run, all finite.
      found: their `replicas.statistics.spread`.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(values, float)
    few = len(values) < FEW
    if few:
        # Dots that would cover each other stand above each other.
        height, reach = np.zeros(len(values)), np.ptp(values) / 40 + 1e-9
        for i, value in enumerate(values):
            height[i] = sum(abs(values[:i] - value) < reach)
        top = height.max() + 1
        axis.plot(values, height + 0.5, "o", color=plots.BLUE, ms=7, mec="white", alpha=0.85)
        axis.set(ylim=(0, top + 0.5), yticks=[])
        axis.spines["left"].set_visible(False)
    else:
        bars = int(np.clip(round(1.5 * math.sqrt(len(values))), 5, 30))
        counts, _, _ = axis.hist(values, bars, color=plots.BLUE, alpha=0.45, edgecolor="white")
        top = max(counts)
        axis.plot(values, np.full(len(values), -0.04 * top), "|", color=plots.BLUE, ms=9, mew=1.2)
        axis.set(ylabel="runs", ylim=(-0.09 * top, 1.12 * top))
        axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.grid(axis="y")
    low, high = (math.nan if v is None else v for v in found["interval_95"])
    std = found["std"] if found["std"] is not None else math.nan
    std = f"{std:.2f}" if math.isfinite(std) else "-"
    label = f"mean {found['mean']:.2f}, std {std}, n {found['n']}"
    axis.axvline(found["mean"], color=plots.BLUE, lw=1.8, label=label)
    if math.isfinite(low):
        name = f"95 % interval of the mean, {low:.2f} to {high:.2f}"
        axis.axvspan(low, high, color=plots.BLUE, alpha=0.18, lw=0, label=name)
    if ensemble is not None:
        name = f"ensemble of all {ensemble:.2f}"
        axis.axvline(ensemble, color=plots.GREEN, lw=1.8, ls=(0, (5, 2)), label=name)
    for k, value in enumerate(published):
        name = f"published {', '.join(f'{v:g}' for v in published)}" if k == 0 else None
        axis.axvline(value, color=plots.ORANGE, lw=1.8, ls=(0, (1, 1.2)), label=name)
    axis.set_axisbelow(True)
