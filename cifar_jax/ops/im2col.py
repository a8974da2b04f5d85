"""Convolution as one matrix product over blocks of P x P outputs, with its gradients by hand.

A block of P x P outputs reads n x n inputs, n = P + k - 1. With the images in phases
(`ops/layout.py`) the patches V are made in two stages of slabs: first the n columns, then the n
rows,

    V [n*n*C, L],   L = h' * w' * N blocks,

and all P*P outputs of all blocks are one product with a kernel matrix E [n*n*C, P*P*F] that
holds the k x k kernel at the P*P places it can take in the n x n inputs, zero elsewhere:

    y [P*P*F, L] = E^T V,      dE [n*n*C, P*P*F] = V dy^T,      dV = E dy.

dW sums the P*P places out of dE; dx adds the slabs of dV back (`uncut`). The zeros cost
(P + k - 1)^2 / k^2 times the operations (1.44 for k = 5, P = 2), the larger product and the
fewer patches (n*n / P*P for each output instead of k*k) gain more.

Reverse-mode only: the gradient is a `custom_vjp`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops.layout import barrier, cut, materialize, uncut


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution over phases [m, m, C, h, w*batch].

    Attributes:
      block: m, outputs of a block along each direction (and the phases of the input).
      kernel: k.
      padding: zeros around the images.
      batch: images.
      height, width: rows and columns of the input images.
      tiles: (h, w) of the input.
      fresh: whether the phases were just cut from images (`first_stage`).
    """

    block: int
    kernel: int
    padding: int
    batch: int
    height: int
    width: int
    tiles: tuple[int, int]
    fresh: bool = False

    @property
    def offsets(self) -> tuple[int, ...]:
        """The n = m + k - 1 positions a block reads, relative to its first output."""
        return tuple(range(-self.padding, self.block + self.kernel - 1 - self.padding))

    @property
    def out_size(self) -> tuple[int, int]:
        grow = 2 * self.padding - self.kernel + 1
        return self.height + grow, self.width + grow

    @property
    def out_tiles(self) -> tuple[int, int]:
        height, width = self.out_size
        return -(-height // self.block), -(-width // self.block)


def stack(parts: list[jax.Array]) -> jax.Array:
    """Slabs -> [n, ...], written out once."""
    return barrier(jnp.stack(parts))


def unstack_rows(slabs: jax.Array, g: Geometry) -> jax.Array:
    """Adds slabs [n, ..., C, h', L] (rows) back: [m, ..., C, h, L]; the rows are axis -2."""
    return uncut(slabs, g.block, slabs.ndim - 2, 1, g.offsets, g.tiles[0])


def unstack_columns(slabs: jax.Array, g: Geometry) -> jax.Array:
    """Adds slabs [n, ..., w'*N] (columns) back: [m, ..., w*N]."""
    return uncut(slabs, g.block, slabs.ndim - 1, g.batch, g.offsets, g.tiles[1])


def product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """A matrix product contracting one axis of each."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())))


def correlate(a: jax.Array, b: jax.Array) -> jax.Array:
    """Contracts the last axes of [..., A, L] and [..., B, L], leading axes in common: [..., A, B].

    The operand with more rows goes first, and the barrier keeps the product that way: up to 1.4
    times faster on a CPU (36 x 16 x 1024 by 36 x 32 x 1024 in 1.41 ms against 1.85, one core).
    """
    batch = tuple(range(a.ndim - 2))
    swap = b.shape[-2] > a.shape[-2]
    first, second = (b, a) if swap else (a, b)
    axes = (((a.ndim - 1,), (a.ndim - 1,)), (batch, batch))
    result = barrier(lax.dot_general(first, second, axes))
    return barrier(jnp.swapaxes(result, -1, -2)) if swap else result


def first_stage(function: Callable, x: jax.Array, g: Geometry) -> jax.Array:
    """Returns function(x), the first thing that is done to the phases of a layer's input.

    The phases of images are cut by single numbers far apart. With the boundary behind it that
    loop runs once and, fused with the normalisation, reads bytes: adam b128 1.18 times as fast,
    evaluation of tutorial_cnn 1.1 (a boundary before it had it read normalised floats). Phases
    of an earlier layer are copied by runs, and best by each slab for itself.
    """
    return materialize(function, x) if g.fresh else function(x)


def patches(x: jax.Array, g: Geometry) -> jax.Array:
    """Phases [m, m, C, h, w*N] -> patches [n, n, C, h', w'*N] (rows first)."""
    out_h, out_w = g.out_tiles
    columns = first_stage(lambda x: stack(cut(x, 4, g.batch, g.offsets, out_w)), x, g)
    return stack(cut(columns, 3, 1, g.offsets, out_h))


def kernel_matrix(kernel: jax.Array, block: int) -> jax.Array:
    """Kernel [k, k, C, F] -> E [n*n*C, m*m*F]."""
    k, _, channels, features = kernel.shape
    n = block + k - 1
    rows = kernel.reshape(k, k * channels, features)
    places = [
        jnp.pad(rows, ((a, n - k - a), (b * channels, (n - k - b) * channels), (0, 0)))
        for a in range(block)
        for b in range(block)
    ]
    return barrier(jnp.stack(places, axis=2)).reshape(n * n * channels, -1)


def kernel_gradient(d_matrix: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
    """dE [n*n*C, m*m*F] -> dW [k, k, C, F]."""
    k, _, channels, features = shape
    n = block + k - 1
    d = d_matrix.reshape(n, n * channels, block, block, features)
    total = None
    for a in range(block):
        for b in range(block):
            place = d[a : a + k, b * channels : (b + k) * channels, a, b]
            total = place if total is None else total + place
    return total.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def im2col_conv(x: jax.Array, kernel: jax.Array, g: Geometry) -> jax.Array:
    """Convolves phases.

    Args:
      x: float [m, m, C, h, w*N]; with padding, the overhang must be zero.
      kernel: float [k, k, C, F], the dtype of `x`.
      g: sizes; static.

    Returns:
      float [m, m, F, h', w'*N].
    """
    return _forward(x, kernel, g, transpose=True)[0]  # see `winograd.winograd_conv`


def _forward(x, kernel, g, transpose=False):
    v = patches(x, g)
    spatial = v.shape[3:]
    v = v.reshape(-1, spatial[0] * spatial[1])
    matrix = kernel_matrix(kernel, g.block)
    y = product(barrier(matrix.T), v, 1, 0) if transpose else product(matrix, v, 0, 0)
    y = barrier(y).reshape(g.block, g.block, kernel.shape[3], *spatial)
    return y, (v, matrix, kernel)


def _backward(g, residuals, dy):
    v, matrix, kernel = residuals
    n, spatial = len(g.offsets), dy.shape[3:]
    d = dy.reshape(-1, spatial[0] * spatial[1])
    d_matrix = correlate(v, d)
    d_kernel = kernel_gradient(d_matrix, kernel.shape, g.block)
    dv = barrier(product(matrix, d, 1, 0)).reshape(n, n, kernel.shape[2], *spatial)
    rows = unstack_rows(dv, g)  # [m, n, C, h, w'*N]
    dx = unstack_columns(barrier(jnp.swapaxes(rows, 0, 1)), g)  # [m (columns), m (rows), ...]
    return jnp.swapaxes(dx, 0, 1), d_kernel


im2col_conv.defvjp(_forward, _backward)
