"""Winograd's F(m x m, 3 x 3) with tiles as large as the map, or 8, over `pieces.Pieces`.

The algorithm is that of `ops/winograd.py`. A tile of m outputs along one direction reads
n = m + k - 1 inputs and takes n products in place of m * k, so a whole 7 x 7 map as one tile takes
81 in place of 441. The sizes, and the
points that keep their rounding small, stand in `ops/tile_sizes.py`.

One piece of a layer, [H, W, C, n images] -> [H', W', F, n]:

    a = gelu(factor * z + shift)                    what the layer before left to be done
    V [n*n, C, images] = B^T a B                    for each tile; the rows of B that read padding
    M [n*n, F, images] = U^T V                      are left out in place of being fed zeros
    y [m, m, F, images] = A^T M A                   then the 2x2 pool, and the sums of the result

The transforms are products with the small matrices: at these sizes a third of the time of sums of
slices. Rows and columns that the pool will drop are not computed. Maps of at most 16 rows are cut
into one or two tiles of about equal size each way, larger ones into equal ones that a loop goes
over, so that all use the same memory.

The gradient is by hand and keeps the inputs z, the result y and each pool's winner (int8); a is
computed again. With D = A dy A^T:

    dU = V D^T,  dW = (G kron G)^T dU,  dV = U D,  da = B dV B^T,

and with respect to the sums, as they are of the result after the pool, dy += weight * (d sum +
2 y d square). Reverse-mode only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops import pieces
from cifar_jax.ops.im2col import correlate, product
from cifar_jax.ops.layout import barrier, like, materialize
from cifar_jax.ops.pieces import Pieces
from cifar_jax.ops.tile_sizes import Geometry, Span, matrices


def supports(kernel: int) -> bool:
    """Whether a kernel of this size is computed so: only 3 was measured."""
    return kernel == 3


def convolve(x: Pieces, kernel: jax.Array, padding: int, pool: bool) -> Pieces:
    """Bare convolution of stride 1 and, with `pool`, a 2x2 max pool of stride 2.

    Args:
      x: the maps, with what is still to be done to them.
      kernel: [k, k, C, F].

    Returns:
      The result, with its sums.
    """
    g = Geometry(x.height, x.width, kernel.shape[0], padding, pool, x.gelu)
    kernel = like(kernel.astype(x.values.dtype), x.values)
    values, sums = _convolve(x.values, *x.affine(), x.weights, kernel, g)
    return Pieces(values, x.weights, None, None, sums, x.batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(z, factor, shift, weights, kernel, g):
    """z [P, H, W, C, n], factor and shift [C], weights [P, n], kernel [k, k, C, F] ->
    ([P, H', W', F, n], sums [2, F])."""
    return _forward(z, factor, shift, weights, kernel, g)[0]


def _forward(z, factor, shift, weights, kernel, g):
    k, _, channels, features = kernel.shape
    u = _kernels(kernel.reshape(k * k, channels, features).transpose(0, 2, 1), g)

    def piece(sums, i):
        def read(z, factor, shift, i):
            return pieces.activation(_at(z, i), factor, shift, g.gelu)

        a = materialize(read, z, factor, shift, i)
        y, winners = (_looped if g.loops else _unrolled)(a, u, g, features)
        found = pieces.sum_pixels(lambda y: (y, y * y), y)
        sums = sums + jnp.stack([(s * _at(weights, i)[None]).sum(-1) for s in found])
        return sums, (y, winners)

    start = like(jnp.zeros((2, features), z.dtype), z)
    sums, (y, winners) = lax.scan(piece, start, _numbers(z))
    return (y, sums), (z, factor, shift, weights, kernel, y, winners)


def _backward(g, kept, gradients):
    z, factor, shift, weights, kernel, y, winners = kept
    dy, d_sums = gradients
    k, _, channels, features = kernel.shape
    u = _kernels(kernel.reshape(k * k, channels, features), g)

    def piece(carry, i):
        def slope(z, factor, shift, i):
            return pieces.activation_and_slope(_at(z, i), factor, shift, g.gelu)

        def total(y, dy, weights, d_sums, i):
            one, two = (pieces.of_channels(d, _at(y, i)) for d in d_sums)
            return _at(dy, i) + _at(weights, i).reshape(1, 1, 1, -1) * (one + 2 * _at(y, i) * two)

        a, slopes = materialize(slope, z, factor, shift, i)
        d = materialize(total, y, dy, weights, d_sums, i)
        backward = _looped_backward if g.loops else _unrolled_backward
        dw, da = backward(a, d, _at(winners, i) if g.pool else None, u, g, features)

        def by_affine(da, slopes, z, i):
            ds = da * slopes
            return ds * _at(z, i), ds

        def by_values(da, slopes, factor):
            return da * slopes * pieces.of_channels(factor, da)

        found = pieces.sum_pixels(by_affine, da, slopes, z, i)
        found = [s.sum(-1) for s in found]
        dz = materialize(by_values, da, slopes, factor)
        return (carry[0] + dw, carry[1] + found[0], carry[2] + found[1]), dz

    zeros = [jnp.zeros(s, z.dtype) for s in ((k * k, channels, features), channels, channels)]
    start = tuple(like(x, z) for x in zeros)
    (dw, d_factor, d_shift), dz = lax.scan(piece, start, _numbers(z))
    return dz, d_factor, d_shift, jnp.zeros_like(weights), dw.reshape(kernel.shape)


_convolve.defvjp(_forward, _backward)


def _numbers(z):
    return jnp.arange(z.shape[0], dtype=jnp.int32)


def _at(x, i):
    """Piece i: read where it is used, without a copy of it."""
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _kernels(w, g: Geometry) -> dict[tuple[int, int], jax.Array]:
    """(G kron G) w for every size of tile: [k*k, A, B] -> {(m, m'): [n*n', A, B]}."""
    if g.loops:
        sizes = {(g.equal_spans(g.height)[1].size, g.equal_spans(g.width)[1].size)}
    else:
        sizes = {(r.size, c.size) for r in g.spans(g.height) for c in g.spans(g.width)}
    w, found = barrier(w), {}
    for size in sorted(sizes):
        both = jnp.asarray(_kron(size, g.kernel), w.dtype)
        found[size] = _along_rows(both, w)
    return found


def _kron(sizes: tuple[int, int], kernel: int) -> np.ndarray:
    """G kron G, [n*n', k*k]."""
    return np.kron(*(matrices(size, kernel)[1] for size in sizes))


def _kernel_gradient(du, r: Span, c: Span):
    """[n*n', C, F] -> [k*k, C, F]."""
    both = jnp.asarray(_kron((r.size, c.size), r.kernel).T.copy(), du.dtype)
    return _along_rows(both, du)


def _along_rows(matrix, x):
    """[R, K] times [K, ...] -> [R, ...]."""
    y = barrier(product(matrix, x.reshape(x.shape[0], -1), 1, 0))
    return y.reshape(matrix.shape[0], *x.shape[1:])


def _along_columns(matrix, x):
    """[R, K] times each of [B, K, ...] -> [B, R, ...]."""
    batch = x.shape[0]
    flat = x.reshape(batch, x.shape[1], -1)
    y = barrier(_batched(jnp.broadcast_to(matrix, (batch, *matrix.shape)), flat, 2, 1))
    return y.reshape(batch, matrix.shape[0], *x.shape[2:])


def _transformed(rows, columns, x):
    """rows x columns^T in the first two directions."""
    return _along_columns(columns, _along_rows(rows, x))


def _batched(a, b, contract_a, contract_b):
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))))


