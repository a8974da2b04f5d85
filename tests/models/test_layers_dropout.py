"""The hash behind dropout: its statistics, and that masks belong to examples, not to batches;
and what a step gives a module that draws in its own way."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from cifar_jax.models.layers import Dropout, dropout_mask, random_words
from cifar_jax.parallel.data_parallel import pmap_train_step, shard_map_train_step
from cifar_jax.steps import create_state, train_step

SHAPE = (64, 1024)
KEYS = [jax.random.key(seed) for seed in range(20)]
# Keys as training makes them: consecutive steps folded into one run key, then layers.
STEP_KEYS = [jax.random.fold_in(jax.random.key(7), step) for step in range(20)]
# Raw words that differ in a single bit, the hardest for a weak hash.
NEAR_KEYS = [jnp.array(words, jnp.uint32) for words in ([0, 0], [0, 1], [1, 0], [0, 2**31], [1, 1])]


def _words(key, shape=SHAPE, first=0):
    return np.asarray(random_words(key, shape, first)).astype(np.uint64)


def _uniforms(key, shape=SHAPE):
    return (_words(key, shape) + 0.5) / 2**32 - 0.5


def test_mean_and_variance():
    """Of 65,536 uniforms a key: each within 4.5 standard errors, over 45 keys."""
    count = SHAPE[0] * SHAPE[1]
    for key in (*KEYS, *STEP_KEYS, *NEAR_KEYS):
        u = _uniforms(key)
        assert abs(u.mean()) < 4.5 * np.sqrt(1 / 12 / count)
        assert abs(u.var() - 1 / 12) < 4.5 * np.sqrt(1 / 180 / count)


def test_every_bit_is_fair_and_independent_of_its_neighbours():
    words = _words(KEYS[0]).reshape(-1)
    bits = ((words[:, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)).astype(float) - 0.5
    error = 0.5 / np.sqrt(len(words))
    assert np.abs(bits.mean(axis=0)).max() < 4.5 * error
    pairs = bits.T @ bits / len(words) - np.eye(32) / 4
    assert np.abs(pairs).max() < 5 * 0.5 * error


@pytest.mark.parametrize("keys", [KEYS, STEP_KEYS], ids=["seeds", "steps"])
def test_chi_squared_over_256_cells(keys):
    """Top and bottom bytes: the sum over keys of chi2 with 255 degrees each, within 4.5 sigma."""
    for shift in (24, 0):
        total = 0.0
        for key in keys:
            cells = (_words(key).reshape(-1) >> np.uint64(shift)) & np.uint64(255)
            counts = np.bincount(cells.astype(int), minlength=256)
            expected = counts.sum() / 256
            total += ((counts - expected) ** 2 / expected).sum()
        degrees = 255 * len(keys)
        assert abs(total - degrees) < 4.5 * np.sqrt(2 * degrees)


def _correlation(a, b):
    return float((a * b).mean() * 12 * np.sqrt(a.size))  # in standard errors


def test_no_correlation_along_features_or_examples():
    """Lags within a mask: neighbours, powers of two, whole rows."""
    for key in (*KEYS[:5], *STEP_KEYS[:5], *NEAR_KEYS):
        flat = _uniforms(key).reshape(-1)
        for lag in (1, 2, 3, 4, 8, 16, 31, 64, 255, 500, 1023, 1024, 1025, 4096):
            assert abs(_correlation(flat[:-lag], flat[lag:])) < 5


@pytest.mark.parametrize("keys", [KEYS, STEP_KEYS, NEAR_KEYS], ids=["seeds", "steps", "near"])
def test_no_correlation_between_keys(keys):
    """Also at shifted counters: a key must not be another one's sequence further on."""
    drawn = [_uniforms(key).reshape(-1) for key in keys]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(_correlation(a, b)) < 5
            assert abs(_correlation(a[1:], b[:-1])) < 5
            assert abs(_correlation(a[1024:], b[:-1024])) < 5


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_rate_by_example_by_feature_and_by_pair(rate):
    masks = np.stack([np.asarray(dropout_mask(key, SHAPE, rate)) for key in STEP_KEYS]) - (1 - rate)
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(masks.mean()) < 4.5 * sigma / np.sqrt(masks.size)
    by_example = masks.mean(axis=2) / (sigma / np.sqrt(SHAPE[1]))
    by_feature = masks.mean(axis=(0, 1)) / (sigma / np.sqrt(len(masks) * SHAPE[0]))
    assert np.abs(by_example).max() < 5
    assert np.abs(by_feature).max() < 5
    assert by_example.std() == pytest.approx(1, abs=0.1)
    assert by_feature.std() == pytest.approx(1, abs=0.1)
    rows = masks.reshape(-1, SHAPE[1])[:200]
    pairs = (rows @ rows.T)[np.triu_indices(200, 1)] / (sigma**2 * np.sqrt(SHAPE[1]))
    assert pairs.std() == pytest.approx(1, abs=0.03)
    assert np.abs(pairs).max() < 6


