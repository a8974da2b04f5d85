"""`report.html`: one page about a run, about many runs of one recipe, or of several side by side.

It is made from what lies in run directories, as a template filled in with values that are computed
here. It stands alone: pictures are inside, nothing is loaded, and only its filters need JavaScript.
What a directory lacks, one of an older version perhaps, the page names, and shows the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.datasets import Split
from cifar_jax.recipes import PUBLISHED, published_accuracies
from cifar_jax.reporting import figures, gallery, predictions, scores
from cifar_jax.reporting.console import best_epoch, counted
from cifar_jax.reporting.predictions import Predictions
from cifar_jax.reporting.run_files import (
    RunFiles,
    command,
    differences,
    facts,
    read_run,
    seeds_text,
)
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import replacing
from cifar_jax.settings import Recipe

NAME = "report.html"
PAIRS = 12  # most frequent mistakes listed
DISAGREED, ALL_WRONG = 200, 100  # images that the page of many runs shows

Context = dict[str, Any]


def write(folders: Sequence[Path], path: Path, tested: Split | None = None) -> Path:
    """Writes the page of one directory, or of several side by side.

    Args:
      folders: run directories, at least one.
      path: where the page goes.
      tested: the test split of the run's data set, for its gallery; None leaves that out.

    Returns:
      `path`.

    Raises:
      UserError: no run directory, a damaged one, or the file cannot be written.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    text = render(side_by_side(runs) if len(runs) > 1 else about(runs[0], tested))
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def render(context: Context) -> str:
    """Returns the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    return environment.get_template(NAME).render(context)


def percent(share: float | None, digits: int = 2) -> str:
    """Returns a share in [0, 1] as `74.51 %`, a dash where there is none."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.{digits}f}\u00a0%"


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with so many digits after the point, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"


# One run.


def about(run: RunFiles, tested: Split | None) -> Context:
    """Returns what the template shows of one directory: of a run, or of many of one recipe."""
    config = run.config
    context = {
        "title": f"{config['recipe_name']} on {config['dataset']['name']}",
        "subtitle": f"seeds {seeds_text(run.seeds)}" if run.seeds else f"seed {config['seed']}",
        "runs": [],
        "missing": run.missing,
        "facts": facts(run),
        "differences": differences(config),
        "command": command(config),
        "class_names": run.class_names,
        "spread": None,
        "phases": phases(run.summary),
        **_curves(run.rows),
    }
    said, validation = (None, None) if run.seeds else predictions.read(run.folder)
    if run.seeds:
        return context | _many(run, tested)
    context |= {"headline": _headline(run), "agreement": None, "diverged": []}
    context |= _classes(run) | _calibration(run, said, validation)
    chosen = gallery.choose(said, config["seed"]) if said is not None else []
    return context | {"gallery": _gallery(run, said, tested, chosen)}


def phases(summary: Mapping | None) -> list[tuple[str, float, float]]:
    """Returns (phase, seconds, share of the longest phase) of where the time went."""
    seconds = (summary or {}).get("seconds") or {}
    longest = max(seconds.values(), default=0) or 1
    return [(name, value, value / longest) for name, value in seconds.items()]


def _curves(rows: Sequence[Mapping]) -> Context:
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        return {"epochs": [], "curves": [], "best": None}
    drawn = [figures.curve(rows, "loss"), figures.curve(rows, "accuracy")]
    if len({row["learning_rate"] for row in epochs}) > 1:
        drawn.append(figures.learning_rate(rows))
    return {"epochs": epochs, "curves": drawn, "best": best_epoch(epochs)}