def _positions(x):
    """[n, n', C, images] -> [n*n', C, images]."""
    return x.reshape(-1, *x.shape[2:])


def _tile(a, u, r: Span, c: Span, features: int):
    """Inputs [h, w, C, n] of a tile -> its outputs [m, m', F, n]."""
    (a_rows, b_rows), (a_columns, b_columns) = r.matrices(a.dtype), c.matrices(a.dtype)
    v = _positions(_transformed(b_rows, b_columns, a))
    m = barrier(_batched(u, v, 2, 1)).reshape(r.reads, c.reads, features, -1)
    return _transformed(a_rows, a_columns, m)


def _tile_backward(a, dy, u, r: Span, c: Span):
    """Returns (dW [k*k, C, F], gradient by the tile's inputs)."""
    (a_rows, b_rows), (a_columns, b_columns) = r.matrices(a.dtype), c.matrices(a.dtype)
    v = _positions(_transformed(b_rows, b_columns, a))
    d = _positions(_transformed(a_rows.T, a_columns.T, dy))
    dw = _kernel_gradient(correlate(v, d), r, c)
    dv = barrier(_batched(u, d, 2, 1)).reshape(r.reads, c.reads, a.shape[2], -1)
    return dw, _transformed(b_rows.T, b_columns.T, dv)


