"""What follows a convolution: bias, relu and the 2x2 max pool, fused, with their gradients by hand;
over phases (`layout.Blocked`) and over images.

The gradient of the pool goes to the first largest of the four pixels, row by row, and that of
relu at 0 is 0: what PyTorch does.
"""

from __future__ import annotations

import flax.linen as nn
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
    corners = q[:, 0, :, 0], q[:, 0, :, 1], q[:, 1, :, 0], q[:, 1, :, 1]
    return _winner(*corners, bias.reshape(1, 1, -1, 1, 1))


def _winner(a, b, c, d, bias):
    """The pool of windows a b / c d, and which of the four won."""
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    z = _relu(jnp.maximum(upper, lower) + bias)
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


@jax.custom_vjp
def bias_relu_pool_images(y: jax.Array, bias: jax.Array) -> jax.Array:
    """max over 2x2 of relu(y + bias): float [N, H, W, F] and [F] -> [N, H // 2, W // 2, F].

    The gradient by hand needs no `select_and_scatter`, which a GPU runs as a kernel of its own, and
    keeps a byte for each window instead of the pool's input.
    """
    # Flax's name for it, by keyword: jax2onnx (`export.py`) gets a bare `reduce_window` wrong.
    z = jax.nn.relu(y + bias.reshape(1, 1, 1, -1))
    return nn.max_pool(z, window_shape=(2, 2), strides=(2, 2))


def _images_forward(y, bias):
    n, height, width, features = y.shape
    q = y[:, : height // 2 * 2, : width // 2 * 2]
    q = q.reshape(n, height // 2, 2, width // 2, 2, features)
    corners = (q[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    z, winner = _winner(*corners, bias.reshape(1, 1, 1, -1))
    # Of the size and the type of y, which its gradient has, an empty array tells.
    return z, (winner.astype(jnp.int8), jnp.zeros((0, height, width, 0), y.dtype))


def _images_backward(kept, dz):
    winner, like = kept
    n, rows, columns, features = winner.shape
    code = jnp.arange(4, dtype=winner.dtype).reshape(1, 1, 2, 1, 2, 1)
    won = winner[:, :, None, :, None] == code
    dy = jnp.where(won, dz[:, :, None, :, None], jnp.zeros((), dz.dtype))
    dy = dy.reshape(n, 2 * rows, 2 * columns, features)
    odd = like.shape[1] - 2 * rows, like.shape[2] - 2 * columns
    dy = jnp.pad(dy, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))
    alive = jnp.where(winner < _DEAD, dz, jnp.zeros((), dz.dtype))
    return dy, alive.sum(axis=(0, 1, 2))


bias_relu_pool_images.defvjp(_images_forward, _images_backward)
