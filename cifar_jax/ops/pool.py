"""What follows a convolution over phases: bias, relu and the 2x2 max pool, fused, with their
gradients by hand.

The gradient of the pool goes to the first largest of the four pixels, row by row, and that of
relu at 0 is 0: what PyTorch does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops.layout import materialize

# Numbers from which adding them up for the bias gradient is faster as a product with ones, which
# runs on all cores, than as a sum. Two AVX-512 cores: the layers of b4, b16 and b20 prefer the
# sum, those of b64 and b128 the product.
ONES_FROM = 400_000

_DEAD = 4  # winner index of a pool window that relu cut off


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.zeros((), x.dtype))


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
    column = bias.reshape(1, 1, -1, 1, 1)
    z = materialize(lambda y, column: _relu(y + column), y, column)
    return z, z


def _relu_backward(z, dz):
    g = materialize(lambda z, dz: jnp.where(z > 0, dz, jnp.zeros((), dz.dtype)), z, dz)
    p, _, features = g.shape[:3]
    return g, _bias_gradient(g.reshape(p * p, features, -1))


bias_relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def bias_relu_pool(y: jax.Array, bias: jax.Array) -> jax.Array:
    """max over 2x2 of relu(y + bias): float [P, P, F, h, L], P even -> [P/2, P/2, F, h, L]."""
    return materialize(lambda y, bias: _pool(y, bias)[0], y, bias)


def _pool(y, bias):
    """Returns the pooled z and, for every window, the index 0..3 of its winner or `_DEAD`."""
    p, _, features, h, length = y.shape
    q = y.reshape(p // 2, 2, p // 2, 2, features, h, length)
    a, b, c, d = q[:, 0, :, 0], q[:, 0, :, 1], q[:, 1, :, 0], q[:, 1, :, 1]
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    z = _relu(jnp.maximum(upper, lower) + bias.reshape(1, 1, -1, 1, 1))
    index = [jnp.int32(i) for i in range(_DEAD + 1)]
    winner = jnp.where(
        lower > upper,
        jnp.where(d > c, index[3], index[2]),
        jnp.where(b > a, index[1], index[0]),
    )
    return z, jnp.where(z > 0, winner, index[_DEAD])


def _pool_forward(y, bias):
    return materialize(_pool, y, bias)


def _unpool(winner, dz):
    """Gives every window's gradient to its winner: [P/2, P/2, F, h, L] -> [P, P, F, h, L]."""
    p, _, features, h, length = dz.shape
    code = jnp.arange(4, dtype=winner.dtype).reshape(1, 2, 1, 2, 1, 1, 1)
    won = winner[:, None, :, None] == code
    g = jnp.where(won, dz[:, None, :, None], jnp.zeros((), dz.dtype))
    return g.reshape(2 * p, 2 * p, features, h, length)


def _pool_backward(winner, dz):
    p, _, features = dz.shape[:3]
    dy = materialize(_unpool, winner, dz)
    alive = jnp.where(winner < _DEAD, dz, jnp.zeros((), dz.dtype))
    return dy, _bias_gradient(alive.reshape(p * p, features, -1))


bias_relu_pool.defvjp(_pool_forward, _pool_backward)
