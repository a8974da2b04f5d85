"""The layout the CPU convolutions work in: images split into phases, the batch innermost.

A batch of images [N, H, W, C] is held as `phases` [P, P, C, h, w*N]: pixel (y, x) of image i
lies at [y % P, x % P, c, y // P, (x // P) * N + i] (space-to-depth with blocks of P x P, the
channels before the pixels, the images last). Two things follow:

- the P x P outputs of a block are computed together from the (P + k - 1)^2 inputs around it,
  and each of those inputs, over all blocks at once, is a contiguous slab of one phase
  (`cut`), so that patches are made by flat copies of runs of w*N numbers;
- the four pixels of a 2x2 pool are four slabs of the same array when P is even.

Where H or W is not a multiple of P, the last blocks hang over the edge. What they hold there is
unspecified (but finite where the images are); `clear_overhang` zeroes it where it matters.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

_T = TypeVar("_T")

# Keeps XLA from rewriting across it (say, a transposed product into a product of transposes).
# It does not keep XLA:CPU from fusing: barriers are gone by then. `materialize` does.
barrier = lax.optimization_barrier


def materialize(function: Callable[..., _T], *arrays: jax.Array) -> _T:
    """function(*arrays), computed once and written out before anything reads it.

    XLA:CPU fuses cheap operations into each of their readers: a pool would be computed anew, from
    four times the data, in every slab cut from it. A call that may not be inlined is a boundary
    that fusion does not cross.
    """
    if jax.default_backend() != "cpu":
        return function(*arrays)

    def inside(*arrays):
        # jnp.where is a call too, and must be inlined, or it is a loop and an array of its own.
        with set_xla_metadata(inlineable=None):
            return function(*arrays)

    with set_xla_metadata(inlineable="false"):
        return jax.jit(inside)(*arrays)


def like(parameter: jax.Array, data: jax.Array) -> jax.Array:
    """Marks a parameter as varying over the mesh axes that the data varies over.

    Inside `shard_map` a hand-written gradient must vary like its input; the cast's own gradient
    then adds the shards' contributions up, as for any other operation.
    """
    missing = tuple(_varying(data) - _varying(parameter))
    return lax.pcast(parameter, missing, to="varying") if missing else parameter


def _varying(x: jax.Array) -> frozenset:
    """The manual mesh axes an array varies over (a field that jax 0.10 moved)."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["phases"],
    meta_fields=["batch", "height", "width"],
)
@dataclasses.dataclass(frozen=True)
class Blocked:
    """A batch of images as phases.

    Attributes:
      phases: float [P, P, C, h, w*batch] with h * P >= height and w * P >= width.
      batch: number of images.
      height: rows of an image.
      width: columns of an image.
    """

    phases: jax.Array
    batch: int
    height: int
    width: int

    @property
    def block(self) -> int:
        return self.phases.shape[0]

    @property
    def channels(self) -> int:
        return self.phases.shape[2]

    @property
    def tiles(self) -> tuple[int, int]:
        """Blocks down and across an image: (h, w)."""
        return self.phases.shape[3], self.phases.shape[4] // self.batch


