"""What is looked at before and while training: a dry run, non-finite and stuck losses."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import optimizers
from cifar_jax.models import init, mode, own
from cifar_jax.runtime.errors import UserError
from cifar_jax.settings import Recipe

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


def check_own(name: str, model: nn.Module, image_shape: tuple[int, int, int], classes: int) -> None:
    """Calls a network of the user's own on abstract images, in both modes; nothing is computed.

    Args:
      image_shape: (H, W, C) of what it reads.

    Raises:
      UserError: a call fails (the layer and its input's shape are named), or the network gives
        something else than logits [batch, classes].
    """
    failed: list[str] = []

    def watch(call, args, kwargs, context):
        try:
            return call(*args, **kwargs)
        except Exception:
            if not failed:
                layer = "/".join(context.module.path) or type(context.module).__name__
                shapes = [str(list(x.shape)) for x in args if hasattr(x, "shape")]
                failed.append(f" in {layer}{' of ' * bool(shapes)}{', '.join(shapes[:1])}")
            raise

    def call(images):
        key = jax.random.key(0)
        variables = init(model, key, images)
        rngs = {"params": key, "dropout": key}
        model.apply(variables, images, rngs=rngs, mutable=True, **mode(model, train=True))
        return model.apply(variables, images, **mode(model, train=False))

    try:
        with nn.intercept_methods(watch):
            logits = jax.eval_shape(call, jax.ShapeDtypeStruct((2, *image_shape), jnp.float32))
    except UserError:
        raise
    except Exception as error:
        raise own.call_failed(name, image_shape, "".join(failed), error) from error
    shape = getattr(logits, "shape", None)
    if shape != (2, classes):
        gives = f"[batch, {', '.join(map(str, shape[1:]))}]" if shape else type(logits).__name__
        raise UserError(
            f"--model {name} gives {gives}; the data set needs [batch, {classes}], one value a "
            "class (a constructor's num_classes is told how many)"
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
