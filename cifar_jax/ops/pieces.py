"""The layout large batches are computed in on a CPU: pieces of the batch, images innermost, each
layer reading what the one before left undone.

A batch of N images is P pieces of n, about `IMAGES` each, and one array [P, H, W, C, n]. A layer
goes through the pieces one after another, so that what it makes on its way (transformed tiles,
several times the images' size) is that of one piece and is overwritten by the next one's. What
depends on the whole batch, the statistics of batch normalisation, cannot be applied in that pass.
So a layer leaves its bare result and its sums over the batch, and `Pieces` says what is still to
be done: `gelu(factor * values + shift)`. The next convolution does it as it reads a piece
(`ops/large_tiles.py`), and again in its backward pass in place of keeping it.

Images that fill up the last piece, and those a step masks, have weight 0 and are in no sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops.layout import barrier, like, materialize

# Images of a piece. On two Zen 5 cores 50 and 25 were slower; on a busy Intel machine 48 could not
# be told from 200. A multiple of 8 keeps rows of images on whole vectors.
IMAGES, MULTIPLE = 200, 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "weights", "factor", "shift", "sums"],
    meta_fields=["batch", "gelu"],
)
@dataclasses.dataclass(frozen=True)
class Pieces:
    """A batch of feature maps in pieces, and what is still to be done to it.

    Attributes:
      values: float [P, H, W, C, n], P * n >= batch.
      weights: [P, n], 1 for images that count in sums over the batch, else 0.
      factor, shift: [C], or None for 1 and 0; the map is `factor * values + shift`.
      sums: [2, C], the values and their squares added up over the images that count and their
        pixels; None where the layer before did not add them up.
      batch: N.
      gelu: whether GELU follows.
    """

    values: jax.Array
    weights: jax.Array
    factor: jax.Array | None
    shift: jax.Array | None
    sums: jax.Array | None
    batch: int
    gelu: bool = False

    @property
    def height(self) -> int:
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    @property
    def pending(self) -> bool:
        return self.gelu or self.factor is not None or self.shift is not None

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns factor and shift, [C] each."""
        channel = self.values[0, 0, 0, :, 0]
        factor, shift = self.factor, self.shift
        factor = jnp.ones_like(channel) if factor is None else like(factor, self.values)
        return factor, jnp.zeros_like(channel) if shift is None else like(shift, self.values)


def to_pieces(images: jax.Array, mask: jax.Array | None = None) -> Pieces:
    """[N, H, W, C] -> `Pieces`; `mask` [N], 1 for images that count, None for all.

    float16 and bfloat16 become float32, in which pieces are computed.
    """
    dtype = jnp.dtype(jnp.float32) if images.dtype.itemsize < 4 else images.dtype
    batch = images.shape[0]
    pieces = max(1, round(batch / IMAGES))
    length = math.ceil(math.ceil(batch / pieces) / MULTIPLE) * MULTIPLE
    pieces = math.ceil(batch / length)
    missing = pieces * length - batch
    weights = jnp.ones(batch, dtype) if mask is None else mask.astype(dtype)
    weights = jnp.pad(weights, (0, missing)).reshape(pieces, length)
    images = jnp.pad(images.astype(dtype), ((0, missing), (0, 0), (0, 0), (0, 0)))

    def split(images):
        return images.reshape(pieces, length, *images.shape[1:]).transpose(0, 2, 3, 4, 1)

    return Pieces(materialize(split, images), like(weights, images), None, None, None, batch)


def applied(x: Pieces) -> Pieces:
    """The same maps with nothing left to be done."""
    if not x.pending:
        return x
    factor, shift = x.affine()

    def apply(values, factor, shift):
        return activation(values, factor, shift, x.gelu)

    values = apply(x.values, factor, shift)
    return Pieces(values, x.weights, None, None, None, x.batch)


def to_images(x: Pieces) -> jax.Array:
    """`Pieces` -> [N, H, W, C]."""
    values = applied(x).values.transpose(0, 4, 1, 2, 3)
    return values.reshape(-1, *values.shape[2:])[: x.batch]


