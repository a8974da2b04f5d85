"""The moving average of a run's weights and of its batch normalisation's statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def moved(average: Any, new: Any, decay: float | jax.Array, step: int | jax.Array) -> Any:
    """Returns the moving average of a tree of arrays after one more step.

    The decay is min(decay, (1 + step) / (10 + step)), as of TensorFlow's
    `tf.train.ExponentialMovingAverage(decay, num_updates=step)`: a high one would otherwise keep
    the drawn weights for thousands of steps. Integers are taken as they are, not averaged.

    Args:
      average, new: trees of one layout.
      decay: in [0, 1); 0 gives `new`.
      step: steps done before the one that gave `new`.
    """
    count = jnp.asarray(step).astype(jnp.float32)
    rate = jnp.maximum(1 - decay, 9 / (10 + count))

    def move(old, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        weight = rate.astype(x.dtype)
        return weight * x + (1 - weight) * old

    return jax.tree.map(move, average, new)