def _cut(x, r: Span, c: Span):
    return x[r.low : r.high, c.low : c.high]


def _cut_outputs(x, r: Span, c: Span, step: int):
    """A tile's part of the results, which are `step` times smaller than its outputs."""
    rows = slice(r.start // step, (r.start + r.size) // step)
    return x[rows, c.start // step : (c.start + c.size) // step]


def _pool(y):
    """[H, W, F, n] -> its 2x2 pool, and which of the four won, int8, the first of equal ones."""
    height, width, features, n = y.shape
    q = y.reshape(height // 2, 2, width // 2, 2, features, n)
    a, b, c, d = q[:, 0, :, 0], q[:, 0, :, 1], q[:, 1, :, 0], q[:, 1, :, 1]
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    index = [jnp.int8(i) for i in range(4)]
    winners = jnp.where(
        lower > upper,
        jnp.where(d > c, index[3], index[2]),
        jnp.where(b > a, index[1], index[0]),
    )
    return jnp.maximum(upper, lower), winners


def _unpool(d, winners):
    """Each window's gradient for its winner: [h, w, F, n] -> [2h, 2w, F, n]."""
    height, width, features, n = d.shape
    code = jnp.arange(4, dtype=winners.dtype).reshape(1, 2, 1, 2, 1, 1)
    won = winners[:, None, :, None] == code
    d = jnp.where(won, d[:, None, :, None], jnp.zeros((), d.dtype))
    return d.reshape(2 * height, 2 * width, features, n)


def _unrolled(a, u, g: Geometry, features: int):
    """A piece [H, W, C, n] -> (result, winners or a scalar), tile by tile."""
    tiles = [[(r, c) for c in g.spans(g.width)] for r in g.spans(g.height)]
    found = [
        [_tile(_cut(a, r, c), u[r.size, c.size], r, c, features) for r, c in row] for row in tiles
    ]
    if not g.pool:
        return _joined(found), jnp.zeros((), jnp.int8)
    pooled = [[materialize(_pool, y) for y in row] for row in found]
    return tuple(_joined([[y[part] for y in row] for row in pooled]) for part in (0, 1))


def _joined(parts):
    if len(parts) == 1 and len(parts[0]) == 1:
        return parts[0][0]
    return materialize(
        lambda parts: jnp.concatenate([jnp.concatenate(row, 1) for row in parts], 0), parts
    )


def _unrolled_backward(a, d, winners, u, g: Geometry, features: int):
    rows, columns = g.spans(g.height), g.spans(g.width)
    step = 2 if g.pool else 1
    dw, da = 0, None
    for r in rows:
        for c in columns:
            dy = _cut_outputs(d, r, c, step)
            if g.pool:
                dy = materialize(_unpool, dy, _cut_outputs(winners, r, c, step))
            part, dx = _tile_backward(_cut(a, r, c), dy, u[r.size, c.size], r, c)
            dw = dw + part
            if len(rows) * len(columns) == 1 and dx.shape == a.shape:
                return dw, dx
            da = jnp.zeros_like(a) if da is None else da
            da = da.at[r.low : r.high, c.low : c.high].add(dx)
    return dw, da


class _Loop:
    """The equal tiles of a geometry that loops: their numbers, sizes and places."""

    def __init__(self, g: Geometry):
        (self.down, self.row), (self.across, self.column) = (
            g.equal_spans(size) for size in (g.height, g.width)
        )
        self.sizes = self.row.size, self.column.size
        self.reads = self.row.reads, self.column.reads
        self.covered = self.down * self.row.size, self.across * self.column.size
        extra = g.kernel - 1 - g.padding
        self.edges = [
            (g.padding, covered + extra - size)
            for covered, size in zip(self.covered, (g.height, g.width), strict=True)
        ]
        self.first = g.padding
        tiles = [(i, j) for i in range(self.down) for j in range(self.across)]
        self.tiles = jnp.asarray(tiles, jnp.int32)

    def padded(self, a):
        """[H, W, C, n] with zeros around it, as far as the tiles read."""
        zero = jnp.zeros((), a.dtype)
        edges = [(low, high, 0) for low, high in (*self.edges, (0, 0), (0, 0))]
        return materialize(lambda a: lax.pad(a, zero, edges), a)

    def cut(self, x, tile, sizes, steps):
        """The `sizes` rows and columns of x from `tile` times `steps` on: a copy of its own, in
        runs (fused into what reads it, each number's place was computed, 8 ns for each)."""

        def cut(x, tile):
            zero = jnp.int32(0)
            start = (tile[0] * steps[0], tile[1] * steps[1], zero, zero)
            return lax.dynamic_slice(x, start, (*sizes, *x.shape[2:]))

        return materialize(cut, x, tile)


def _looped(a, u, g: Geometry, features: int):
    loop = _Loop(g)
    padded, kernel = loop.padded(a), u[loop.sizes]

    def body(_, tile):
        inputs = loop.cut(padded, tile, loop.reads, loop.sizes)
        y = _tile(inputs, kernel, loop.row, loop.column, features)
        return None, materialize(_pool, y) if g.pool else (y, jnp.zeros((), jnp.int8))

    _, (y, winners) = lax.scan(body, None, loop.tiles)

    def joined(y):
        _, height, width, *rest = y.shape
        y = y.reshape(loop.down, loop.across, height, width, *rest).transpose(0, 2, 1, 3, 4, 5)
        y = y.reshape(loop.down * height, loop.across * width, *rest)
        return y[: g.out_size[0], : g.out_size[1]]

    y = materialize(joined, y)
    return y, materialize(joined, winners) if g.pool else winners[0]


def _looped_backward(a, d, winners, u, g: Geometry, features: int):
    loop = _Loop(g)
    padded, kernel = loop.padded(a), u[loop.sizes]
    step = 2 if g.pool else 1
    sizes = tuple(size // step for size in loop.sizes)

    def covered(x):
        """A result's map with zeros to where the last tiles end."""
        missing = [size // step - have for size, have in zip(loop.covered, x.shape, strict=False)]
        return jnp.pad(x, [(0, missing[0]), (0, missing[1]), (0, 0), (0, 0)])

    d = covered(d)
    winners = covered(winners) if g.pool else None

    def body(carry, tile):
        du, da = carry
        dy = loop.cut(d, tile, sizes, sizes)
        if g.pool:
            dy = materialize(_unpool, dy, loop.cut(winners, tile, sizes, sizes))
        inputs = loop.cut(padded, tile, loop.reads, loop.sizes)
        part, dx = _tile_backward(inputs, dy, kernel, loop.row, loop.column)
        zero = jnp.int32(0)
        start = (tile[0] * loop.sizes[0], tile[1] * loop.sizes[1], zero, zero)
        old = lax.dynamic_slice(da, start, dx.shape)
        return (du + part, lax.dynamic_update_slice(da, old + dx, start)), None

    start = jnp.zeros((g.kernel**2, a.shape[2], features), a.dtype), jnp.zeros_like(padded)
    (dw, da), _ = lax.scan(body, tuple(like(x, a) for x in start), loop.tiles)
    first = loop.first
    return dw, da[first : first + g.height, first : first + g.width]
