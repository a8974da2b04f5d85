"""What a sweep found: a row of each run, the spread at each point, tables and pictures."""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path

from cifar_jax.replicas.sweep import by_point, shown
from cifar_jax.reporting import metrics_log, sweep_figures
from cifar_jax.reporting.console import counted
from cifar_jax.reporting.plots import attempt
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.files import write_json


def report(config, varied, points, rows, seconds, workdir: Path, say) -> dict:
    """Writes `results.csv`, `summary.json` and the pictures; prints the best points."""
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
    draw = functools.partial(
        sweep_figures.draw,
        names,
        found,
        heading=f"{heading}; best by {chosen_by.replace('_', ' ')}",
        chance=100 / len(config.dataset["class_names"]),
        best=ranked[0] if ranked else None,
    )
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
