"""What is looked at before and while training: a dry run, non-finite and stuck losses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import optimizers
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError

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


@jax.jit
def all_finite(params) -> jax.Array:
    """Returns whether every number of a tree of parameters is finite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def diverged(
    what: str, step: int, recipe: Recipe, steps_per_epoch: int, saved: int | None
) -> UserError:
    """Returns the error of a run whose `loss` or `weights` are not finite.

    Args:
      step: which made them so, counted from 1.
      saved: the newest checkpoint's step, None where there is none.
    """
    what = {"loss": "the loss is", "weights": "weights are"}[what]
    rate = optimizers.learning_rate(recipe, steps_per_epoch, step - 1)
    kept = f"the checkpoint of step {saved} is kept" if saved is not None else "nothing saved yet"
    return UserError(
        f"{what} not finite at step {step} (learning rate {rate:g}); {kept}. "
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
