"""The built-in set."""

import dataclasses

import numpy as np

from cifar_jax.datasets import shapes10


def test_shapes10_is_balanced_and_never_changes():
    images, labels = shapes10.draw_split("train", 250)
    again, _ = shapes10.draw_split("train", 250)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(images[:120], shapes10.draw_split("train", 120)[0])
    assert np.bincount(labels).tolist() == [25] * 10
    assert not np.array_equal(images[:100], shapes10.draw_split("test", 100)[0])
    assert images.dtype == np.uint8
    assert images.reshape(250, -1).std(axis=1).min() > 4  # no image is blank


def test_shapes10_shapes_differ_as_drawn():
    """Without noise and clutter every class covers another part of the square."""
    grid = np.linspace(-1.2, 1.2, 96, dtype=np.float32)
    v, u = np.meshgrid(grid, grid, indexing="ij")
    covered = [distance(u, v) < 0 for distance in shapes10.SHAPES.values()]
    for i, one in enumerate(covered):
        assert 0.1 < one.mean() < 0.7
        for other in covered[:i]:
            assert (one ^ other).mean() > 0.02


def test_shapes10_can_be_learnt_but_not_by_colour():
    """Nearest class mean stays weak: the classes are shapes, not colours."""
    easy = dataclasses.replace(shapes10.HARDNESS, noise=0.0)
    images, labels = shapes10.draw(np.random.default_rng(0), 1000, easy)
    flat = images.reshape(1000, -1).astype(np.float32)
    means = np.stack([flat[:500][labels[:500] == c].mean(axis=0) for c in range(10)])
    nearest = ((flat[500:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[500:]).mean() < 0.4
