"""Winograd's minimal filtering F(m x m, k x k) over phases, as batched matrix products.

One dimension first. m outputs of a correlation with k taps read n = m + k - 1 inputs d, and
need n products instead of m * k:

    y = A^T [(G w) * (B^T d)],      A [n, m], G [n, k], B [n, n].

The matrices are the transposed Toom-Cook form (Winograd, "Arithmetic Complexity of
Computations", 1980; for networks Lavin and Gray, arXiv:1509.09308): a polynomial product is
found from its values at n - 1 points and at infinity, A and G evaluate at the points, B holds
the interpolation; transposing the bilinear form exchanges the product and the data.

In two dimensions the transforms are applied along both directions, and summing over channels
turns the n*n products of numbers into n*n products of matrices over all tiles at once:

    U [n*n, C, F] = (G kron G) W        W [k*k, C, F]
    V [n*n, C, L] = B^T d B             d: n x n slabs of the phases (`layout.cut`), L tiles
    M [n*n, F, L] = U^T V               one batched product
    y [m, m, F, L] = A^T M A

and the gradients are the same maps transposed: D = A dy A^T, dU = V D^T, dV = U D,
dW = (G kron G)^T dU, and dx adds the slabs of B dV B^T back (`layout.uncut`).

With at most `SUM_CHANNELS` channels, as of images, M is summed up in one loop instead.

V and M hold n*n / (m*m) times the numbers of the images. Where they are large the n columns of the
n x n positions are computed one after another, from V to the half-transformed result, so that what
lies between stays in the caches (`_parts`).

Rounding: in float32 the result is 2 to 10 times less exact than a direct sum (about 1e-5 of the
largest output for F(4, 5)), growing with n, so tiles are at most 8 x 8.

Reverse-mode only: the gradient is a `custom_vjp`.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops.im2col import (
    Geometry,
    correlate,
    first_stage,
    product,
    unstack_columns,
    unstack_rows,
)
from cifar_jax.ops.layout import barrier, cut, materialize

# Interpolation points (and infinity) for each n = m + k - 1: small numbers and their inverses
# keep the matrices' entries, and with them the rounding, small.
_HALF = Fraction(1, 2)
POINTS = {
    4: (0, 1, -1),
    6: (0, 1, -1, 2, -2),
    8: (0, 1, -1, _HALF, -_HALF, 2, -2),
}


def supports(block: int, kernel: int) -> bool:
    """Whether there is an F(block x block, kernel x kernel): tiles of 4, 6 and 8, k > 1."""
    return kernel > 1 and block > 1 and block + kernel - 1 in POINTS


def _coefficients(roots) -> list[Fraction]:
    """Coefficients of prod (x - root), constant first."""
    result = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *result], [-root * c for c in result] + [Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


@functools.cache
def matrices(
    block: int, kernel: int, points: tuple | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns float64 (A [n, m], G [n, k], B [n, n]) of F(m, k), m = `block`, by n - 1 `points`,
    those of `POINTS` by default.

    Rows of G and columns of B are scaled against each other by powers of two, so that both
    stay near 1.
    """
    n = block + kernel - 1
    points = [Fraction(p) for p in points or POINTS[n]]
    a, g, b = np.zeros((n, block)), np.zeros((n, kernel)), np.zeros((n, n))
    for j, point in enumerate(points):
        others = [p for p in points if p != point]
        scale = math.prod(point - p for p in others)
        a[j] = [float(point**i) for i in range(block)]
        g[j] = [float(point**i / scale) for i in range(kernel)]
        b[: n - 1, j] = [float(c) for c in _coefficients(others)]
    a[-1, -1] = g[-1, -1] = 1  # the point at infinity: the leading coefficients
    b[:, -1] = [float(c) for c in _coefficients(points)]
    for j in range(n):
        ratio = np.abs(b[:, j]).max() / np.abs(g[j]).max()
        scale = 2.0 ** round(math.log2(ratio) / 2)
        b[:, j] /= scale
        g[j] *= scale
    return a, g, b


def combine(matrix: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    """Stacks the rows of `matrix` times `parts`: [len(matrix), ...], written out once."""
    return barrier(jnp.stack([_sum(row, parts) for row in matrix]))


def _sum(row: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    total = None
    for weight, part in zip(row, parts, strict=True):
        if weight == 0:
            continue
        if weight == 1:
            term = part
        elif weight == -1:
            term = -part
        else:
            term = part * jnp.asarray(weight, part.dtype)
        total = term if total is None else total + term
    return total


def _slabs(x: jax.Array, axis: int) -> list[jax.Array]:
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def _batched(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))))


def _sum_of_channels(u: jax.Array, v: jax.Array) -> jax.Array:
    """U^T V for each position: [P, C, F] and [P, C, L] -> [P, F, L]."""
    return sum(u[:, c, :, None] * v[:, c, None, :] for c in range(u.shape[1]))


