"""Medians, spreads and paired ratios of repeated timings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Returns median, lowest and highest of `rates`."""
    return {
        "median": float(np.median(rates)),
        "lowest": float(np.min(rates)),
        "highest": float(np.max(rates)),
    }


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = 10_000
) -> dict[str, float]:
    """Returns the median of ours / theirs over rounds, and its 95 % bootstrap interval.

    Entry i of both was measured in round i, so that drift of the machine cancels. The interval
    is the percentile bootstrap over rounds (Efron & Tibshirani 1993, chapter 13).

    Returns:
      {"ratio", "low", "high"}.
    """
    ratios = np.asarray(ours, np.float64) / np.asarray(theirs, np.float64)
    picks = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns max |ours - theirs| / |theirs| over the entries."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
