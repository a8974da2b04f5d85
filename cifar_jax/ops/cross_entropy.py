"""The loss of a classifier, in the form that is fast where it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns softmax cross-entropy in nats, [B], of logits [B, C] and int labels [B].

    With smoothing s the target is (1 - s) one-hot + s / C, as PyTorch's `label_smoothing`.
    """
    if jax.default_backend() == "gpu":
        # A sum over the classes, of which one counts: a lookup and the scatter that is its gradient
        # are kernels of their own there.
        is_label = labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)[None]
        losses = -jnp.where(is_label, jax.nn.log_softmax(logits), 0).sum(axis=-1)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if isinstance(smoothing, jax.Array) or smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
        losses = (1 - smoothing) * losses + smoothing * uniform
    return losses