def _headline(run: RunFiles) -> list[tuple[str, str, str]]:
    """Returns (name, value, what there is to say of it)."""
    summary = run.summary
    if summary is None:
        return []
    correct, count = summary["test_correct"], summary["test_count"]
    low, high = scores.wilson_interval(correct, count)
    interval = (
        f"95 % interval {percent(low)} to {percent(high)} (Wilson: chance in the choice of images)"
    )
    tested = f"epoch {summary['tested_epoch']} of {summary['epochs']} tested"
    found = [
        (
            "Test accuracy",
            percent(summary["test_accuracy"]),
            f"{correct:,} of {count:,}. {interval}",
        ),
        ("Test loss", number(summary["test_loss"]), f"nats an image; {tested}"),
    ]
    config = run.config
    recipe = Recipe.from_dict(config["recipe"])
    for value in published_accuracies(config["recipe_name"], recipe, config["dataset"]["name"]):
        side = "inside" if low <= value / 100 <= high else "outside"
        difference = 100 * summary["test_accuracy"] - value
        found.append(
            ("Published", f"{value:g} %", f"this run {difference:+.2f} points; {side} its interval")
        )
    return [*found, *_cost(summary)]


def _cost(summary: Mapping) -> list[tuple[str, str, str]]:
    total, rate = sum((summary.get("seconds") or {}).values()), summary.get("images_per_second")
    speed = f"{rate:,.0f} training images/s" if rate else ""
    return [("Time", f"{total:,.1f} s", speed)]


def _classes(run: RunFiles) -> Context:
    """Per class and confused pairs, from the confusion matrix in `summary.json`."""
    counts = (run.summary or {}).get("confusion")
    if counts is None:
        if run.summary is not None:
            run.missing.append("The confusion matrix in summary.json, and with it the classes.")
        return {"classes": [], "confusion": None, "pairs": [], "published_classes": None}
    counts, names, config = np.asarray(counts), run.class_names, run.config
    recipe = Recipe.from_dict(config["recipe"])
    published = None
    if published_accuracies(config["recipe_name"], recipe, config["dataset"]["name"]):
        published = PUBLISHED[config["recipe_name"]].get("per_class")
    rows = [
        {"name": name, "count": int(counts[k].sum()), "correct": int(counts[k, k]), **row}
        for k, (name, row) in enumerate(zip(names, scores.by_class(counts), strict=True))
    ]
    return {
        "classes": rows,
        "published_classes": published,
        "confusion": figures.confusion(counts, names),
        "pairs": _pairs(counts, names),
    }


def _pairs(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    off = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    found = (np.unravel_index(at, off.shape) for at in order)
    return [
        (names[i], names[j], int(off[i, j]), off[i, j] / max(counts[i].sum(), 1))
        for i, j in found
        if off[i, j]
    ]


def _calibration(
    run: RunFiles, said: Predictions | None, validation: Predictions | None
) -> Context:
    nothing = {"calibration": [], "temperature": None, "reliability": None, "selective": None}
    nothing["kept"] = []
    if said is None:
        if run.summary is not None:
            run.missing.append(
                "predictions.npz: without it there is no calibration, no selective accuracy and no "
                "gallery. Runs of this version write it."
            )
        return nothing
    rows = [("as trained", scores.calibration(said.probabilities, said.labels))]
    after = temperature = None
    if validation is not None and len(validation.labels):
        temperature = scores.fit_temperature(validation.probabilities, validation.labels)
        scaled = scores.tempered(said.probabilities, temperature)
        rows.append(("after temperature scaling", scores.calibration(scaled, said.labels)))
        after = scores.reliability(scaled, said.labels)
    return {"temperature": temperature, **_sureness(said, rows, after)}


def _sureness(said: Predictions, rows: list, after: scores.Reliability | None = None) -> Context:
    kept, accuracy = scores.selective_accuracy(said.probabilities, said.labels)
    return {
        "calibration": rows,
        "reliability": figures.reliability(
            scores.reliability(said.probabilities, said.labels), after
        ),
        "selective": figures.selective(kept, accuracy),
        "kept": [(share, accuracy[max(round(share * len(kept)), 1) - 1]) for share in _SHARES],
    }


_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)


