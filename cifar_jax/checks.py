"""What is looked at before and while training: a dry run, non-finite and stuck losses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import optimizers
from cifar_jax.errors import UserError
from cifar_jax.recipes import Recipe

# A loss within this of ln(classes) over the whole first epoch has not begun to fall.
STUCK_MARGIN = 0.01


def check_first_forward(run, state) -> str:
    """Evaluates the untrained model on one batch of training images.

    Returns:
      One line with its loss beside ln(classes), what guessing gives.

    Raises:
      UserError: its logits have another shape than [batch, classes], or are not finite.
    """
    from cifar_jax.steps import cross_entropy, inference_variables

    split, recipe = run.dataset.splits["train"], run.config.recipe
    chosen = run.training[: recipe.batch_size]
    with run.clock("dry run"):
        images = np.asarray(split.images[chosen])
        logits = np.asarray(run.predict(inference_variables(state), images[None]))[0]
    classes = len(run.dataset.class_names)
    if logits.shape != (len(chosen), classes):
        raise UserError(
            f"model {recipe.model} gives {logits.shape[1:]} values an image, "
            f"the data set has {classes} classes"
        )
    if not np.isfinite(logits).all():
        raise UserError(
            f"model {recipe.model} gives non-finite values before training; check its weights"
        )
    losses = jax.jit(cross_entropy)(logits, np.asarray(split.labels[chosen]))
    loss = np.asarray(losses).mean()
    return (
        f"Dry run    loss {loss:.3f} on one batch untrained; guessing gives {math.log(classes):.3f}"
    )


def check_loss(
    host: dict[str, np.ndarray],
    before: int,
    after: int,
    first_step: int,
    recipe: Recipe,
    steps_per_epoch: int,
    checkpoints,
) -> None:
    """Looks at the losses of steps before..after-1 of an epoch that began at `first_step`.

    Raises:
      UserError: one is not finite; the message gives its step, the learning rate, and the
        checkpoint that is left.
    """
    bad = np.flatnonzero(~np.isfinite(host["loss"][before:after]))
    if not len(bad):
        return
    step = first_step + before + int(bad[0])
    raise _diverged("the loss is", step, recipe, steps_per_epoch, checkpoints)


def check_weights(state, step: int, recipe: Recipe, steps_per_epoch: int, checkpoints) -> None:
    """Looks at the weights after `step` steps, before they replace an older checkpoint.

    A step of finite loss can still make them infinite, which only the next loss would show.

    Raises:
      UserError: one is not finite.
    """
    if not bool(_all_finite(state.params)):
        raise _diverged("weights are", step - 1, recipe, steps_per_epoch, checkpoints)


@jax.jit
def _all_finite(params) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _diverged(what: str, step: int, recipe: Recipe, steps_per_epoch: int, checkpoints) -> UserError:
    rate = optimizers.learning_rate(recipe, steps_per_epoch, step)
    newest = checkpoints.latest_step()
    kept = f"the checkpoint of step {newest} is kept" if newest is not None else "nothing saved yet"
    return UserError(
        f"{what} not finite at step {step + 1} (learning rate {rate:g}); {kept}. "
        f"Try --learning-rate {rate / 10:g}, --clip-norm 1 or --warmup-epochs 1, with --overwrite"
    )


def stuck_advice(loss: float, classes: int) -> list[str]:
    """Returns the lines to print when the first epoch taught nothing, else [].

    Args:
      loss: the first epoch's mean.
      classes: number of classes; guessing gives a loss of ln(classes).
    """
    chance = math.log(classes)
    if loss < chance - STUCK_MARGIN:
        return []
    return [
        f"warning: the loss stayed at {loss:.3f}; guessing gives {chance:.3f} "
        f"(ln {classes}). Check in this order:",
        "  - the learning rate: most of these networks learn between 0.1 and 0.001",
        "  - --normalize: inputs in [-1, 1] (half) start faster than in [0, 1] (unit)",
        "  - in your own loop: keep the state that train_step returns; the old one is unchanged",
        "  - in your own loop: make the optimizer state from the parameters you train",
        "  - labels and images in the same order",
    ]
