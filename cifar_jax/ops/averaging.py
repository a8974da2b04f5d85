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


def looked_ahead(
    average: Any, new: Any, step: int | jax.Array, every: int, total: int
) -> tuple[Any, Any]:
    """Returns the slow weights and the fast ones after a step of Lookahead (arXiv:1907.08610) as in
    airbench95: after each `every` steps the slow ones move to the fast, by 1 - 0.95^5 (n / total)^3
    after n steps, and the fast ones return to them. Between, both are as they were given.

    Args:
      average, new: trees of one layout, slow and fast.
      step: steps done before the one that gave `new`.
      total: steps of the run.
    """
    done = jnp.asarray(step) + 1
    kept = 0.95**5 * (done.astype(jnp.float32) / total) ** 3
    returns = done % every == 0

    def slow(old, x):
        weight = kept.astype(x.dtype)
        return jnp.where(returns, weight * old + (1 - weight) * x, old)

    average = jax.tree.map(slow, average, new)
    return average, jax.tree.map(lambda s, x: jnp.where(returns, s, x), average, new)
