"""What a recipe says, as the parts that the steps take: one place for training and for every
later use of the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax import optimizers, steps
from cifar_jax.models import model_of
from cifar_jax.parallel import hardware, programs
from cifar_jax.recipes import Recipe

Shape = tuple[int, int, int]


def input_shape(recipe: Recipe, image_shape: Sequence[int]) -> Shape:
    """Returns (H, W, C) of what the model reads, for images of `image_shape`."""
    height, width, channels = image_shape
    side = recipe.resize
    return (side, side, channels) if side else (height, width, channels)


def preprocess_of(recipe: Recipe) -> Callable[..., jax.Array]:
    """Returns the recipe's `preprocess` (`steps.make_preprocess`); without a key it does not
    augment."""
    return steps.make_preprocess(recipe.normalize, recipe.augment, recipe.precision, recipe.resize)


def state_maker(
    recipe: Recipe, model: nn.Module, steps_per_epoch: int, image_shape: Sequence[int]
) -> Callable[..., steps.TrainState]:
    """Returns `create(key, **options)`: `steps.create_state` of this recipe."""
    return functools.partial(
        steps.create_state,
        model,
        optimizers.make_optimizer(recipe, steps_per_epoch),
        image_shape=input_shape(recipe, image_shape),
        ema=recipe.ema_decay > 0,
        freeze=recipe.freeze,
    )


# Numbers of a recipe that a step takes as arrays: runs that differ in nothing else share programs.
TRACED = (*optimizers.TRACED, "label_smoothing", "ema_decay")


def step_of(
    recipe: Recipe,
    model: nn.Module,
    steps_per_epoch: int,
    hparams: Mapping[str, jax.Array] | None = None,
) -> Callable:
    """Returns `step(state, batch) -> (state, sums)`: `steps.train_step` of this recipe, with
    `hparams` in place of its own `TRACED` ones (see `optimizers.make_optimizer`)."""
    given = dict(hparams or {})
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizers.make_optimizer(recipe, steps_per_epoch, given),
        preprocess=preprocess_of(recipe),
        label_smoothing=given.get("label_smoothing", recipe.label_smoothing),
        ema_decay=given.get("ema_decay", recipe.ema_decay),
        freeze=recipe.freeze,
    )

    def in_microbatches(state, batch, **options):
        count = recipe.accumulate
        if count == 1:
            count = programs.microbatches(batch["label"].shape[0], state)
        return step(state, batch, accumulate=count, **options)

    return in_microbatches


def swept_step_of(recipe: Recipe, model: nn.Module, steps_per_epoch: int) -> Callable:
    """Returns `step(state, batch, axis_name=None, **hparams)`: `step_of` with the `hparams` it is
    called with."""

    def step(state, batch, axis_name=None, **hparams):
        swept = step_of(recipe, model, steps_per_epoch, hparams)
        return swept(state, batch, axis_name=axis_name)

    return step


def cpu_threads(recipe: Recipe, devices: str) -> int | None:
    """Returns `hardware.cpu_threads` of a recipe, its network sized for CIFAR-10. Starts no
    backend: the answer is for `hardware.select_platform`."""

    def weights() -> int:
        model = model_of(recipe, 10, "lax")
        images = jax.ShapeDtypeStruct((1, *input_shape(recipe, (32, 32, 3))), jnp.float32)
        shapes = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)
        return steps.parameter_count(shapes["params"])

    return hardware.cpu_threads(devices, recipe.batch_size, weights)


def inference_steps(recipe: Recipe, model: nn.Module) -> tuple[Callable, Callable]:
    """Returns `steps.eval_step` and `steps.predict_step` of this recipe."""
    parts = {"model": model, "preprocess": preprocess_of(recipe)}
    return tuple(functools.partial(step, **parts) for step in (steps.eval_step, steps.predict_step))


def payload(state, step_metrics: dict) -> dict:
    """Returns what a run's checkpoints hold: `record` is the sums of the epoch under way."""
    return {"state": state, "record": step_metrics}


def abstract_payload(shapes: steps.TrainState, steps_per_epoch: int) -> dict:
    """Returns `payload` as shapes, to restore into; `shapes` is the state's."""
    return payload(shapes, jax.eval_shape(lambda: programs.empty_metrics(steps_per_epoch)))
