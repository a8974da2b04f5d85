"""Mixup and cutmix against NumPy, given the same draws; the loss and the parts of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from test_steps import KEEP_GRADIENT, SHAPE, Tiny, assert_trees_close, batch_of, state_of

from cifar_jax import augment
from cifar_jax.parallel.data_parallel import shard_map_train_step
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import make_preprocess, step_keys, train_step

ALPHAS = {"mixup_alpha": 0.7, "cutmix_alpha": 1.0}
BOTH = ("flip", "mixup", "cutmix")


def mixer(*names):
    return augment.mixer(names, **ALPHAS)


def image_key(key, place):
    """(which of two, the draws) of an image."""
    key = jax.random.fold_in(jax.random.fold_in(key, 0x6D6978), place)
    return jax.random.split(key)


def mixed_up(image, other, key):
    share = np.float32(jax.random.beta(key, 0.7, 0.7))
    return share * image + (1 - share) * other, share


def cut_mixed(image, other, key):
    key_share, key_row, key_column = jax.random.split(key, 3)
    share = float(jax.random.uniform(key_share))  # which is Beta(1, 1)
    result, (height, width, _) = image.copy(), image.shape
    row = int(jax.random.randint(key_row, (), 0, height))
    column = int(jax.random.randint(key_column, (), 0, width))
    tall, wide = (int(np.sqrt(1 - share) * side) // 2 for side in (height, width))
    rows = slice(max(row - tall, 0), row + tall)
    columns = slice(max(column - wide, 0), column + wide)
    result[rows, columns] = other[rows, columns]
    lost = result[rows, columns].shape
    return result, 1 - lost[0] * lost[1] / (height * width)


REFERENCES = {"mixup": mixed_up, "cutmix": cut_mixed}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (17, 16, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_numpy_reference(name, images):
    key, mask = jax.random.key(3), np.ones(17, np.float32)
    mask[5] = 0
    got = jit(mixer(name))(images, key, 0, mask)
    partners = [*np.arange(16).reshape(8, 2)[:, ::-1].ravel(), 16]
    np.testing.assert_array_equal(got.partner, partners)
    for place, partner in enumerate(partners):
        want, share = REFERENCES[name](images[place], images[partner], image_key(key, place)[1])
        if place in (4, 16):  # whose neighbour is padding, or missing
            want, share = images[place], 1
        np.testing.assert_allclose(got.images[place], want, rtol=1e-5, atol=1e-6)
        assert float(got.share[place]) == pytest.approx(share, abs=1e-6)
    assert len(set(np.asarray(got.share).tolist())) > 8, "each image draws its own"


def test_of_both_each_image_draws_one(images):
    key, mask = jax.random.key(4), np.ones(17, np.float32)
    got = jit(mixer(*BOTH))(images, key, 0, mask)
    used = set()
    for place in range(16):
        which, draws = image_key(key, place)
        second = bool(jax.random.bernoulli(which))
        want, _ = (cut_mixed if second else mixed_up)(images[place], images[place ^ 1], draws)
        np.testing.assert_allclose(got.images[place], want, rtol=1e-5, atol=1e-6)
        used.add(second)
    assert used == {True, False}
    assert mixer("flip") is None
    with pytest.raises(UserError, match="mixup mixes images of a batch"):
        augment.augment(images, ("mixup",), jax.random.key(0))


def test_low_precision_stays(images):
    got = jit(mixer(*BOTH))(jnp.asarray(images, jnp.bfloat16), jax.random.key(0), 0, np.ones(17))
    assert (got.images.dtype, got.share.dtype) == (jnp.bfloat16, jnp.float32)


@functools.cache
def stepped(**options):
    """One step on 16 images, of which the fifth is padding, and its sums."""
    state, batch = state_of(Tiny(rate=0.0)), batch_of(16)
    batch["mask"] = np.ones(16, np.float32)
    batch["mask"][5] = 0
    devices = options.pop("devices", 0)
    given = {"model": Tiny(rate=0.0), "optimizer": KEEP_GRADIENT, "label_smoothing": 0.1}
    given |= {"mix": mixer(*BOTH), **options}
    if devices:
        return (
            state,
            batch,
            *shard_map_train_step(devices=jax.devices()[:devices], **given)(state, batch),
        )
    return state, batch, *jit(functools.partial(train_step, **given))(state, batch)


def test_the_loss_is_that_of_soft_targets_and_the_larger_share_counts():
    state, batch, after, sums = stepped()
    mixed = mixer(*BOTH)(
        make_preprocess()(batch["image"]), step_keys(state.key, 0)[1], 0, batch["mask"]
    )
    share, hot = np.asarray(mixed.share)[:, None], np.eye(5, dtype=np.float32)[batch["label"]]
    targets = 0.9 * (share * hot + (1 - share) * hot[mixed.partner]) + 0.1 / 5
    assert (share < 0.5).any()

    def loss(params):
        logits = Tiny(rate=0.0).apply({"params": params}, mixed.images)
        return -(targets * jax.nn.log_softmax(logits) * batch["mask"][:, None]).sum(), logits

    (want, logits), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    assert float(sums["loss"]) == pytest.approx(float(want), rel=1e-5)
    assert_trees_close(
        after.opt_state, jax.tree.map(lambda g: g / 15, gradient), rtol=1e-4, atol=1e-6
    )
    larger = np.where(share[:, 0] >= 0.5, batch["label"], batch["label"][mixed.partner])
    right = np.asarray(logits.argmax(axis=1)) == larger
    assert float(sums["correct"]) == (right * batch["mask"]).sum()


@pytest.mark.parametrize("how", [{"accumulate": 4}, {"devices": 2}, {"devices": 4}])
def test_parts_of_even_length_are_mixed_as_the_whole_is(how):
    _, _, whole, sums = stepped()
    _, _, parts, added = stepped(**how)
    assert_trees_close(parts.opt_state, whole.opt_state, rtol=1e-4, atol=1e-6)
    assert_trees_close(added, sums, rtol=1e-5)


def test_it_needs_no_more_than_a_batch_of_one():
    image = np.zeros((1, *SHAPE), np.float32)
    got = jit(mixer("mixup"))(image, jax.random.key(0), 0, np.ones(1, np.float32))
    assert float(got.share[0]) == 1