def _kernel_maps(g: np.ndarray, parts: list[slice], dtype) -> list[jax.Array]:
    """Returns (G kron G), [n*n, k*k], cut into the columns of each part: [n*c, k*k] each."""
    n, k = g.shape
    whole = np.kron(g, g).reshape(n, n, k * k)
    return [jnp.asarray(whole[:, part].reshape(-1, k * k), dtype) for part in parts]


# Up to so many channels M is a sum of scaled rows of V, one loop, in place of a product that would
# contract as few numbers (evaluation of tutorial_cnn 1.04 to 1.06 times as fast with 3, as fast
# with 6; adam b128 1.05).
SUM_CHANNELS = 6

# Above so many bytes of V or M a column of the n x n positions is computed at a time on a CPU, so
# that its part of V, M and the half-transformed results stay in the caches (2 MB a core where it
# was measured: deep_cnn b64 on two devices 1.12 times as fast, VGG16 b128 1.10; below it there
# is nothing to gain). Where M is a sum it pays earlier (1 MB a core, tiles of tutorial_cnn: with
# 1.2 MB 1.12 to 1.25 times as fast, with 0.9 MB 1.1; with 0.3 MB, tutorial b4, 0.95).
COLUMN_FROM_BYTES = 2_000_000
SUM_COLUMN_FROM_BYTES = 900_000


def _parts(n: int, features: int, channels: int, numbers: int, itemsize: int) -> list[slice]:
    """Which columns of the n x n positions are computed together, for `numbers` tiles."""
    size = n * n * max(features, channels) * numbers * itemsize
    limit = SUM_COLUMN_FROM_BYTES if channels <= SUM_CHANNELS else COLUMN_FROM_BYTES
    if size < limit or jax.default_backend() != "cpu":
        return [slice(0, n)]
    return [slice(i, i + 1) for i in range(n)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd_conv(x: jax.Array, kernel: jax.Array, g: Geometry) -> jax.Array:
    """Convolves phases; arguments and result as `im2col.im2col_conv`."""
    # Without a gradient to come. Small products are up to twice as fast with U^T written out, which
    # pays where it is made once for many batches, as in evaluation (deep_cnn 1.14 times as fast).
    few = kernel.shape[2] * kernel.shape[3] <= 64 * 64
    return _forward(x, kernel, g, transpose=few)[0]


def _forward(x, kernel, g, transpose=False):
    k, _, channels, features = kernel.shape
    a, gk, b = matrices(g.block, k)
    n = len(b)
    out_h, out_w = g.out_tiles
    columns = first_stage(
        lambda x: combine(b.T, cut(x, 4, g.batch, g.offsets, out_w)), x, g
    )  # [n columns, m, C, h, w'*N]
    spatial = (out_h, columns.shape[-1])
    parts = _parts(n, features, channels, spatial[0] * spatial[1], x.dtype.itemsize)
    flat = barrier(kernel).reshape(k * k, channels * features)
    saved, halves = [], []
    for part, kernel_map in zip(parts, _kernel_maps(gk, parts, x.dtype), strict=True):
        u = barrier(product(kernel_map, flat, 1, 0)).reshape(-1, channels, features)
        v = combine(b.T, cut(columns[part], 3, 1, g.offsets, out_h))  # [n rows, c, C, h', w'*N]
        v = v.reshape(u.shape[0], channels, -1)
        if channels <= SUM_CHANNELS:
            m = materialize(_sum_of_channels, u, v)
        elif transpose:
            m = _batched(barrier(jnp.swapaxes(u, 1, 2)), v, 2, 1)
        else:
            m = _batched(u, v, 1, 1)
        m = barrier(m).reshape(n, -1, features, *spatial)
        halves += _slabs(combine(a.T, _slabs(m, 0)), 1)  # of each column [m rows, ...]
        saved.append((v, u))
    y = combine(a.T, halves)  # [m columns, m rows, ...]
    return jnp.swapaxes(y, 0, 1), saved


def _backward(g, saved, dy):
    _, channels, features = saved[0][1].shape
    a, gk, b = matrices(g.block, g.kernel)
    n, spatial = len(b), dy.shape[3:]
    parts = _parts(n, features, channels, spatial[0] * spatial[1], dy.dtype.itemsize)
    columns = combine(a, _slabs(dy, 1))  # [n columns, m rows, ...]
    dw, halves = 0, []
    for (v, u), part, kernel_map in zip(
        saved, parts, _kernel_maps(gk, parts, dy.dtype), strict=True
    ):
        d = combine(a, _slabs(columns[part], 1)).reshape(len(u), features, -1)  # [n rows * c, ...]
        du = correlate(v, d).reshape(len(u), -1)
        dw = dw + barrier(product(kernel_map, du, 0, 0))
        dv = barrier(_batched(u, d, 2, 1)).reshape(n, -1, channels, *spatial)
        halves += _slabs(unstack_rows(combine(b, _slabs(dv, 0)), g), 1)  # [m rows, C, h, w'*N]
    dx = unstack_columns(combine(b, halves), g)  # [m columns, m rows, C, h, w*N]
    return jnp.swapaxes(dx, 0, 1), dw.reshape(g.kernel, g.kernel, channels, features)


winograd_conv.defvjp(_forward, _backward)
