"""What a sweep found: a row of each run, the spread at each point, tables and pictures."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

FIGURES = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "best_epoch")


def shown(point: Mapping) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in point.items()
    )


def rows_of(trained) -> list[dict]:
    """Tests a trained group; returns what is found of each run, None where it diverged."""
    from cifar_jax.replicas.results import test_group
    from cifar_jax.reporting import console

    sums, _, lost = test_group(trained)
    rows = []
    for i, best in enumerate(trained.at.best_rows):
        tested = console.rates({name: sums[name][i] for name in ("loss", "correct", "count")})
        last = [row for row in trained.rows[i] if row["kind"] == "epoch"][-1:]
        shown = best if trained.group.recipe.select_best else (last[0] if last else None)
        shown = shown or {}
        found = {
            "test_accuracy": tested["accuracy"],
            "test_loss": tested["loss"],
            "validation_accuracy": shown.get("validation_accuracy"),
            "validation_loss": shown.get("validation_loss"),
            "best_epoch": best["epoch"] if best else None,
        }
        row = dict.fromkeys(FIGURES) if i in lost else found
        rows.append({**row, "diverged_at_step": lost.get(i)})
    return rows


def by_point(points: Sequence[Mapping], rows: Sequence[Mapping]) -> list[dict]:
    """Returns, of every point, its values, how many of its runs diverged, and the spread of what
    the others found (None where all diverged)."""
    from cifar_jax.replicas.statistics import spread

    found = []
    for place, point in enumerate(points):
        mine = [row for row in rows if row["point"] == place]
        good = [row for row in mine if row["diverged_at_step"] is None]
        summary = {"values": dict(point), "runs": len(mine), "diverged": len(mine) - len(good)}
        for name in FIGURES[:4]:
            values = [row[name] for row in good if row[name] is not None]
            summary[name] = spread(values) if values else None
        found.append(summary)
    return found


def report(config, varied, points, rows, seconds, workdir: Path, say) -> dict:
    """Writes `results.csv`, `summary.json` and the pictures; prints the best points."""
    from cifar_jax.reporting import metrics_log
    from cifar_jax.reporting.console import counted
    from cifar_jax.reporting.plots import attempt
    from cifar_jax.runtime.environment import environment
    from cifar_jax.runtime.files import write_json
    from experiments import figures

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (workdir / "results.csv").write_text(text.getvalue(), encoding="utf-8")
    found = by_point(points, rows)
    # As the weights are: by validation images, where there are any.
    validated = any(point["validation_accuracy"] for point in found)
    chosen_by = "validation_accuracy" if validated else "test_accuracy"
    ranked = sorted(
        (point for point in found if point[chosen_by]), key=lambda p: -p[chosen_by]["mean"]
    )
    diverged = sum(point["diverged"] for point in found)
    say("")
    runs = counted(len(rows), "run")
    say(f"{runs}, {diverged} diverged; the best points by {chosen_by.replace('_', ' ')}:")
    for point in ranked[:5]:
        accuracy = point["test_accuracy"]
        spread = f" ± {100 * accuracy['std']:.2f}" if accuracy["n"] > 1 else ""
        say(f"  {shown(point['values'])}: test accuracy {100 * accuracy['mean']:.2f}{spread} %")
    names = [axis.name for axis in varied]
    heading = f"{config.recipe_name}, {runs}"
    draw = functools.partial(figures.sweep, names, found, heading=heading)
    pictures = [path for paths in attempt({workdir / "plots": draw}, say) for path in paths]
    summary = metrics_log.to_json(
        {
            **config.to_dict(),
            "points": found,
            "ranked_by": chosen_by,
            "best": ranked[0] if ranked else None,
            "seconds": seconds,
            **environment(),
        }
    )
    write_json(workdir / "summary.json", summary)
    written = ["results.csv", "summary.json", *(path.name for path in pictures)]
    say(f"Written to {workdir}: {', '.join(written)}")
    return summary
