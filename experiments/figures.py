"""Pictures of experiments, in the style of `cifar_jax.reporting.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import plots
from cifar_jax.reporting.distribution import draw_histogram

_STYLES = {
    "ours": (plots.BLUE, "o"),
    "PyTorch": (plots.ORANGE, "s"),
    "published": (plots.INK, "*"),
}


def strips(
    groups: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, value_name: str
) -> str | Path:
    """Draws every value as a point, one panel a group, one row of points a series.

    Args:
      groups: group -> series (`ours`, `PyTorch`, `published`) -> values. The bar over a series
        of several values is its mean and two standard errors each way.
      value_name: what the values are, with their unit.
    """
    with plots.drawing(path, 3 * len(groups) + 0.5, 2.6) as figure:
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for panel, (name, series) in zip(panels, groups.items(), strict=True):
            shown = {label: values for label, values in series.items() if len(values)}
            for row, (label, values) in enumerate(shown.items()):
                color, marker = _STYLES[label]
                spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 2 else 0
                panel.plot(
                    values, row + spread * np.ones(len(values)), marker, color=color, alpha=0.65
                )
                if len(values) > 2:
                    error = 2 * np.std(values, ddof=1) / np.sqrt(len(values))
                    panel.errorbar(
                        np.mean(values), row - 0.33, xerr=error, color=color, marker="|", capsize=3
                    )
            panel.set_yticks(range(len(shown)), list(shown))
            panel.set_ylim(len(shown) - 0.4, -0.6)
            panel.set_title(name)
            panel.set_xlabel(value_name)
            panel.grid(axis="x")
    return path


def histograms(panels: Mapping[str, Mapping], path: str | Path, *, value_name: str) -> str | Path:
    """Draws a histogram (`cifar_jax.reporting.distribution.draw_histogram`) for each name.

    Args:
      panels: name -> {"values", "found", "ensemble", "published"}.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with plots.drawing(path, 5.2 * columns, 3.9 * rows, palette=256) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (name, panel) in zip(axes, panels.items(), strict=False):
            draw_histogram(axis, **panel)
            axis.set(title=name, xlabel=value_name)
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7.5)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    return path