def test_masks_of_different_steps_and_layers_differ():
    seen = {np.asarray(dropout_mask(key, (8, 64), 0.5)).tobytes() for key in (*KEYS, *STEP_KEYS)}
    assert len(seen) == 40
    layers = _TwoLayers()
    ones = jnp.ones((4, 256))
    a, b = layers.apply({}, ones, rngs={"dropout": KEYS[0]})
    assert not np.array_equal(a, b)


class _TwoLayers(Dropout):
    """Two dropout layers in one module."""

    rate: float = 0.5

    def setup(self):
        self.first, self.second = Dropout(0.5), Dropout(0.5)

    def __call__(self, x):
        return self.first(x, True), self.second(x, True)


def test_an_examples_mask_does_not_depend_on_its_batch():
    whole = dropout_mask(KEYS[0], (64, 100), 0.3)
    for first, count in ((0, 1), (5, 7), (63, 1), (32, 32)):
        part = dropout_mask(KEYS[0], (count, 100), 0.3, jnp.int32(first))
        np.testing.assert_array_equal(part, whole[first : first + count])


def test_the_layer_reads_its_position_from_the_variables():
    layer, x = Dropout(0.25), jnp.ones((6, 50))
    rngs = {"dropout": KEYS[1]}
    whole = layer.apply({}, x, True, rngs=rngs)
    part = layer.apply({"position": {"first_example": jnp.int32(4)}}, x[:2], True, rngs=rngs)
    np.testing.assert_array_equal(part, whole[4:])
    kept = np.asarray(whole)[np.asarray(whole) != 0]
    np.testing.assert_allclose(kept, 1 / 0.75, rtol=1e-6)
    assert 0.6 < len(kept) / whole.size < 0.9


def test_evaluation_and_rate_zero_draw_nothing():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_any_kind_of_key(kind):
    a, b = (dropout_mask(jax.random.key(seed, impl=kind), (4, 512), 0.5) for seed in (0, 1))
    assert 0.4 < a.mean() < 0.6
    assert not np.array_equal(a, b)


IMAGES, FEATURES = 12, 64
# Its update is the gradient itself, kept in the optimizer state for the test to read.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, *_: (jax.tree.map(jnp.zeros_like, grads), grads),
)


class _OwnRows(nn.Module):
    """Dropout of a row of weights for each image, by its first number: the gradient is the mask."""

    stream: str = ""  # of flax's own dropout; "" for this package's

    @nn.compact
    def __call__(self, x, train=False):
        dense = nn.Dense(FEATURES, use_bias=False, kernel_init=nn.initializers.ones)
        rows = dense(jax.nn.one_hot(x[:, 0, 0, 0].astype(jnp.int32), IMAGES))
        if not self.stream:
            return Dropout(0.5)(rows, train)
        return nn.Dropout(0.5, rng_collection=self.stream)(rows, deterministic=not train)


WAYS = {
    "jit": lambda **options: jit(functools.partial(train_step, **options)),
    "shard_map": functools.partial(shard_map_train_step, devices=jax.devices()[:2]),
    "pmap": functools.partial(pmap_train_step, devices=jax.devices()[:2]),
}


def images_of_rows():
    image = np.zeros((IMAGES, 1, 1, 3), np.float32)
    image[:, 0, 0, 0] = np.arange(IMAGES)
    return image


def start_of(model):
    return create_state(model, KEEP_GRADIENT, jax.random.key(3), image_shape=(1, 1, 3))


def masks_of_a_step(stream, way, accumulate):
    """Bool [IMAGES, FEATURES]: what the dropout of `_OwnRows` kept of each image."""
    model = _OwnRows(stream)
    batch = {"image": images_of_rows(), "label": np.zeros(IMAGES, np.int32)}
    step = WAYS[way](model=model, optimizer=KEEP_GRADIENT, accumulate=accumulate)
    after, _ = step(start_of(model), batch)
    return np.asarray(after.opt_state["Dense_0"]["kernel"]) != 0


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_modules_draws_are_independent_in_every_part(way, accumulate):
    drawn = [masks_of_a_step(stream, way, accumulate) for stream in ("dropout", "noise")]
    bits = np.concatenate(drawn) - 0.5  # no two images, and no two streams, share a mask
    agreement = np.abs(bits @ bits.T * 4 / FEATURES)[np.triu_indices(len(bits), 1)]
    assert agreement.max() < 5 / np.sqrt(FEATURES)
    assert abs(bits.mean()) < 4.5 * 0.5 / np.sqrt(bits.size)


def test_this_packages_draws_are_those_of_the_whole_batch():
    key = jax.random.fold_in(start_of(_OwnRows()).key, 0)  # of the first step
    images, params = images_of_rows(), {"Dense_0": {"kernel": jnp.ones((IMAGES, FEATURES))}}
    rngs = {"dropout": jax.random.fold_in(key, 0)}
    whole = _OwnRows().apply({"params": params}, images, True, rngs=rngs) != 0
    assert 0.4 < whole.mean() < 0.6
    for way, accumulate in (("jit", 1), ("jit", 3), ("shard_map", 2), ("pmap", 1)):
        np.testing.assert_array_equal(masks_of_a_step("", way, accumulate), whole)