def global_max(x: Pieces) -> jax.Array:
    """The maximum over rows and columns, [N, C]."""
    values = applied(x).values.max(axis=(1, 2))
    return values.transpose(0, 2, 1).reshape(-1, x.channels)[: x.batch]


def add(x: Pieces, y: Pieces) -> Pieces:
    """The sum of two batches of maps."""
    values = applied(x).values + applied(y).values
    return Pieces(values, x.weights, None, None, None, x.batch)


def statistics(x: Pieces) -> tuple[jax.Array, jax.Array]:
    """Returns (sums [2, C] over the images that count and their pixels, of the values and of their
    squares; how many pixels that is)."""
    x = applied(x)
    sums = x.sums
    if sums is None:
        weights = x.weights.reshape(len(x.weights), 1, 1, 1, -1)
        first, second = x.values * weights, x.values * x.values * weights
        sums = jnp.stack([first.sum((0, 1, 2, 4)), second.sum((0, 1, 2, 4))])
    return sums, x.weights.sum() * (x.height * x.width)


def of_channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[C] in a shape that goes with x [..., C, n]."""
    return vector.reshape((1,) * (x.ndim - 2) + (-1, 1))


_ROOT_HALF = math.sqrt(0.5)
_ROOT_TWO_PI = math.sqrt(2 * math.pi)


def activation(values, factor, shift, gelu: bool) -> jax.Array:
    """factor * values + shift, with `gelu` x Phi(x) of that: [..., C, n] and [C] -> [..., C, n]."""
    x = values * of_channels(factor, values) + of_channels(shift, values)
    return 0.5 * x * (1 + lax.erf(x * _number(_ROOT_HALF, x))) if gelu else x


def activation_and_slope(values, factor, shift, gelu: bool) -> tuple[jax.Array, jax.Array]:
    """`activation` and its derivative by `factor * values + shift`, Phi(x) + x phi(x)."""
    x = values * of_channels(factor, values) + of_channels(shift, values)
    if not gelu:
        return x, jnp.ones_like(x)
    below = 0.5 * (1 + lax.erf(x * _number(_ROOT_HALF, x)))
    density = jnp.exp(-0.5 * x * x) * _number(1 / _ROOT_TWO_PI, x)
    return x * below, below + x * density


def _number(value: float, x: jax.Array) -> jax.Array:
    return jnp.asarray(value, x.dtype)


def sum_pixels(function, *arrays) -> tuple[jax.Array, ...]:
    """Adds up over rows and columns what `function` makes of arrays, a tuple of [H, W, C, n]:
    [C, n] each, in one pass of additions of whole rows (a `reduce` takes seven times as long)."""

    def added(x):
        return functools.reduce(jnp.add, [x[i] for i in range(x.shape[0])])

    rows = materialize(lambda *arrays: tuple(map(added, function(*arrays))), *arrays)
    return materialize(lambda *rows: tuple(map(added, rows)), *rows)


def convolve_direct(x: Pieces, kernel: jax.Array, padding: int) -> Pieces:
    """Bare convolution as a product with each pixel's neighbourhood, for small kernels and few
    channels: kernel [k, k, C, F]."""
    values = applied(x).values
    k, _, channels, features = kernel.shape
    edge = (padding, padding)
    values = jnp.pad(values, ((0, 0), edge, edge, (0, 0), (0, 0)))
    height, width = (size - k + 1 for size in values.shape[1:3])
    kernel = like(kernel.astype(values.dtype), values).reshape(-1, features)
    kernel = jnp.broadcast_to(kernel, (height * width, *kernel.shape))

    def piece(values):
        def neighbourhoods(values):
            shifted = [values[i : i + height, j : j + width] for i in range(k) for j in range(k)]
            return jnp.concatenate(shifted, axis=2)

        v = materialize(neighbourhoods, values).reshape(height * width, k * k * channels, -1)
        y = barrier(lax.dot_general(kernel, v, (((1,), (1,)), ((0,), (0,)))))
        return y.reshape(height, width, features, -1)

    y = lax.map(piece, values)
    return Pieces(y, x.weights, None, None, None, x.batch)
