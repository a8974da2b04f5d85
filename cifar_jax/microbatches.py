"""A batch's gradient as the sum over parts of it, one at a time: activations of one part only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def over_parts(
    gradients: Callable[..., tuple[Any, Any]],
    parts: int,
    axis_name: str | None,
    batch: dict[str, jax.Array],
    carried: Any,
    first_example: jax.Array,
) -> tuple[Any, Any]:
    """Adds up `gradients` over a batch cut into `parts` of equal length.

    A batch that does not divide is padded and masked. Batch normalisation sees a part at a time
    and its running statistics go from part to part, as when PyTorch accumulates.

    Args:
      gradients: `(part, carried, first_example) -> (sums, carried)`; `sums` is any tree that adds
        up over parts, and `first_example` the part's position in the global batch.
      axis_name: as in `train_step`.
      batch: arrays [B, ...] with a float `mask` [B].
      carried, first_example: of the whole batch.

    Returns:
      (sums over the batch, what its last part carries on).
    """
    size = batch["mask"].shape[0]
    length = -(-size // parts)
    parts = -(-size // length)

    def cut(x):
        padding = [(0, parts * length - size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(parts, length, *x.shape[1:])

    pieces = jax.tree.map(cut, batch)
    firsts = first_example + length * jnp.arange(parts, dtype=jnp.int32)

    def body(carry, piece_and_first):
        (totals, carried), (piece, first) = carry, piece_and_first
        sums, carried = gradients(piece, carried, first)
        return (jax.tree.map(jnp.add, totals, sums), carried), None

    one = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(gradients, one, carried, firsts[0])[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if axis_name is not None:  # a scan's carry must be marked the same before and after
        zeros, carried = lax.pcast((zeros, carried), axis_name, to="varying")
    return lax.scan(body, (zeros, carried), (pieces, firsts))[0]
