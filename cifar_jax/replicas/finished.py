"""Finished run directories side by side: one table, and where there are two of them a test of their
difference: by seed of many runs, by image (McNemar) of one run each."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.datasets import Dataset
from cifar_jax.replicas import comparison, paired
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import evaluation
from cifar_jax.training.workdir import Config, read_config, show_seeds

Load = Callable[[Config], Dataset]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run directory that is complete: of one run, or of many (`--seeds`)."""

    folder: Path
    config: Config
    summary: dict


def read(folders: Sequence[Path]) -> list[Finished]:
    """Reads run directories.

    Raises:
      UserError: fewer than two, one twice, one that is no complete run, or other test images.
    """
    if len(folders) < 2:
        raise UserError("name two or more finished run directories, or variants with --seeds 0:32")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("one of the run directories is named twice")
    runs = [_read(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        a, b = first.config.dataset, run.config.dataset
        if a["fingerprint"] != b["fingerprint"]:
            raise UserError(
                f"{first.folder} and {run.folder} were not tested on the same images: "
                f"{_data(a)} and {_data(b)}; their figures cannot be compared"
            )
    return runs


def _data(data: Mapping) -> str:
    """Returns e.g. `cifar10 3.0.2 (50,000 train, 10,000 test, a1b2c3d4)`."""
    sizes = ", ".join(f"{size:,} {name}" for name, size in data["sizes"].items())
    return f"{data['name']} {data['version']} ({sizes}, {data['fingerprint'][:8]})"


def _read(folder: Path) -> Finished:
    config = read_config(folder)
    if config.axes is not None:
        raise UserError(f"{folder} holds many settings, a sweep's or a comparison's; see its table")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        _figures(summary)
        sum(summary["seconds"].values())
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not complete: it has no summary.json; the command that began it goes on"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return Finished(folder, config, summary)


def _figures(summary: Mapping) -> dict:
    """{"test_accuracy", "std", "test_loss", "n"} of one run or of many."""
    accuracy, loss = summary["test_accuracy"], summary["test_loss"]
    if isinstance(accuracy, Mapping):
        return {
            "test_accuracy": accuracy["mean"],
            "std": accuracy["std"],
            "test_loss": loss["mean"],
            "n": accuracy["n"],
        }
    return {"test_accuracy": accuracy, "std": None, "test_loss": loss, "n": 1}


def settings_of(run: Finished) -> dict:
    """Returns what may differ between runs, as JSON holds it."""
    start = run.config.init_from
    return {
        **run.config.recipe.to_dict(),
        "init_from": start["sha256"][:12] if start else None,
        "seed": show_seeds(run.config.seeds) if run.config.seeds else run.config.seed,
    }


def rows_of(runs: Sequence[Finished]) -> list[dict]:
    """Returns a row of the table for each run: "run", the settings in which they differ,
    "test_accuracy" (a share; of many runs the mean, with "std" and "n"), "test_loss", "seconds" in
    all, and the "date" of `summary.json`."""
    every = [settings_of(run) for run in runs]
    differing = [name for name in every[0] if any(one[name] != every[0][name] for one in every)]
    rows = []
    for run, settings in zip(runs, every, strict=True):
        written = datetime.datetime.fromtimestamp((run.folder / "summary.json").stat().st_mtime)
        rows.append(
            {
                "run": str(run.folder),
                **{name: settings[name] for name in differing},
                **_figures(run.summary),
                "seconds": round(sum(run.summary["seconds"].values()), 1),
                "date": written.isoformat(" ", "minutes"),
            }
        )
    return rows


def answer(runs: Sequence[Finished], load: Load) -> dict:
    """Returns what a test says of two runs: {"comparisons": as `comparison.against_first`} of two
    directories of many runs with two seeds in common, {"mcnemar": as `paired.mcnemar`, or
    "left_out": why not} of two single runs; {} of others.

    Args:
      load: gives the data set of a config; not called where nobody needs it.
    """
    if len(runs) != 2:
        return {}
    first, second = runs
    if first.config.seeds and second.config.seeds:
        rows = [row for place, run in enumerate(runs) for row in _members(run, place)]
        common = {row["seed"] for row in rows if row["point"] == 0}
        common &= {row["seed"] for row in rows if row["point"] == 1}
        if len(common) < 2:
            return {}
        names, classes = [run.folder.name for run in runs], first.config.dataset["class_names"]
        return {"comparisons": comparison.against_first(names, rows, classes)}
    if first.config.seeds or second.config.seeds:
        return {}
    try:
        split = load(first.config).splits["test"]
        right = [_right(run, split) for run in runs]
    except UserError as error:
        return {"left_out": f"McNemar's test is left out: {error}"}
    return {"mcnemar": paired.mcnemar(*right)}


def _members(run: Finished, place: int) -> list[dict]:
    """The runs of a directory of many, as `comparison.pairs_of` takes them."""
    rows = []
    for path in sorted(run.folder.glob("seed-*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        rows.append(
            {
                **{name: summary[name] for name in ("seed", "test_accuracy", "test_loss")},
                "point": place,
                "diverged_at_step": None,
                "per_class": [row["accuracy"] for row in summary["per_class"]],
            }
        )
    return rows


def _right(run: Finished, split) -> np.ndarray:
    """bool [N]: which test images a single run has right."""
    file = run.folder / "probabilities.npy"  # of a run that was one of many
    if file.exists():
        probabilities = np.load(file)
    else:
        trained = evaluation.load(run.folder)
        size = run.config.recipe.eval_batch_size
        _, probabilities = evaluation.evaluate_split(
            *evaluation.programs(trained), trained.variables, split, trained.class_names, size
        )
    return probabilities.argmax(axis=-1) == np.asarray(split.labels)


def text_of(found: Mapping) -> str:
    """Returns the table, and what a test says of two runs."""
    rows = found["runs"]
    shown = [{name: _cell(name, row) for name in row if name not in ("std", "n")} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
    lines = ["  ".join(f"{name:<{width}}" for name, width in widths.items()).rstrip()]
    for row in shown:
        lines.append("  ".join(f"{row[name]:<{w}}" for name, w in widths.items()).rstrip())
    if "mcnemar" in found:
        lines += ["", *_mcnemar_lines(rows, found["mcnemar"])]
    if "left_out" in found:
        lines += ["", found["left_out"]]
    for one in found.get("comparisons", ()):
        lines += ["", *comparison.lines_of(one)]
    return "\n".join(lines)


def _cell(name: str, row: Mapping) -> str:
    value = row[name]
    if name == "test_accuracy":
        std = row["std"]
        spread = f" ± {100 * std:.2f} (n {row['n']})" if row["n"] > 1 and std is not None else ""
        return f"{100 * value:.2f} %{spread}"
    if name == "test_loss":
        return f"{value:.4f}" if value is not None and math.isfinite(value) else "nan"
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _mcnemar_lines(rows: Sequence[Mapping], found: Mapping) -> list[str]:
    first, second = (Path(row["run"]).name for row in rows)
    one, other, p = found["only_first"], found["only_second"], found["p"]
    told = "cannot be told apart"
    if p < paired.LEVEL:
        told = f"differ: {second if other > one else first} has more images right"
    return [
        f"Test images right in both {found['both']:,}, in {first} alone {one:,}, in {second} alone "
        f"{other:,}, in neither {found['neither']:,}",
        f"=> These two trained networks {told} (McNemar's exact test, p = {p:.2g}); other seeds of "
        "the same settings may differ as much: --seeds tells",
    ]
