"""The spread of a figure over several runs: statistics and lines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import predictions
from cifar_jax.runtime.errors import UserError

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
      folders: each with `summary.json` and `predictions.npz` (`reporting/predictions.py`).
      labels: int [N] of the test images.

    Returns:
      `of_runs`, "interval_95_formula", "runs": a list of {"seed", "test_accuracy", "test_loss",
      "epochs", "best_epoch", "best_validation_loss"}, and "ensemble": {"test_loss",
      "test_accuracy", "test_correct", "test_count"} of the mean of the runs' probabilities.
    """
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in folders]
    mean = sum(_probabilities(folder, labels) for folder in folders) / len(folders)
    correct = int((mean.argmax(axis=1) == labels).sum())
    chance = np.maximum(mean[np.arange(len(labels)), labels], np.finfo(np.float64).tiny)
    kept = ("seed", "test_accuracy", "test_loss", "epochs", "best_epoch", "best_validation_loss")
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


def _probabilities(folder: Path, labels: np.ndarray) -> np.ndarray:
    found, _ = predictions.read(folder, labels)
    if found is None:
        raise UserError(f"{folder} has lost its predictions.npz: train it again with --overwrite")
    return found.probabilities.astype(np.float64)


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
