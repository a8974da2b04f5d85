"""Settings in a file: `train --config FILE`, a TOML file or a run's `config.json`."""

from __future__ import annotations

import argparse
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_jax import _cli as cli
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.settings import Recipe

# What a file may hold beside the fields of a recipe, and of which types.
OTHERS: dict[str, tuple[type, ...]] = {
    "recipe": (str,),
    "seed": (int,),
    "seeds": (str,),
    "init_from": (str,),
    "image_size": (int,),
    "test_fraction": (float, int),
}
UNSET = (None, 0.0)  # what an option holds that was not given


def read(path: str) -> dict[str, Any]:
    """Returns the settings of a file by name.

    Raises:
      UserError: no such file, no TOML or JSON, an unknown name (the nearest is named), or a value
        of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_json = Path(path).suffix == ".json"
        values = json.loads(text) if is_json else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # of either, and of the encoding
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if is_json:
        values = _of_run(path, values)
    types = typing.get_type_hints(Recipe)
    for name, value in values.items():
        if name not in types and name not in OTHERS:
            raise UserError(
                f"--config {path}: unknown {name!r}; {nearest(name, [*types, *OTHERS])}"
            )
        allowed = OTHERS[name] if name in OTHERS else _allowed(types[name])
        good = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
        if good and allowed == (list,):
            good = all(isinstance(entry, str) for entry in value)
        if not good:
            wanted = {list: "list of names", str: "text in quotes", bool: "true or false"}
            what = wanted.get(allowed[0], "number" if float in allowed else "whole number")
            raise UserError(f"--config {path}: {name} must be a {what}, got {value!r}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _allowed(kind: Any) -> tuple[type, ...]:
    if kind is float:
        return (float, int)
    return (kind,) if kind in (int, str, bool) else (list,)


def _of_run(path: str, values: Any) -> dict[str, Any]:
    """Returns a run's `config.json` as settings."""
    from cifar_jax.training.workdir import read_config, show_seeds

    if Path(path).name != "config.json" or "recipe_name" not in values:
        raise UserError(f"--config {path}: a .json file must be a run's config.json; or write TOML")
    config = read_config(Path(path).parent)
    seeds = {"seeds": show_seeds(config.seeds)} if config.seeds else {"seed": config.seed}
    side = config.dataset["image_shape"][0]
    return {
        "recipe": config.recipe_name,
        **config.recipe.to_dict(),
        **seeds,
        **({"init_from": config.init_from["source"]} if config.init_from else {}),
        **({"image_size": side} if side != 32 else {}),
        **{k: config.dataset[k] for k in ("test_fraction",) if k in config.dataset},
    }


def apply(options: argparse.Namespace) -> None:
    """Puts what the file says where the command line says nothing. Raises `UserError`."""
    if options.config is None:
        return
    values = read(options.config)
    if "seeds" in values and "seed" in values:
        raise UserError(f"--config {options.config} has seed and seeds; give one of them")
    if getattr(options, "seeds", None) is not None or hasattr(options, "seed"):
        values = {k: v for k, v in values.items() if k not in ("seed", "seeds")}
    for name, parse in (("seeds", cli.seeds), ("seed", lambda value: cli.seed(str(value)))):
        if name in values:
            try:
                values[name] = parse(values[name])
            except argparse.ArgumentTypeError as error:
                raise UserError(f"--config {options.config}: {error}") from None
    if "recipe" in values and values["recipe"] != (options.recipe or values["recipe"]):
        raise UserError(
            f"--config {options.config} is of the recipe {values['recipe']}; leave --recipe out"
        )
    for name, value in values.items():
        if getattr(options, name, None) in UNSET and not (
            name in Recipe.__dataclass_fields__ and hasattr(options, name)
        ):
            setattr(options, name, value)


def text_of(name: str, recipe: Recipe, options: argparse.Namespace, seed: int) -> str:
    """Returns the settings of a command as TOML, which `--config` reads back."""
    values: Mapping[str, Any] = {"recipe": name, **recipe.to_dict()}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for key in OTHERS:
        value = getattr(options, key, None)
        if key == "seeds" and value:
            from cifar_jax.training.workdir import show_seeds

            value = show_seeds(value)
        if key == "seed" and not options.seeds:
            value = seed
        if key != "recipe" and value not in UNSET:
            lines.append(f"{key} = {_toml(value)}")
        elif key == "seed" and value == 0:
            lines.append("seed = 0")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON's texts, numbers, booleans and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False)
