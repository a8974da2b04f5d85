"""Convolutions of large batches in pieces: results, sums and gradients as `lax` computes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from quick import jit

from cifar_jax.models.layers import BatchNorm, max_pool
from cifar_jax.ops import convolution, large_tiles, pieces

# batch, height, width, channels, features, padding, pool
SHAPES = [
    (19, 7, 7, 3, 4, 1, True),  # three pieces, the last one filled up; the pool drops a row
    (3, 15, 14, 3, 4, 1, False),  # two sizes of tiles
    (2, 31, 20, 2, 3, 1, True),  # equal tiles in a loop
    (2, 17, 33, 2, 3, 1, False),  # the last tiles hang over
    (2, 6, 9, 3, 4, 0, True),
    (2, 1, 1, 2, 2, 1, False),
]


def _rows(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def _relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def in_pieces(x, mask, kernel, factor, shift, padding, pool):
    x = pieces.to_pieces(x, mask)
    x = dataclasses.replace(x, factor=factor, shift=shift, gelu=True)
    y = convolution.convolve(x, kernel, padding=padding, pool=pool)
    return convolution.to_images(y), pieces.statistics(y)[0]


def by_lax(x, mask, kernel, factor, shift, padding, pool):
    x = x * factor.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)
    y = convolution.strided(jax.nn.gelu(x, approximate=False), kernel, 1, padding)
    y = max_pool(y) if pool else y
    counted = y * mask.reshape(-1, 1, 1, 1)
    return y, jnp.stack([counted.sum((0, 1, 2)), (counted * y).sum((0, 1, 2))])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_results_sums_and_gradients_are_those_of_lax(shape, monkeypatch):
    """After what the layer before left undone, with masked images that are in no sum."""
    monkeypatch.setattr(pieces, "IMAGES", 8)
    n, h, w, c, f, padding, pool = shape
    with jax.enable_x64(True):
        arguments = _rows(0, (n, h, w, c), (3, 3, c, f), (c,), (c,))
        mask = jnp.arange(n) % 3 != 1

        def run(function):
            def of(x, *rest):
                return function(x, mask.astype(x.dtype), *rest, padding, pool)

            values, pull = jax.vjp(of, *arguments)
            waves = [jnp.sin(1.7 * jnp.arange(v.size, dtype=v.dtype)) for v in values]
            waves = [a.reshape(v.shape) for a, v in zip(waves, values, strict=True)]
            return values, pull(tuple(waves))

        got, want = (jax.device_get(jit(run, static_argnums=0)(f)) for f in (in_pieces, by_lax))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert _relative(a, b) < 1e-12


@pytest.mark.parametrize(
    ("size", "stated"),
    [(2, 3e-7), (3, 1e-6), (4, 1e-6), (5, 1.6e-6), (6, 3.3e-6), (7, 8.3e-6), (8, 1.8e-5)],
)
def test_rounding_is_what_the_table_of_points_states(size, stated):
    x, kernel = _rows(1, (40, size + 2, size + 2, 64), (3, 3, 64, 16))
    x, kernel = (a.astype(np.float32) for a in (x, kernel))
    y = large_tiles.convolve(pieces.to_pieces(x), kernel, padding=0, pool=False)
    got = np.asarray(pieces.to_images(y), np.float64)
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    places = [(i, j) for i in range(3) for j in range(3)]
    want = sum(x[:, i : i + size, j : j + size] @ kernel[i, j] for i, j in places)
    error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
    assert error < 1.5 * stated


def test_batch_norm_has_the_statistics_of_the_batch_that_counts():
    """On two devices, of which the second has masked images only, as on one and over images."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    norm = BatchNorm(axis_name="data", use_scale=False)
    with jax.enable_x64(True):
        x, kernel = _rows(2, (12, 5, 5, 3), (3, 3, 3, 4))
        mask = (jnp.arange(12) < 6).astype(x.dtype)
        variables = {"params": {"bias": _rows(3, (4,))[0]}}
        variables["batch_stats"] = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

        def loss(x, mask, kernel, bias, lowering):
            norm_of = norm if lowering == "pieces" else BatchNorm(use_scale=False)
            inner = pieces.to_pieces(x, mask) if lowering == "pieces" else x
            y = convolution.convolve(inner, kernel, padding=1, lowering="lax")
            given = {**variables, "params": {"bias": bias}, "position": {"mask": mask}}
            y, updates = norm_of.apply(given, y, train=True, mutable=["batch_stats"])
            y = convolution.to_images(y)
            return (jnp.sin(y) * mask.reshape(-1, 1, 1, 1)).sum(), updates

        def gradients(x, mask, kernel, bias):
            found, updates = jax.grad(loss, argnums=(2, 3), has_aux=True)(
                x, mask, kernel, bias, "pieces"
            )
            return found, updates

        spec = PartitionSpec
        specs = (spec("data"), spec("data"), spec(), spec())
        split = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=spec())
        bias = variables["params"]["bias"]
        got = jit(split)(x, mask, kernel, bias)
        whole = jit(jax.grad(loss, argnums=(2, 3), has_aux=True), static_argnums=4)
        want = whole(x, mask, kernel, bias, "lax")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert _relative(a, b) < 1e-11


def test_a_2x2_convolution_of_pieces_and_its_bias():
    with jax.enable_x64(True):
        x, kernel = _rows(4, (5, 6, 7, 3), (2, 2, 3, 8))
        y = convolution.convolve(pieces.to_pieces(x), kernel)
        want = lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        assert _relative(convolution.to_images(y), want) < 1e-12
        assert _relative(pieces.global_max(y), want.max(axis=(1, 2))) < 1e-12
