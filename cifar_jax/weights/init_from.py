"""Weights a run starts from (`--init-from`), out of a file or of another run."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax import input_pipeline, optimizers
from cifar_jax.models import fold, init
from cifar_jax.parallel import programs as parallel_programs
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import setup
from cifar_jax.training.evaluation import Trained
from cifar_jax.weights import files as weight_files
from cifar_jax.weights.state_dict import (
    entries,
    layers_of,
    misfits,
    to_torch,
    variables_from_torch,
)


@dataclasses.dataclass(frozen=True)
class Initial:
    """Weights to start from.

    Attributes:
      variables: {"params", "batch_stats"}, float32; a layer that is not in it is drawn anew.
      record: for config.json: `source`, `sha256` of what was read (`files.content_hash`)
        and `redrawn`, the layers drawn anew.
      notices: lines to print before the run.
    """

    variables: dict[str, dict]
    record: dict
    notices: list[str]


def read(
    source: str | os.PathLike, which: str | int | None = None, trust_code: bool = False
) -> weight_files.Weights:
    """Reads a PyTorch state dict from a file of weights or from a run.

    Args:
      source: a file (`weight_files`), a run directory, its checkpoints or one of them.
      which: checkpoint of a run: `best`, `latest`, a step, or what the recipe would test.

    Raises:
      UserError: it is neither, or cannot be read.
    """
    if Path(source).is_dir():
        return of_run(source, which, trust_code)[1]
    if which is not None:
        raise UserError(f"{source} is no run directory, so there is no {which} checkpoint in it")
    return weight_files.read(source)


def of_run(source: str | os.PathLike, which: str | int | None = None, trust_code: bool = False):
    """Returns (`evaluation.Trained`, its weights as `files.Weights`) of a run."""
    from cifar_jax.training import evaluation

    trained = evaluation.load(source, which, trust_code=trust_code)
    variables = unfolded(trained)
    torch_layers, notices = layers_of(trained.model, variables)
    state = to_torch(**variables, torch_layers=torch_layers)
    return trained, weight_files.Weights(state, [*trained.notices, *notices], {})


def load(
    source: str | os.PathLike,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    trust_code: bool = False,
) -> Initial:
    """Reads weights for a model that may have another number of classes.

    Args:
      source: see `read`; of a run, what its recipe would test.
      image_shape: (H, W, C) of the images the model will see.

    Raises:
      UserError: it cannot be read or does not fit.
    """
    weights = read(source, trust_code=trust_code)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(functools.partial(init, model), jax.random.key(0), images)
    folded = fold.is_folded(variables["params"])
    if folded:
        whole = functools.partial(init, model.clone(fold=False))
        variables = jax.eval_shape(whole, jax.random.key(0), images)
    torch_layers, said = layers_of(model, variables)
    notices = list(dict.fromkeys([*weights.notices, *said]))
    try:
        state, variables, redrawn = _without_other_head(weights.state, variables, torch_layers)
        found = variables_from_torch(state, variables, torch_layers)
        if folded:
            found["params"] = fold.fold(found["params"])
    except UserError as error:
        raise UserError(f"--init-from {source}: {error}") from None
    digest = weight_files.content_hash(weights.state)
    notices.insert(0, f"Weights    from {source} (sha256 {digest[:12]})")
    if redrawn:
        name, had, has = redrawn
        notices.append(
            f"notice: {source} has {had} classes, this data set {has}: {name} is drawn anew"
        )
    record = {
        "source": str(source),
        "sha256": digest,
        "redrawn": [redrawn[0]] if redrawn else [],
    }
    return Initial(found, record, notices)


def _without_other_head(state: Mapping[str, np.ndarray], variables: Mapping, torch_layers):
    """Takes the last layer out of both where it differs in the number of classes alone.

    Returns:
      state, variables, and None or (layer, classes in the state, classes of the model).
    """
    wanted = entries(variables, torch_layers)
    shapes = {entry.name: np.shape(state.get(entry.name)) for entry in wanted}
    linear = [entry for entry in wanted if len(entry.shape) == len(shapes[entry.name]) == 2]
    off = [entry for entry in linear if shapes[entry.name] != entry.shape]
    if len(off) != 1:  # no layer reads the last one: it alone may differ in its outputs only
        return state, variables, None
    head, had, has = off[0].path[1:-1], shapes[off[0].name][0], off[0].shape[0]
    of_head = {entry.name: (had, *entry.shape[1:]) for entry in wanted if entry.path[1:-1] == head}
    if misfits(state, {entry.name: entry.shape for entry in wanted} | of_head):
        return state, variables, None
    state = {name: value for name, value in state.items() if name not in of_head}
    kept = {path: leaf for path, leaf in flatten_dict(variables).items() if path[1:-1] != head}
    return state, unflatten_dict(kept), ("/".join(head), had, has)


def unfolded(trained: Trained) -> dict[str, Any]:
    """Returns `trained.variables` with all 49 blocks of VGG16's folded layer, for use elsewhere.

    The blocks before the first step are no part of a checkpoint: they are drawn again from the
    run's seed, or read again from the weights it started from. Variables without a folded layer
    are returned as they are.

    Raises:
      UserError: the weights it started from are gone or changed.
    """
    params, config = trained.variables["params"], trained.config
    if not fold.is_folded(params):
        return trained.variables
    recipe, shrunk = config.recipe, 1.0
    frozen = any(optimizers.layer_matches(fold.LAYER, prefix) for prefix in recipe.freeze)
    if recipe.weight_decay and not frozen:
        optimizer = optimizers.make_optimizer(recipe, config.steps_per_epoch)
        shrunk = fold.spread(optimizer, trained.step, recipe.ema_decay)
    if config.init_from is None:
        key = input_pipeline.run_keys(config.seed)["state"]
        shape = setup.input_shape(recipe, config.dataset["image_shape"])
        params = unfold_initial(params, trained.model, key, shape, shrunk)
    else:
        params = fold.unfold(params, jnp.asarray(_given_kernel(trained)), shrunk)
    return {**trained.variables, "params": params}


def _given_kernel(trained: Trained) -> np.ndarray:
    """The unfolded kernel in the weights that a run started from."""

    config, model = trained.config, trained.model.clone(fold=False)
    given = config.init_from
    what = f"{fold.LAYER} is folded, and to unfold it takes the weights the run started from"
    try:
        shape = setup.input_shape(config.recipe, config.dataset["image_shape"])
        found = load(given["source"], model, shape)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if found.record["sha256"] != given["sha256"]:
        raise UserError(f"{what}: {given['source']} has changed since")
    return found.variables["params"][fold.LAYER]["kernel"]


def unfold_initial(
    params, model: nn.Module, key: jax.Array, image_shape: Sequence[int], spread: float = 1.0
):
    """Returns folded parameters unfolded with the blocks that `create_state(model, ..., key)`
    draws; others as they are. `spread` as in `fold.unfold`."""
    if not fold.is_folded(params):
        return params
    draw = functools.partial(fold.initial_kernel, model, image_shape=tuple(image_shape))
    init_key = jax.random.split(key)[0]  # as `create_state` splits it
    numbers = fold.BLOCKS * params[fold.LAYER][fold.MEAN_KERNEL].size
    draw = parallel_programs.compile_for_one_call(draw, numbers)
    return fold.unfold(params, draw(init_key), spread)
