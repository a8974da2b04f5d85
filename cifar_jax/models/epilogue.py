"""What follows a convolution over phases: bias, relu and the 2x2 max pool, fused, with their
gradients by hand.

The gradient of the pool goes to the first largest of the four pixels, row by row, and that of
relu at 0 is 0: what PyTorch does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.models.blocked import barrier

# Blocks in a layer from which the bias gradient is faster as a product with ones than as a sum.
# Two AVX-512 cores: b4 and b20 layers prefer the sum, b64 and b128 the product.
ONES_FROM = 1 << 20

_DEAD = 4  # winner index of a pool window that relu cut off


def _column(bias: jax.Array) -> jax.Array:
    return bias.reshape(-1, 1)


def _bias_gradient(g: jax.Array) -> jax.Array:
    """[Q, F, L] -> [F]."""
    q, features, length = g.shape
    rows = g.reshape(q * features, length)
    if rows.size >= ONES_FROM:
        ones = jnp.ones((length, 1), g.dtype)
        sums = lax.dot_general(rows, ones, (((1,), (0,)), ((), ())))
    else:
        sums = rows.sum(axis=1)
    return sums.reshape(q, features).sum(axis=0)


@jax.custom_vjp
def bias_relu(y: jax.Array, bias: jax.Array) -> jax.Array:
    """relu(y + bias): float [P, P, F, h, L] and [F] -> [P, P, F, h, L]."""
    return _relu_forward(y, bias)[0]


def _relu_forward(y, bias):
    p, _, features = y.shape[:3]
    flat = y.reshape(p * p, features, -1)
    z = barrier(jax.nn.relu(flat + _column(bias)[None]))
    return z.reshape(y.shape), z


def _relu_backward(z, dz):
    g = barrier(jnp.where(z > 0, dz.reshape(z.shape), jnp.zeros((), z.dtype)))
    return g.reshape(dz.shape), _bias_gradient(g)


bias_relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def bias_relu_pool(y: jax.Array, bias: jax.Array) -> jax.Array:
    """max over 2x2 of relu(y + bias): float [P, P, F, h, L], P even -> [P/2, P/2, F, h, L]."""
    a, b, c, d = _quarters(y)
    top = jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
    z = barrier(jax.nn.relu(top + _column(bias)[None, None]))
    return z.reshape(_pooled_shape(y))


def _pooled_shape(y):
    p, _, features, h, length = y.shape
    return p // 2, p // 2, features, h, length


def _quarters(y):
    """[P, P, F, h, L] -> the four pixels of every window, each [P/2, P/2, F, h*L]."""
    p, _, features = y.shape[:3]
    q = y.reshape(p // 2, 2, p // 2, 2, features, -1)
    return q[:, 0, :, 0], q[:, 0, :, 1], q[:, 1, :, 0], q[:, 1, :, 1]


def _pool_forward(y, bias):
    a, b, c, d = _quarters(y)
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    z = jax.nn.relu(jnp.maximum(upper, lower) + _column(bias)[None, None])
    one = jnp.int32(1)
    winner = jnp.where(
        lower > upper,
        jnp.where(d > c, 3 * one, 2 * one),
        jnp.where(b > a, one, 0 * one),
    )
    winner = jnp.where(z > 0, winner, _DEAD * one)
    z, winner = barrier((z, winner))
    return z.reshape(_pooled_shape(y)), winner


def _pool_backward(winner, dz):
    p, _, features, h, length = dz.shape
    d = barrier(dz.reshape(winner.shape))
    code = jnp.arange(4, dtype=jnp.int32).reshape(1, 2, 1, 2, 1, 1)
    g = jnp.where(winner[:, None, :, None] == code, d[:, None, :, None], jnp.zeros((), d.dtype))
    g = barrier(g)
    dy = g.reshape(2 * p, 2 * p, features, h, length)
    return dy, _bias_gradient(g.reshape(4 * p * p, features, -1))


bias_relu_pool.defvjp(_pool_forward, _pool_backward)
