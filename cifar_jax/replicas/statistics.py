"""The spread of a figure over several runs: statistics, lines and a picture of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

INTERVAL = "mean +- t(0.975, n - 1) * std / sqrt(n), Student's t distribution"


def spread(values: Sequence[float]) -> dict:
    """Returns what at least one value tells of the distribution it is drawn from.

    Returns:
      {"n", "mean", "std" (over n - 1), "standard_error" (std / sqrt(n)), "min", "max",
      "interval_95": [low, high]}. The interval is the mean's, mean +- t * standard error with the
      97.5 % quantile t of Student's t distribution with n - 1 degrees of freedom, which holds for
      independent, normally distributed values. Of one value std, error and interval are nan.
    """
    from scipy.special import stdtrit

    n = len(values)
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if n > 1 else math.nan
    error = std / math.sqrt(n)
    reach = float(stdtrit(n - 1, 0.975)) * error if n > 1 else math.nan
    return {
        "n": n,
        "mean": mean,
        "std": std,
        "standard_error": error,
        "min": min(values),
        "max": max(values),
        "interval_95": [mean - reach, mean + reach],
    }


def of_runs(runs: Sequence[Mapping], class_names: Sequence[str]) -> dict:
    """Returns the spread of what `console.results` found in each run.

    Returns:
      {"test_accuracy", "test_loss", "per_class"}: spreads, the last a list of {"class", ...}.
    """
    rates = [[row["accuracy"] for row in run["per_class"]] for run in runs]
    return {
        "test_accuracy": spread([run["test_accuracy"] for run in runs]),
        "test_loss": spread([run["test_loss"] for run in runs]),
        "per_class": [
            {"class": name, **spread(column)}
            for name, column in zip(class_names, zip(*rates, strict=True), strict=True)
        ],
    }


def of_directories(folders: Sequence[Path], labels: np.ndarray) -> dict:
    """Returns what several run directories of the same test images found.

    Args:
      folders: each with `summary.json` and `probabilities.npy` [N, C] (`replicas/results.py`).
      labels: int [N] of the test images.

    Returns:
      `of_runs`, "interval_95_formula", "runs": a list of {"seed", "test_accuracy", "test_loss",
      "best_epoch", "best_validation_loss"}, and "ensemble": {"test_loss", "test_accuracy",
      "test_correct", "test_count"} of the mean of the runs' probabilities.
    """
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in folders]
    mean = sum(np.load(folder / "probabilities.npy").astype(np.float64) for folder in folders)
    mean /= len(folders)
    correct = int((mean.argmax(axis=1) == labels).sum())
    chance = np.maximum(mean[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
    kept = ("seed", "test_accuracy", "test_loss", "best_epoch", "best_validation_loss")
    return {
        **of_runs(summaries, [row["class"] for row in summaries[0]["per_class"]]),
        "interval_95_formula": INTERVAL,
        "runs": [{name: summary[name] for name in kept} for summary in summaries],
        "ensemble": {
            "test_loss": float(-np.log(chance).mean()),
            "test_accuracy": correct / len(labels),
            "test_correct": correct,
            "test_count": len(labels),
        },
    }


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def line(name: str, found: Mapping, *, scale: float = 1.0, digits: int = 4, unit: str = "") -> str:
    """Returns one line: mean, standard deviation and error, range, 95 % interval of the mean."""
    shown = {
        key: _number(value if value is None else scale * value, digits)
        for key, value in found.items()
        if key in ("mean", "std", "standard_error", "min", "max")
    }
    low, high = (_number(v if v is None else scale * v, digits) for v in found["interval_95"])
    return (
        f"{name} {shown['mean']}{unit}  std {shown['std']}  standard error "
        f"{shown['standard_error']}  95 % interval {low} to {high}  range {shown['min']} to "
        f"{shown['max']}  n {found['n']}"
    )


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
    from cifar_jax.reporting import plots

    with plots.drawing(path, 7.5, 4.2, palette=256) as figure:
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
    """Draws how many runs had which value, every run as a tick, their mean with its 95 % interval,
    the ensemble and published figures.

    Args:
      axis: of Matplotlib.
      values: one a run, all finite.
      found: their `spread`.
    """
    from matplotlib.ticker import MaxNLocator

    from cifar_jax.reporting import plots

    values = np.asarray(values, float)
    bars = int(np.clip(round(1.5 * math.sqrt(len(values))), 5, 30))
    counts, _, _ = axis.hist(values, bars, color=plots.BLUE, alpha=0.45, edgecolor="white")
    top = max(counts)
    axis.plot(values, np.full(len(values), -0.04 * top), "|", color=plots.BLUE, ms=9, mew=1.2)
    low, high = found["interval_95"]
    label = f"mean {found['mean']:.2f}, std {_number(found['std'], 2)}, n {found['n']}"
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
    axis.set(ylabel="runs", ylim=(-0.09 * top, 1.12 * top))
    axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(axis="y")
    axis.set_axisbelow(True)