def _gallery(
    run: RunFiles,
    said: Predictions | None,
    tested: Split | None,
    chosen: Sequence[int],
    notes: Sequence[str] = (),
) -> gallery.Gallery | None:
    if said is None:
        return None
    if tested is None or len(tested) <= said.indices.max(initial=-1):
        run.missing.append("The test images, which are not here: there is no gallery.")
        return None
    return gallery.make(said, tested.images, run.class_names, chosen, notes)


# Many runs of one recipe.


def _many(run: RunFiles, tested: Split | None) -> Context:
    summary = run.summary
    nothing = {
        **{"headline": [], "diverged": [], "agreement": None, "gallery": None},
        **{"classes": [], "confusion": None, "pairs": [], "published_classes": None},
        **{"calibration": [], "temperature": None, "reliability": None, "selective": None},
        "kept": [],
    }
    if summary is None:
        return nothing
    found, ensemble, count = summary["test_accuracy"], summary["ensemble"], len(summary["runs"])
    accuracies = [100 * row["test_accuracy"] for row in summary["runs"]]
    scaled = {
        k: v * 100 if isinstance(v, float) else v for k, v in found.items() if k != "interval_95"
    }
    scaled["interval_95"] = [None if v is None else 100 * v for v in found["interval_95"]]
    published = [100 * value for value in summary.get("published_accuracy", [])]
    shown = figures.spread(accuracies, scaled, 100 * ensemble["test_accuracy"], published)
    low, high = found["interval_95"]
    interval = (
        f"95 % interval of the mean {percent(low)} to {percent(high)} (Student's t, n {count})"
    )
    right = f"{ensemble['test_correct']:,} of {ensemble['test_count']:,}"
    headline = [
        ("Mean test accuracy", percent(found["mean"]), interval),
        ("Standard deviation", percent(found["std"]), "of a run, over seeds"),
        ("Range", f"{percent(found['min'])} to {percent(found['max'])}", counted(count, "run")),
        ("Ensemble", percent(ensemble["test_accuracy"]), f"{right}: the mean of probabilities"),
    ]
    for value in published:
        below = sum(accuracy < value for accuracy in accuracies)
        headline.append(("Published", f"{value:.2f} %", f"{below} of {count} runs lie below it"))
    classes = [
        {
            "name": row["class"],
            "mean": row["mean"],
            "std": row["std"],
            "interval": row["interval_95"],
        }
        for row in summary["per_class"]
    ]
    context = nothing | {
        "headline": [*headline, *_cost(summary)],
        "spread": shown,
        "runs": summary["runs"],
        "classes": classes,
        "diverged": summary.get("diverged", []),
    }
    return context | _together(run, tested)


def _together(run: RunFiles, tested: Split | None) -> Context:
    """What the predictions of all runs say: the ensemble, and what the seeds disagree on."""
    mean: Any = 0.0
    predicted, each, first = [], [], None
    for row in run.summary["runs"]:
        labels = tested.labels if tested is not None else None
        said, _ = predictions.read(run.folder / f"seed-{row['seed']}", labels)
        if said is None or (first is not None and len(said.labels) != len(first.labels)):
            run.missing.append(
                f"predictions.npz of seed {row['seed']}: without it nothing is said of the "
                "ensemble's calibration, of what the seeds disagree on, and there is no gallery."
            )
            return {}
        first = first or said
        mean = mean + said.probabilities.astype(np.float64)
        predicted.append(said.predicted.astype(np.int32))
        each.append(scores.calibration(said.probabilities, said.labels))
    runs = len(predicted)
    ensemble = Predictions(mean / runs, first.labels, first.indices)
    found = scores.agreement(np.stack(predicted), first.labels)
    right = found["right"]
    average = {name: float(np.mean([row[name] for row in each])) for name in each[0]}
    whole = scores.calibration(ensemble.probabilities, ensemble.labels)
    rows = [("mean of the runs", average), ("ensemble", whole)]
    order = np.lexsort((np.abs(right - runs / 2), -found["classes"]))
    split = order[found["classes"][order] > 1][:DISAGREED]
    lost = np.flatnonzero(right == 0)
    lost = lost[np.argsort(-ensemble.confidence[lost], kind="stable")]
    chosen = [*split, *(i for i in lost[:ALL_WRONG] if i not in set(split.tolist()))]
    notes = [f"{right[i]} of {runs} runs right" for i in chosen]
    confusion = np.zeros((len(run.class_names),) * 2, np.int64)
    np.add.at(confusion, (ensemble.labels, ensemble.predicted), 1)
    return {
        **_sureness(ensemble, rows),
        "confusion": figures.confusion(confusion, run.class_names),
        "pairs": _pairs(confusion, run.class_names),
        "agreement": {
            **{"all_agree": found["all_agree"], "pairs": found["pairs"]},
            **{"all_right": float((right == runs).mean()), "none": float((right == 0).mean())},
            "figure": figures.seeds_right(right, runs),
        },
        "gallery": _gallery(run, ensemble, tested, chosen, notes),
    }


