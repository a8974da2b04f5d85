"""Variants of a recipe, as `label_smoothing=0.1` or the name of another recipe, and the training of
all their runs with the same seeds: every variant is a point of a sweep."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cifar_jax.models import find
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import sweep as sweeps
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.settings import Recipe


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compared.

    Attributes:
      name: as it was given; of the recipe itself its name.
      recipe: all its settings.
    """

    name: str
    recipe: Recipe


def changes_of(text: str) -> dict:
    """Returns {field of `Recipe`: value} of `key=value` pairs with commas or spaces between them;
    what has no `=` belongs to the list before it, as in `augment=flip,translate`.

    Raises:
      UserError: an unknown setting, a value that is none, or a setting twice.
    """
    pairs: dict[str, str] = {}
    name = None
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        key, equals, value = part.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if equals and not (name == "rate_scale" and key not in sweeps.TYPES):
            name = key
            if name in pairs:
                raise UserError(f"the variant {text!r} names {name} twice")
            pairs[name] = value
        elif name is None:
            raise UserError(
                f"{part!r} is no variant: give key=value, as label_smoothing=0.1, or the name of "
                f"a recipe; {nearest(part, {*sweeps.TYPES, *RECIPES})}"
            )
        else:
            pairs[name] += f",{part}"
    found = {}
    for key, value in pairs.items():
        values = sweeps.parse(key, value).values
        if len(values) > 1:
            raise UserError(f"the variant {text!r} gives {key} several values; make a variant each")
        found[key] = values[0]
    return found


def parse(texts: Sequence[str], name: str, recipe: Recipe, given: Mapping) -> list[Variant]:
    """Returns the variants that texts name.

    Args:
      texts: each the name of a recipe, or what `changes_of` takes, "" for no change.
      name, recipe: what changes are made to.
      given: settings that all of them have (`recipe` has them already), apart from their changes.

    Raises:
      UserError: fewer than two, two that are the same thing, a change that is none, or another
        data set.
    """
    if len(texts) < 2:
        raise UserError('a comparison needs two variants, as --variants "" "label_smoothing=0.1"')
    found = []
    for text in map(str.strip, texts):
        start, changes = recipe, text
        if text in RECIPES:
            start, changes = RECIPES[text].replace(**given), ""
        variant = start.replace(**changes_of(changes))
        find(variant.model)
        found.append(Variant(text or name, variant))
    for i, variant in enumerate(found):
        for other in found[:i]:
            if effective(variant.recipe) == effective(other.recipe):
                raise UserError(
                    f"the variants {other.name!r} and {variant.name!r} do not differ in anything "
                    "that their runs depend on"
                )
    if len({variant.recipe.dataset for variant in found}) > 1:
        raise UserError("variants are compared on the same images: give them the same dataset")
    return found


def effective(recipe: Recipe) -> Recipe:
    """Returns a recipe that is equal for recipes whose runs are: what is not used is default."""
    usual, unused = Recipe(), ["eval_batch_size", "log_every", "remat"]
    unused += ["momentum", "nesterov"] if recipe.optimizer != "sgd" else []
    unused += ["step_epochs", "step_factor"] if recipe.schedule != "step" else []
    unused += ["warmup_epochs"] if recipe.schedule == "onecycle" else []
    return recipe.replace(**{name: getattr(usual, name) for name in unused})


def points_of(variants: Sequence[Variant]) -> tuple[list[sweeps.Axis], list[dict]]:
    """Returns the settings in which variants differ as axes, and each variant as a point."""
    recipes = [variant.recipe for variant in variants]
    names = [
        field.name
        for field in dataclasses.fields(Recipe)
        if len({getattr(recipe, field.name) for recipe in recipes}) > 1
    ]
    axes = [sweeps.Axis(name, "", ()) for name in names]
    return axes, [{name: getattr(recipe, name) for name in names} for recipe in recipes]


class Comparison(sweeps.Sweep):
    """The runs of all variants with the same seeds, in as few programs as there can be."""

    title = "Compare"

    def __init__(self, config, dataset, variants: Sequence[Variant], options, process):
        work = functools.partial(sweeps.rows_of, by_class=True)
        axes, points = points_of(variants)
        config = dataclasses.replace(config, recipe=variants[0].recipe)
        super().__init__(config, dataset, axes, points, options, process, work)

    def costs(self) -> list[dict]:
        """Returns, of each variant, {"parameters", "seconds_a_run"} (of training), as far as
        trained; variants of one program train together, and share its seconds alike."""
        found = []
        for place in range(len(self.points)):
            mine = [part for part in self.parts if place in part["points"]]
            runs, seconds = (sum(part[name] for part in mine) for name in ("runs", "seconds"))
            parameters = mine[0]["parameters"]
            found.append({"parameters": parameters, "seconds_a_run": seconds / runs})
        return found


def train_in_looks(
    comparison: Comparison, size: int, workdir: Path, stop, say
) -> Iterator[tuple[list[dict], dict]]:
    """Yields, after each `size` seeds more, the rows so far and {phase: seconds} so far."""
    whole, rows, seconds = comparison.config, [], {}
    for number, first in enumerate(range(0, len(whole.seeds), size)):
        seeds = whole.seeds[first : first + size]
        comparison.config = dataclasses.replace(whole, seed=seeds[0], seeds=seeds)
        comparison.count = len(comparison.points) * len(seeds)
        more, spent = comparison.train(workdir / "groups" / f"look-{number}", stop, say)
        rows += more
        for phase, value in spent.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        yield sorted(rows, key=lambda row: row["point"]), dict(seconds)
