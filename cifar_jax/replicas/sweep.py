"""Settings of a recipe as axes: from `log:1e-3:1:12` and `0,0.9` to the points of a grid or of
chance, their programs, and what was found at each point."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax import settings
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.settings import Recipe
from cifar_jax.training.setup import TRACED

TYPES = typing.get_type_hints(Recipe)
MAX_POINTS = 10_000


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting of the recipe and the values it takes.

    Attributes:
      name: a field of `Recipe`.
      text: as it was given.
      values: what a grid tries.
      bounds: (kind, low, high) of a range, from which chance may draw between the values; None
        for a list.
    """

    name: str
    text: str
    values: tuple
    bounds: tuple[str, float, float] | None = None

    @property
    def is_traced(self) -> bool:
        """Whether runs that differ along this axis share a program."""
        return self.name in TRACED


def parse(name: str, text: str, random: bool = False) -> Axis:
    """Parses one axis.

    Args:
      name: a field of `Recipe`.
      text: values with commas, or `log:low:high:count` or `lin:low:high:count` for numbers. A
        field that is itself a list of names has one value.
      random: points are drawn by chance, so that a range needs no count.

    Raises:
      UserError: no such setting, or `text` is no list or range of its values.
    """
    if name not in TYPES:
        raise UserError(f"a recipe has no {name!r} to vary; {nearest(name, TYPES)}")
    option, kind = f"--{name.replace('_', '-')}", TYPES[name]
    if kind not in (int, float, str, bool):
        return Axis(name, text, (settings.parse_names(text),))
    if text.split(":")[0] in ("log", "lin"):
        return _range(name, text, option, kind, random)
    values = tuple(_value(part.strip(), option, kind) for part in text.split(","))
    if len(set(values)) < len(values):
        raise UserError(f"{option} {text} names a value twice")
    return Axis(name, text, values)


def _value(text: str, option: str, kind: type):
    if kind is bool and text in ("true", "false"):
        return text == "true"
    try:
        if text and kind is not bool:
            return kind(text)
    except ValueError:
        pass
    what = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}[kind]
    raise UserError(
        f"{option}: {text!r} is not {what}; examples of an axis: 0,0.9 and log:1e-3:1:12"
    )


def _range(name: str, text: str, option: str, kind: type, random: bool) -> Axis:
    how, *numbers = text.split(":")
    if kind not in (int, float):
        raise UserError(f"{option} is no number, so it has no range: name its values, as a,b")
    count = 2
    try:
        low, high = float(numbers[0]), float(numbers[1])
        if len(numbers) == 3 or not random:
            count = int(numbers[2])
        good = len(numbers) <= 3 and math.isfinite(low) and math.isfinite(high)
    except (ValueError, IndexError):
        good = False
    if not good:
        raise UserError(f"{option} {text}: a range is {how}:low:high:count, as log:1e-3:1:12")
    if not low < high or count < 2 or (how == "log" and low <= 0):
        raise UserError(
            f"{option} {text}: a range needs low below high{', both above 0,' * (how == 'log')} "
            "and a count of at least 2"
        )
    points = np.geomspace(low, high, count) if how == "log" else np.linspace(low, high, count)
    # Twelve digits: 0.1 and not 0.10000000000000002.
    values = [float(f"{value:.12g}") for value in points]
    if kind is int:
        values = sorted({round(value) for value in values})
    return Axis(name, text, tuple(values), (how, low, high))


def grid(axes: Sequence[Axis]) -> list[dict]:
    """Returns every combination of the axes' values, the last axis fastest."""
    count = math.prod(len(axis.values) for axis in axes)
    _check_count(count)
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip((a.name for a in axes), values, strict=True)) for values in combinations]


def by_chance(axes: Sequence[Axis], count: int, seed: int) -> list[dict]:
    """Returns `count` points, each axis drawn by itself: from a range uniformly (of the logarithm
    for `log`), from a list one of its values."""
    _check_count(count)
    rng = np.random.default_rng(seed)
    return [{axis.name: _draw(axis, rng) for axis in axes} for _ in range(count)]


def _draw(axis: Axis, rng: np.random.Generator):
    if axis.bounds is None:
        return axis.values[rng.integers(len(axis.values))]
    how, low, high = axis.bounds
    if how == "log":
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        value = rng.uniform(low, high)
    return round(value) if TYPES[axis.name] is int else float(f"{value:.6g}")


def _check_count(count: int) -> None:
    if count > MAX_POINTS:
        raise UserError(f"{count:,} points are more than {MAX_POINTS:,}; take fewer values")


def programs_of(points: Sequence[Mapping], axes: Sequence[Axis]) -> list[tuple[dict, list[int]]]:
    """Sorts points by what their programs differ in.

    Returns:
      For each combination of values of axes that are not traced, that combination and the places
      of its points.
    """
    looped = [axis.name for axis in axes if not axis.is_traced]
    found: dict[tuple, list[int]] = {}
    for i, point in enumerate(points):
        found.setdefault(tuple(point[name] for name in looped), []).append(i)
    return [(dict(zip(looped, key, strict=True)), places) for key, places in found.items()]


