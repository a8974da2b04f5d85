"""What a run directory holds, read back for the page about it, and what there is to say of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_jax.datasets.own_images import IN_MEMORY
from cifar_jax.recipes import RECIPES
from cifar_jax.reporting.console import counted
from cifar_jax.reporting.metrics_log import read_metrics
from cifar_jax.runtime.errors import UserError
from cifar_jax.settings import Recipe, option_of


@dataclasses.dataclass
class RunFiles:
    """What a run directory holds, read back; None, or no rows, for what it lacks.

    Attributes:
      folder: the directory.
      config: of `config.json`.
      summary: of `summary.json`.
      rows: of `metrics.jsonl`; none of a directory of many runs.
      missing: a line for each thing that is missing, for the reader of the page.
    """

    folder: Path
    config: dict
    summary: dict | None
    rows: list[dict]
    missing: list[str]

    @property
    def seeds(self) -> list[int]:
        return self.config.get("seeds", [])

    @property
    def class_names(self) -> list[str]:
        return self.config["dataset"]["class_names"]

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> RunFiles:
    """Reads a run directory. Raises `UserError` where it is none."""
    missing: list[str] = []
    config = _read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} is not a run directory: it has no config.json")
    try:
        Recipe.from_dict(config["recipe"])
        config["dataset"]["class_names"], config["seed"], config["recipe_name"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error!r}") from None
    if config.get("axes"):
        raise UserError(f"{folder} is a sweep's: see its results.csv and plots")
    summary = _read_json(folder / "summary.json")
    _check_summary(folder / "summary.json", config, summary)
    if summary is None:
        missing.append("summary.json: the run is not complete; without it there are no results.")
    rows = []
    if not config.get("seeds"):
        try:
            rows = read_metrics(folder / "metrics.jsonl")
        except UserError as error:
            missing.append(f"metrics.jsonl, and with it the curves ({error}).")
        if not any(row["kind"] == "epoch" for row in rows):
            rows = []
            missing.append("An epoch in metrics.jsonl: none has ended, there are no curves.")
    return RunFiles(folder, config, summary, rows, missing)


_OF_ONE = ("test_accuracy", "test_correct", "test_count", "test_loss", "tested_epoch", "epochs")
_OF_MANY = ("test_accuracy", "test_loss", "ensemble", "runs")


def _check_summary(path: Path, config: Mapping, summary: Any) -> None:
    needed = ("per_class", *(_OF_MANY if config.get("seeds") else _OF_ONE))
    whole = isinstance(summary, dict) and all(name in summary for name in needed)
    if summary is not None and not whole:
        raise UserError(f"{path} is damaged: remove it, and train again to have the run tested")


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


# What was run.

BASE = "tutorial"


def differences(config: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns {setting: (its value, the recipe's)} of those that differ from the recipe's own."""
    usual = RECIPES.get(config["recipe_name"])
    if usual is None:
        return {}
    usual = usual.to_dict()
    given = config["recipe"]
    return {k: (v, usual[k]) for k, v in given.items() if k in usual and v != usual[k]}


def command(config: Mapping) -> str:
    """Returns the command that trains the same again, as a shell takes it; of a module or arrays
    that only Python has, the call.

    A `Recipe` without a name, from Python, is told as what differs from `BASE`.
    """
    named = config["recipe_name"] in RECIPES
    config = config if named else {**config, "recipe_name": BASE}
    module = ":" in config["recipe"]["model"] and not config.get("code")
    arrays = config["dataset"].get("version") == IN_MEMORY
    if module or arrays:
        return _call(config, module, arrays)
    words = ["python", "-m", "cifar_jax.train", "--recipe", config["recipe_name"]]
    for name, (value, _) in differences(config).items():
        option = option_of(name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif name == "model_option":  # one at a time: a value may hold commas
            words += [word for entry in value for word in (option, entry)]
        else:
            several = isinstance(value, (list, tuple))
            words += [option, ",".join(map(str, value)) if several else str(value)]
    if config.get("init_from"):
        words += ["--init-from", config["init_from"]["source"]]
    if config["dataset"].get("test_fraction"):
        words += ["--test-fraction", f"{config['dataset']['test_fraction']:g}"]
    side = config["dataset"].get("image_shape", [32])[0]
    words += ["--image-size", str(side)] if side != 32 else []
    seeds = config.get("seeds")
    words += ["--seeds", seeds_text(seeds)] if seeds else ["--seed", str(config["seed"])]
    return shlex.join(words)


def _call(config: Mapping, module: bool, arrays: bool) -> str:
    """Returns the call of `cifar_jax.fit`; arrays are told as `...`, a module as its class."""
    words = {name: repr(value) for name, (value, _) in differences(config).items()}
    if module:
        words["model"] = config["recipe"]["model"].replace(":", ".")
    data = words.pop("dataset", None)
    if data:
        words["data"] = "..." if arrays else data
    seeds = config.get("seeds")
    words |= {"seeds": repr(tuple(seeds))} if seeds else {"seed": repr(config["seed"])}
    given = [f"{name}={value}" for name, value in words.items()]
    return f"cifar_jax.fit({', '.join([repr(config['recipe_name']), *given])})"


def seeds_text(seeds: Sequence[int]) -> str:
    """Returns seeds as `--seeds` takes them."""
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}:{seeds[-1] + 1}"
    return ",".join(map(str, seeds))


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Returns what was run, and on what, as (name, value)."""
    config, summary = run.config, run.summary or {}
    data, seeds = config["dataset"], run.seeds
    found = [
        ("Recipe", config["recipe_name"]),
        ("Model", config["recipe"]["model"]),
        ("Data set", f"{data['name']} {data['version']}, fingerprint {data['fingerprint'][:12]}"),
        ("Seeds" if seeds else "Seed", seeds_text(seeds) if seeds else str(config["seed"])),
    ]
    if config.get("init_from"):
        found.append(("Starts from", config["init_from"]["source"]))
    if not summary:
        return found
    sizes = [summary.get(f"{part}_images", 0) for part in ("training", "validation")]
    device, cpu = summary.get("device", {}), summary.get("cpu", {})
    where = f"{device.get('count')} x {device.get('kind')} ({device.get('platform')})"
    if device.get("platform") == "cpu":
        where = f"{cpu.get('model')}, {counted(cpu.get('usable', 0), 'core')}"
    versions = [f"{k} {v}" for k, v in summary.get("versions", {}).items() if v]
    found += [
        ("Images", f"{sizes[0]:,} training, {sizes[1]:,} validation"),
        ("Parameters", f"{summary.get('parameters', 0):,}"),
        ("Precision", f"{config['recipe']['precision']}, convolutions {summary.get('lowering')}"),
        ("Device", where),
        ("Versions", ", ".join(versions)),
        ("Commit", _short_commit(summary.get("commit"))),
        ("Started", summary.get("started", "not recorded")),
    ]
    return found


def _short_commit(commit: str | None) -> str:
    if not commit:
        return "not from a checkout"
    head, _, dirty = commit.partition("-")
    return f"{head[:12]}, with changes" if dirty else head[:12]
