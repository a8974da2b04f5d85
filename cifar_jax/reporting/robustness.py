"""What corruptions cost a trained network: errors by corruption and severity, in a table, a heat
map and `corruptions.json`.

The mean corruption error is the mean over the corruptions of their mean errors over the severities,
as CIFAR-10-C is reported; it is not divided by another network's errors, as ImageNet-C's is
(Hendrycks and Dietterich, 2019, arXiv:1903.12261, section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import plots


def summarize(errors: Mapping[str, Sequence[float]], clean: float) -> dict:
    """Returns what `corruptions.json` holds of it.

    Args:
      errors: {corruption: error at severity 1, 2, ...}, shares in [0, 1].
      clean: the error on the images as they are.

    Returns:
      {"clean_error", "mean_corruption_error", "by_severity": [S], "by_corruption": {name:
      {"mean", "by_severity": [S]}}}, all in [0, 1].
    """
    table = np.array(list(errors.values()), float)
    return {
        "clean_error": float(clean),
        "mean_corruption_error": float(table.mean(axis=1).mean()),
        "by_severity": table.mean(axis=0).tolist(),
        "by_corruption": {
            name: {"mean": float(row.mean()), "by_severity": row.tolist()}
            for name, row in zip(errors, table, strict=True)
        },
    }


def lines(found: Mapping) -> str:
    """Returns the table of `summarize`, errors in percent, the last column their mean."""
    rows = found["by_corruption"]
    width = max(len("mean of all"), *map(len, rows))
    severities = range(1, len(found["by_severity"]) + 1)

    def line(name, values, mean):
        return f"{name:<{width}}" + "".join(f"{100 * v:8.2f}" for v in [*values, mean])

    head = "error, %".ljust(width) + "".join(f"{s:>8}" for s in severities) + f"{'mean':>8}"
    mean = found["mean_corruption_error"]
    return "\n".join(
        [
            f"Error on the images as they are {100 * found['clean_error']:.2f} %, "
            f"mean corruption error {100 * mean:.2f} %",
            head,
            *(line(name, row["by_severity"], row["mean"]) for name, row in rows.items()),
            line("mean of all", found["by_severity"], mean),
        ]
    )


def heat_map(found: Mapping, title: str, path: str | Path) -> str | Path:
    """Draws the errors as a PNG: a row each corruption, a column each severity and their mean."""
    rows = found["by_corruption"]
    table = np.array([[*row["by_severity"], row["mean"]] for row in rows.values()])
    table = 100 * np.vstack([table, [*found["by_severity"], found["mean_corruption_error"]]])
    names = [name.replace("_", " ") for name in (*rows, "mean of all")]
    severities = len(found["by_severity"])
    with plots.drawing(path, 6.2, 1.5 + 0.3 * len(names), palette=256) as figure:
        from matplotlib.colors import LinearSegmentedColormap

        axis = figure.subplots()
        ramp = LinearSegmentedColormap.from_list("error", ["white", plots.ORANGE])
        picture = axis.imshow(table, cmap=ramp, vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            axis.text(column, row, f"{value:.1f}", fontsize=8.5, ha="center", va="center")
        axis.set_xticks(range(severities + 1), [*range(1, severities + 1), "mean"])
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        # White lines part the means from what they are of.
        axis.axhline(len(rows) - 0.5, color="white", lw=4)
        axis.axvline(severities - 0.5, color="white", lw=4)
        clean = 100 * found["clean_error"]
        axis.set_title(f"{title}\nerror, %, by severity; {clean:.1f} on the images as they are")
        axis.set_xlabel("severity")
        bar = figure.colorbar(picture, ax=axis, aspect=40)
        bar.outline.set_visible(False)
    return path
