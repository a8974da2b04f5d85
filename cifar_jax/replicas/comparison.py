"""The answer of a comparison: differences with their intervals, the sentence, tables, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_jax.replicas import paired
from cifar_jax.replicas.statistics import spread
from cifar_jax.reporting.console import counted
from cifar_jax.runtime.errors import UserError

LEVEL = paired.LEVEL


def by_variant(names: Sequence[str], rows: Sequence[Mapping]) -> list[dict]:
    """Returns, of each variant, {"name", "runs", "diverged": seeds, "test_accuracy" (in percent)
    and "test_loss": spreads of its runs that did not diverge, None without any}."""
    found = []
    for place, name in enumerate(names):
        mine = [row for row in rows if row["point"] == place]
        good = [row for row in mine if row["diverged_at_step"] is None]
        found.append(
            {
                "name": name,
                "runs": len(mine),
                "diverged": [row["seed"] for row in mine if row["diverged_at_step"] is not None],
                "test_accuracy": _spread([100 * row["test_accuracy"] for row in good]),
                "test_loss": _spread([row["test_loss"] for row in good]),
            }
        )
    return found


def _spread(values: Sequence[float]) -> dict | None:
    return spread(values) if values else None


def pairs_of(rows: Sequence[Mapping], place: int) -> list[tuple[Mapping, Mapping]]:
    """Returns, seed by seed, the runs of the first variant and of the one at `place`, of seeds
    with which neither diverged."""
    of = [
        {row["seed"]: row for row in rows if row["point"] == p and row["diverged_at_step"] is None}
        for p in (0, place)
    ]
    return [(row, of[1][seed]) for seed, row in of[0].items() if seed in of[1]]


def against_first(
    names: Sequence[str],
    rows: Sequence[Mapping],
    class_names: Sequence[str],
    looks: Sequence[int] = (),
) -> list[dict]:
    """Returns the comparison of every other variant with the first, figures in points.

    Args:
      names: of the variants.
      rows: of `sweep.rows_of`, with "point", "seed" and "per_class".
      class_names: in label order.
      looks: the numbers of seeds at which was looked, where that decided whether to go on.

    Returns:
      Of each {"names": [first, other], "test_accuracy": `paired.difference` with the "correlation"
      of the two, "test_loss" likewise, "per_class": [{"class", "means", ...}], "sequential":
      `paired.anytime` of the accuracies, or None, "in_words"}.

    Raises:
      UserError: fewer than two seeds with which neither of two variants diverged.
    """
    comparisons = []
    for place in range(1, len(names)):
        pairs = pairs_of(rows, place)
        if len(pairs) < 2:
            diverged = sum(row["diverged_at_step"] is not None for row in rows)
            raise UserError(
                f"{counted(len(pairs), 'seed')} with both {names[0]!r} and {names[place]!r}, "
                f"{counted(diverged, 'run')} diverged: a difference needs two; give more --seeds"
            )
        sides = list(zip(*pairs, strict=True))
        first, second = ([100 * row["test_accuracy"] for row in side] for side in sides)
        found = {
            "names": [names[0], names[place]],
            "test_accuracy": paired.difference(first, second)
            | {"correlation": _correlation(first, second)},
            "test_loss": paired.difference(*([row["test_loss"] for row in side] for side in sides)),
            "per_class": _per_class(pairs, class_names),
            "sequential": None,
        }
        if looks:
            differences = [b - a for a, b in zip(first, second, strict=True)]
            found["sequential"] = paired.anytime(differences) | {"looks": list(looks)}
        comparisons.append(found)
    for found in comparisons:
        found["in_words"] = sentence(found, len(comparisons))
    return comparisons


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(first, second)[0, 1])


def _per_class(pairs: Sequence[tuple[Mapping, Mapping]], class_names: Sequence[str]) -> list[dict]:
    found = []
    for k, name in enumerate(class_names):
        both = [(a["per_class"][k], b["per_class"][k]) for a, b in pairs]
        if any(value is None or math.isnan(value) for pair in both for value in pair):
            continue  # a class without test images
        first, second = ([100 * value for value in side] for side in zip(*both, strict=True))
        difference = spread([b - a for a, b in zip(first, second, strict=True)])
        means = [sum(first) / len(first), sum(second) / len(second)]
        found.append({"class": name, "means": means, **difference})
    return found


def sentence(found: Mapping, comparisons: int = 1) -> str:
    """Returns what a comparison says, in words.

    Args:
      found: of `against_first`.
      comparisons: how many are made at once: each must then reach 0.05 / comparisons (Bonferroni).
    """
    first, second = (f"{name!r}" for name in found["names"])
    shown, sequential = found["test_accuracy"], found["sequential"]
    seeds = counted(shown["n"], "seed")
    mean, reach, p = shown["mean"], shown["reach"], shown["p_t"]
    if p == 0:  # equal differences, of steps of an accuracy: no certainty
        p = shown["p_permutation"]
    if sequential:
        reach, p = sequential["reach"], sequential["p"]
    if p >= LEVEL / comparisons:
        within = f"±{reach:.2f} points" if math.isfinite(reach) else "the interval has no end yet"
        return (
            f"{second} and {first} cannot be told apart with {seeds}: "
            f"{mean:+.2f} points ({within}, p = {p:.2g})"
        )
    better = "better" if mean > 0 else "worse"
    low, high = sorted((abs(mean) - reach, abs(mean) + reach))
    return (
        f"{second} is {better} than {first} by {abs(mean):.2f} points "
        f"(95 % interval {low:.2f} to {high:.2f}, p = {p:.2g}, {seeds})"
    )


def text_of(summary: Mapping) -> str:
    """Returns the report of what `summary.json` of a comparison holds."""
    variants, lines = summary["variants"], []
    width = max(len(variant["name"]) for variant in variants)
    for variant in variants:
        shown, loss = variant["test_accuracy"], variant["test_loss"]
        text = "all diverged"
        if shown:
            std = f" ± {_number(shown['std'])}"
            text = f"test accuracy {shown['mean']:.2f}{std} %, loss {loss['mean']:.4f}"
        lost = f", {len(variant['diverged'])} diverged" if variant["diverged"] else ""
        cost = f"{variant['parameters']:,} weights, {variant['seconds_a_run']:.1f} s a run"
        lines.append(f"  {variant['name']:<{width}}  {text}  n {variant['runs']}{lost}, {cost}")
    for found in summary["comparisons"]:
        lines += ["", *lines_of(found)]
    if len(summary["comparisons"]) > 1:
        count = len(summary["comparisons"])
        lines.append(
            f"\n{count} comparisons at once: a difference counts as shown from p below "
            f"{LEVEL / count:.2g} on (Bonferroni); intervals are each by itself"
        )
    if summary["variants_in_programs"] < len(variants):
        lines.append("\nVariants of one program train side by side: their seconds are its mean")
    return "\n".join(lines)


def lines_of(found: Mapping) -> list[str]:
    """Returns the report of one comparison, of `against_first`, its sentence last."""
    accuracy, loss, sequential = found["test_accuracy"], found["test_loss"], found["sequential"]
    first, second = found["names"]
    lines = [f"{second} - {first}, {counted(accuracy['n'], 'pair')} by seed"]
    if sequential:
        lines.append(
            f"  test accuracy {sequential['mean']:+.3f} points, 95 % confidence sequence "
            f"{_interval(sequential)}; p = {sequential['p']:.2g} at whatever look it stops; looked "
            f"at {', '.join(map(str, sequential['looks']))} seeds"
        )
        lines.append("  (Wang and Ramdas 2023, arXiv:2310.03722: differences taken as normal)")
    else:
        lines.append(
            f"  test accuracy {accuracy['mean']:+.3f} points, 95 % interval {_interval(accuracy)}; "
            f"p = {accuracy['p_t']:.2g} (paired t), {accuracy['p_permutation']:.2g} (permutation)"
        )
        low, high = loss["interval_95"]
        lines.append(
            f"  test loss     {loss['mean']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; "
            f"p = {loss['p_t']:.2g} (paired t)"
        )
    needs = accuracy["seeds_to_show"].items()
    shown = ", ".join(f"{points} points: {n:,}" for points, n in needs if n)
    lines.append(
        f"  a difference has std {_number(accuracy['std'])} (correlation by seed "
        f"{_number(accuracy['correlation'])}); seeds that would show (4 times of 5) {shown}"
    )
    width = max((len(row["class"]) for row in found["per_class"]), default=0)
    for row in found["per_class"]:
        a, b = row["means"]
        lines.append(
            f"  {row['class']:<{width}}  {a:5.1f} -> {b:5.1f} %  {row['mean']:+5.1f} points, "
            f"95 % interval {_interval(row, 1)}"
        )
    return [*lines, f"=> {found['in_words']}"]


def _interval(found: Mapping, digits: int = 2) -> str:
    low, high = found["interval_95"]
    if low is None or not math.isfinite(low):  # None in JSON that was read again
        return "without end"
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def draw(found: Mapping, rows: Sequence[Mapping], place: int, path: str | Path) -> str | Path:
    """Draws every seed's difference with their mean and its interval, and every class's.

    Args:
      found: a comparison with the first variant, from `against_first`.
      rows, place: whose it is, as `pairs_of` takes them.
      path: where the PNG goes.
    """
    from cifar_jax.reporting import plots

    pairs = pairs_of(rows, place)
    differences = [100 * (b["test_accuracy"] - a["test_accuracy"]) for a, b in pairs]
    whole = found["sequential"] or found["test_accuracy"]
    classes = found["per_class"][:20]
    with plots.drawing(path, 10, max(3.2, 1.2 + 0.24 * len(classes)), palette=256) as figure:
        figure.suptitle(plots.short(found["in_words"], 130), x=0.01, ha="left", fontsize=10)
        left, right = figure.subplots(1, 2)
        places = range(len(differences))
        left.plot(sorted(differences), places, "o", color=plots.BLUE, ms=4, label="a seed's pair")
        low, high = whole["interval_95"]
        left.axvline(whole["mean"], color=plots.ORANGE, lw=1.8, label="mean")
        if math.isfinite(low):
            left.axvspan(low, high, color=plots.ORANGE, alpha=0.2, lw=0, label="95 % interval")
        left.set(title="Every pair", xlabel="difference in test accuracy, points")
        left.set_yticks([])
        left.legend(fontsize=8.5, loc="lower right")
        at = range(len(classes))[::-1]
        errors = [max(row["mean"] - row["interval_95"][0], 0.0) for row in classes]
        right.errorbar([r["mean"] for r in classes], at, xerr=errors, fmt="o", color=plots.BLUE)
        right.set_yticks(at, [plots.short(row["class"], 16) for row in classes])
        right.set(title="By class, 95 % intervals", xlabel="difference, points")
        for axis in (left, right):
            axis.axvline(0, color=plots.QUIET, lw=0.9, ls=(0, (4, 3)), zorder=0)
            axis.grid(axis="x")
            axis.set_axisbelow(True)
    return path