def to_blocked(images: jax.Array, block: int) -> Blocked:
    """[N, H, W, C] -> `Blocked` of blocks of `block` x `block`; the overhang is zero."""
    batch, height, width, channels = images.shape
    h, w = -(-height // block), -(-width // block)
    if (h * block, w * block) != (height, width):
        after_h, after_w = h * block - height, w * block - width
        images = jnp.pad(images, ((0, 0), (0, after_h), (0, after_w), (0, 0)))

    def split(images):
        x = images.reshape(batch, h, block, w, block, channels).transpose(2, 4, 5, 1, 3, 0)
        return x.reshape(block, block, channels, h, w * batch)

    return Blocked(split(images), batch, height, width)


def _pixels(x: Blocked) -> jax.Array:
    """Phases as whole images [h*P, w*P, C, N]: the overhang is still there."""
    (h, w), p = x.tiles, x.block
    split = x.phases.reshape(p, p, x.channels, h, w, x.batch)
    return split.transpose(3, 0, 4, 1, 2, 5).reshape(h * p, w * p, x.channels, x.batch)


def to_images(x: Blocked) -> jax.Array:
    """`Blocked` -> [N, H, W, C]."""
    return _pixels(x)[: x.height, : x.width].transpose(3, 0, 1, 2)


def flatten(x: Blocked) -> jax.Array:
    """`Blocked` -> [N, H*W*C], pixels row by row, channels fastest.

    The copy that is made is [H*W*C, N]: the transpose is left for the matrix product that
    reads it, which can take it either way.
    """
    rows = _pixels(x)[: x.height, : x.width]
    return barrier(rows).reshape(-1, x.batch).T


def reblock(x: Blocked, block: int) -> Blocked:
    """The same images in blocks of another size."""
    p, (h, w) = x.block, x.tiles
    if p == block:
        return x
    if block % p or h * p % block or w * p % block:
        return to_blocked(to_images(x), block)
    q = block // p
    split = x.phases.reshape(p, p, x.channels, h // q, q, w // q, q, x.batch)
    phases = barrier(split.transpose(4, 0, 6, 1, 2, 3, 5, 7))
    phases = phases.reshape(block, block, x.channels, h // q, w // q * x.batch)
    return dataclasses.replace(x, phases=phases)


def clear_overhang(x: Blocked) -> Blocked:
    """Zeroes what lies beyond the images' edges, as zero padding wants it."""
    p, (h, w) = x.block, x.tiles
    if (h * p, w * p) == (x.height, x.width):
        return x
    row = jnp.arange(h).reshape(1, h) * p + jnp.arange(p).reshape(p, 1) < x.height
    column = jnp.arange(w).reshape(1, w) * p + jnp.arange(p).reshape(p, 1) < x.width
    keep = row.reshape(p, 1, 1, h, 1, 1) & column.reshape(1, p, 1, 1, w, 1)
    split = x.phases.reshape(p, p, x.channels, h, w, x.batch)
    phases = jnp.where(keep, split, jnp.zeros((), split.dtype)).reshape(x.phases.shape)
    return dataclasses.replace(x, phases=phases)


def cut(
    x: jax.Array, tile_axis: int, unit: int, offsets: Sequence[int], out_tiles: int
) -> list[jax.Array]:
    """The inputs that every tile needs along one direction, one slab for each offset.

    Args:
      x: [_, m, ...], the phase axis second; `tile_axis` holds the tiles, `unit` numbers each.
      offsets: positions relative to a tile's first pixel, negative into the padding.
      out_tiles: tiles to produce.

    Returns:
      For each offset o an array like `x` without its phase axis and with `out_tiles` tiles:
      tile t holds pixel t*m + o, or zero where that lies outside the tiles of `x`.
    """
    m, tiles, axis = x.shape[1], x.shape[tile_axis] // unit, tile_axis - 1
    parts = []
    for offset in offsets:
        phase = lax.index_in_dim(x, offset % m, 1, keepdims=False)
        first = offset // m
        low, high = max(first, 0), min(first + out_tiles, tiles)
        low, high = min(low, tiles), max(high, 0)
        if high <= low:  # nothing of it lies inside
            shape = list(phase.shape)
            shape[axis] = out_tiles * unit
            parts.append(jnp.zeros(shape, x.dtype))
            continue
        part = lax.slice_in_dim(phase, low * unit, high * unit, axis=axis)
        before, after = low - first, first + out_tiles - high
        if before or after:
            part = barrier(_extend(part, axis, before * unit, after * unit))
        parts.append(part)
    return parts


def _extend(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Zeros before and after along an axis (a concatenation: `jnp.pad` fuses badly on CPU)."""

    def zeros(size):
        shape = list(x.shape)
        shape[axis] = size
        return [jnp.zeros(shape, x.dtype)] if size else []

    return lax.concatenate([*zeros(before), x, *zeros(after)], axis)


def uncut(
    slabs: jax.Array, m: int, tile_axis: int, unit: int, offsets: Sequence[int], tiles: int
) -> jax.Array:
    """The transpose of `cut`: adds every slab where it was cut from.

    Args:
      slabs: [len(offsets), ...], with the produced tiles at `tile_axis`, `unit` numbers each.
      m: the size of the phase axis of the result.
      tiles: tiles of the result.

    Returns:
      [m, ...] with `tiles` tiles at `tile_axis`. (`cut` dropped the phase axis, a stack of its
      slabs has a new one in front, so `tile_axis` is the same for both.)
    """
    produced = slabs.shape[tile_axis] // unit
    sources = [  # for each phase: (slab, tile that its first tile is added to)
        [(i, offset // m) for i, offset in enumerate(offsets) if offset % m == phase]
        for phase in range(m)
    ]
    rows, phase = [], 0
    while phase < m:  # phases that get slabs in the same way are done together
        run = 1
        while phase + run < m and [(i + run, q) for i, q in sources[phase]] == sources[phase + run]:
            run += 1
        starts = [(lax.slice_in_dim(slabs, i, i + run, axis=0), q) for i, q in sources[phase]]
        rows.append(_overlap_add(starts, run, slabs, tile_axis, unit, produced, tiles))
        phase += run
    return barrier(lax.concatenate(rows, 0) if len(rows) > 1 else rows[0])


def _overlap_add(starts, run, like, axis, unit, produced, tiles):
    """Sums slabs, each from its own first tile on, segment by segment."""
    edges = {0, tiles}
    for _, q in starts:
        edges |= {min(max(q, 0), tiles), min(max(q + produced, 0), tiles)}
    segments = []
    edges = sorted(edges)
    for low, high in itertools.pairwise(edges):
        total = None
        for slab, q in starts:
            if q <= low and high <= q + produced:
                piece = lax.slice_in_dim(slab, (low - q) * unit, (high - q) * unit, axis=axis)
                total = piece if total is None else total + piece
        if total is None:
            shape = list(like.shape)
            shape[0], shape[axis] = run, (high - low) * unit
            total = jnp.zeros(shape, like.dtype)
        segments.append(total)
    return lax.concatenate(segments, axis) if len(segments) > 1 else segments[0]