# Several side by side.


def side_by_side(runs: Sequence[RunFiles]) -> Context:
    """Returns what the template shows of several directories."""
    names = _names(runs)
    columns = [_column(run) for run in runs]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    missing = [
        f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.missing
    ]
    settings = [
        run.config["recipe"] | {"seed": seeds_text(run.seeds or [run.config["seed"]])}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    differing = {
        key: [str(values.get(key, "–")) for values in settings]
        for key in keys
        if len({str(values.get(key)) for values in settings}) > 1
    }
    rows_of = {name: run.rows for name, run in zip(names, runs, strict=True) if run.rows}
    classes = []
    if len({tuple(run.class_names) for run in runs}) == 1:
        per_class = [_class_accuracies(run) for run in runs]
        classes = [
            (name, [row[k] if row else None for row in per_class])
            for k, name in enumerate(runs[0].class_names)
        ]
    return {
        "title": f"{len(runs)} runs side by side",
        "names": names,
        "missing": missing,
        "table": [(label, [column.get(label, "–") for column in columns]) for label in labels],
        "differing": differing,
        "overlaid": figures.overlaid_curves(rows_of) if rows_of else None,
        "class_rows": classes,
        "commands": [(name, command(run.config)) for name, run in zip(names, runs, strict=True)],
    }


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Returns what to call the runs: their folders' names, or paths where names are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _column(run: RunFiles) -> dict[str, str]:
    summary, config = run.summary, run.config
    found = {"Recipe": config["recipe_name"], "Data set": config["dataset"]["name"]}
    if summary is None:
        return found
    if run.seeds:
        accuracy, loss = summary["test_accuracy"], summary["test_loss"]
        low, high = accuracy["interval_95"]
        found |= {
            "Test accuracy": percent(accuracy["mean"]),
            "95 % interval": f"{percent(low)} to {percent(high)} (t, n {accuracy['n']})",
            "Test loss": number(loss["mean"]),
        }
    else:
        low, high = scores.wilson_interval(summary["test_correct"], summary["test_count"])
        found |= {
            "Test accuracy": percent(summary["test_accuracy"]),
            "95 % interval": f"{percent(low)} to {percent(high)} (Wilson)",
            "Test loss": number(summary["test_loss"]),
            "Epoch tested": f"{summary['tested_epoch']} of {summary['epochs']}",
        }
        said, _ = predictions.read(run.folder)
        if said is not None:
            sure = scores.calibration(said.probabilities, said.labels)
            found |= {"ECE, 15 bins": percent(sure["ece"]), "Brier score": number(sure["brier"])}
    total = sum((summary.get("seconds") or {}).values())
    rate = summary.get("images_per_second")
    return found | {
        "Parameters": f"{summary.get('parameters', 0):,}",
        "Time": f"{total:,.1f} s",
        "Training images/s": number(rate, 0),
    }


def _class_accuracies(run: RunFiles) -> list[float | None] | None:
    if run.summary is None:
        return None
    key = "mean" if run.seeds else "accuracy"
    return [row[key] for row in run.summary["per_class"]]