def base_of(recipe: Recipe, points: Sequence[Mapping]) -> tuple[Recipe, dict[str, np.ndarray]]:
    """Returns the recipe whose program serves all points, and what it takes as arrays.

    Args:
      recipe: of all points, apart from the traced settings.
      points: each a dict that may hold traced settings.

    Returns:
      The recipe, with every traced setting that some point switches on, and {name: float32
      [points]}. A norm of 0 does not clip, and becomes an infinite one.
    """
    hparams, changes = {}, {}
    for name in TRACED:
        values = [point[name] for point in points if name in point]
        if not values:
            continue
        changes[name] = next((value for value in values if value), values[0])
        if name == "clip_norm":
            values = [value or math.inf for value in values]
        hparams[name] = np.array(values, np.float32)
    return recipe.replace(**changes), hparams


FIGURES = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "best_epoch")


def shown(point: Mapping) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in point.items()
    )


def rows_of(trained, by_class: bool = False) -> list[dict]:
    """Tests a trained group; returns what is found of each run, None where it diverged.

    Args:
      by_class: whether "per_class", each class's share of images that are right, is among it.
    """
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
        if by_class:
            names = trained.group.run.dataset.class_names
            results = console.results(
                {k: v[i] for k, v in sums.items()}, sums["confusion"][i], names
            )
            row["per_class"] = [found["accuracy"] for found in results["per_class"]]
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


class Sweep:
    """All programs of a sweep, one after another.

    Args:
      varied: the settings in which the points differ.
      work: what `Groups` takes; returns `rows_of` a trained group.

    Attributes:
      parts: of each program trained, {"points": their places, "parameters", "seconds": of training
        of all its runs, "runs"}.
    """

    title = "Sweep"

    def __init__(
        self,
        config,
        dataset,
        varied: Sequence[Axis],
        points: Sequence[dict],
        options,
        process,
        work=rows_of,
    ):
        from cifar_jax.replicas import programs as replica_programs
        from cifar_jax.training.setup import Options

        self.config, self.dataset, self.points, self.options = config, dataset, points, options
        self.process, self.work = process, work
        self.programs = programs_of(points, varied)
        self.parts: list[dict] = []
        self.form = replica_programs.choose_form(options.replica_form)
        lowering = replica_programs.choose_lowering(self.form, options.conv)
        self.run_options = Options(lowering=lowering, save_minutes=options.save_minutes)
        self.count = len(points) * len(config.seeds)

    def train(self, workdir: Path, stop, say) -> tuple[list[dict], dict]:
        """Trains what is missing; returns a row for each run, and {phase: seconds}."""
        from cifar_jax.replicas import programs as replica_programs
        from cifar_jax.replicas import results as replica_results
        from cifar_jax.replicas import scheduler
        from cifar_jax.reporting.console import counted
        from cifar_jax.runtime.timing import Clock
        from cifar_jax.training import setup
        from cifar_jax.training.setup import make_run
        from cifar_jax.training.summary import machine_lines

        rows, seconds = [], {}
        runs, points = counted(self.count, "run"), counted(len(self.points), "point")
        what = f"{points}, {counted(len(self.config.seeds), 'seed')} each"
        programs = counted(len(self.programs), "program")
        say(f"{self.title:<10} {runs}: {what}, in {programs}; {workdir}")
        for number, (static, places) in enumerate(self.programs):
            runs = [(self.points[i], seed) for i in places for seed in self.config.seeds]
            # With the traced ones too: --nesterov alone, without its momentum, is no recipe.
            fixed = self.config.recipe.replace(**self.points[places[0]])
            base, hparams = base_of(fixed, [point for point, _ in runs])
            config = dataclasses.replace(self.config, recipe=base, axes=None)
            lowering = replica_programs.choose_lowering(self.form, self.options.conv, base.model)
            options = dataclasses.replace(self.run_options, lowering=lowering)
            run = make_run(config, self.dataset, options, Clock())
            if number == 0:
                for line in machine_lines(run):
                    say(line)
            members = [run.with_config(self._config_of(point, seed)) for point, seed in runs]
            plan = scheduler.make_plan(
                run,
                len(runs),
                self.form,
                self.options.devices,
                self.options.group_size,
                setup.swept_step_of(base, run.model, run.steps_per_epoch),
                self.process,
            )
            if static:
                say(f"Program {number + 1} of {len(self.programs)}: {shown(static)}")
            say(
                f"{counted(len(runs), 'run')} together, {plan.size} at a time, "
                f"form {plan.programs.form}, {replica_programs.describe_mesh(plan.programs.mesh)}"
            )
            groups = scheduler.Groups(
                members,
                plan,
                workdir / "groups" / f"program-{number}",
                self.work,
                hparams=hparams,
                names=[f"{shown(point)}, seed {seed}" for point, seed in runs],
            )
            done = groups.train(stop, say)
            results = [row for part in done for row in part["result"]]
            rows += [
                {"point": place, **self.points[place], "seed": seed, **row}
                for (place, seed), row in zip(
                    ((i, seed) for i in places for seed in self.config.seeds), results, strict=True
                )
            ]
            spent = replica_results.all_seconds(run, done)
            for phase, value in spent.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
            self.parts.append(
                {
                    "points": places,
                    "parameters": run.parameters,
                    "seconds": spent.get("training", 0.0),
                    "runs": len(runs),
                }
            )
        return sorted(rows, key=lambda row: row["point"]), seconds

    def _config_of(self, point: Mapping, seed: int):
        recipe = self.config.recipe.replace(**point, log_every=0)
        return dataclasses.replace(self.config, recipe=recipe, seed=seed, seeds=(), axes=None)
