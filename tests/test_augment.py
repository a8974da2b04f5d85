"""Image transforms against NumPy references that are given the same draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import augment
from cifar_jax.augment import AUGMENTATIONS, NORMALIZATIONS, normalize
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import make_preprocess

COUNT = 24


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (COUNT, 32, 32, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def augmented(images, names, key, first_example=0):
    return augment.augment(images, names, key, first_example)


def image_keys(key, count=COUNT, salt=0):
    """One key an image: fold_in(fold_in(key, place in the list), position in the batch)."""
    return [jax.random.fold_in(jax.random.fold_in(key, salt), i) for i in range(count)]


def flipped(image, key):
    return image[:, ::-1] if bool(jax.random.bernoulli(key)) else image


def translated(image, key):
    top, left = np.asarray(jax.random.randint(key, (2,), 0, 9))
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    return padded[top : top + 32, left : left + 32]


def cut_out(image, key):
    row_key, column_key = jax.random.split(key)
    top = int(jax.random.randint(row_key, (), 0, 25))
    left = int(jax.random.randint(column_key, (), 0, 25))
    result = image.copy()
    result[top : top + 8, left : left + 8] = 0
    return result


REFERENCES = {"flip": flipped, "translate": translated, "cutout": cut_out}


def test_every_augmentation_has_a_reference():
    assert set(REFERENCES) == set(AUGMENTATIONS)


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_numpy_reference(name, images):
    key = jax.random.key(3)
    got = augmented(images, (name,), key)
    want = [REFERENCES[name](x, k) for x, k in zip(images, image_keys(key), strict=True)]
    np.testing.assert_array_equal(got, np.stack(want))
    changed = sum(not np.array_equal(a, b) for a, b in zip(images, want, strict=True))
    assert changed >= COUNT // 4, "the draws left nearly every image as it was"
    assert len({a.tobytes() for a in (np.asarray(got) - images)}) > 1


def test_all_together_in_the_order_named(images):
    key = jax.random.key(4)
    names = ("translate", "flip", "cutout")
    got = augmented(images, names, key)
    want = images
    for salt, name in enumerate(names):
        pairs = zip(want, image_keys(key, salt=salt), strict=True)
        want = np.stack([REFERENCES[name](x, k) for x, k in pairs])
    np.testing.assert_array_equal(got, want)


def test_a_shard_sees_what_the_whole_batch_sees(images):
    key, names = jax.random.key(5), ("flip", "translate", "cutout")
    whole = augmented(images, names, key)
    for first, length in ((0, 12), (7, 12), (12, 12)):
        shard = augmented(images[first : first + length], names, key, np.int32(first))
        np.testing.assert_array_equal(shard, whole[first : first + length])


def test_another_key_draws_otherwise(images):
    names = ("flip", "translate")
    first, again, other = (
        np.asarray(augmented(images, names, jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).mean() > 0.5


def test_the_draws_are_uniform():
    """400 images: half are mirrored, and all 81 shifts and all corners of a cutout occur."""
    ramp = np.zeros((400, 32, 32, 3), np.float32) + np.arange(32, dtype=np.float32)[:, None] / 32
    ramp = (ramp + np.arange(32, dtype=np.float32)[:, None, None]).astype(np.float32)
    key = jax.random.key(0)
    flips = np.asarray(augmented(jnp.asarray(ramp), ("flip",), key))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(flips, ramp, strict=True)])
    assert 160 < mirrored.sum() < 240
    cut = np.asarray(augmented(jnp.ones((400, 32, 32, 3)), ("cutout",), key))
    assert ((cut == 0).sum(axis=(1, 2, 3)) == 8 * 8 * 3).all()
    assert len(set(np.argmin(cut[:, :, :, 0].min(axis=2), axis=1))) == 25
    assert len(set(np.argmin(cut[:, :, :, 0].min(axis=1), axis=1))) == 25


def test_half_and_unit_equal_totensor_and_normalize():
    """All 256 values, against torch's float32 arithmetic of ToTensor and Normalize."""
    torch = pytest.importorskip("torch", reason="the yardstick is torch's arithmetic")
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    scaled = torch.tensor(pixels).to(torch.float32).div(255)
    for name, (mean, std) in NORMALIZATIONS.items():
        want = scaled.sub(torch.tensor(mean)).div(torch.tensor(std)).numpy()
        got = np.asarray(jax.jit(lambda x, name=name: normalize(x, name))(pixels))
        assert got.dtype == np.float32
        # A compiler may turn x / c into x * (1 / c): one unit in the last place each time.
        np.testing.assert_allclose(got, want, rtol=3e-7, atol=3e-7, err_msg=name)


def test_published_ranges():
    extremes = np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    assert np.asarray(normalize(extremes, "half")).ravel().tolist() == [-1] * 3 + [1] * 3
    assert np.asarray(normalize(extremes, "unit")).ravel().tolist() == [0] * 3 + [1] * 3
    assert normalize(extremes, "half", jnp.bfloat16).dtype == jnp.bfloat16


def test_float_images_count_as_normalised(images):
    np.testing.assert_array_equal(normalize(images, "cifar10"), images)


def test_cifar10_statistics_are_those_of_the_images(cifar10):
    pixels = np.asarray(cifar10.splits["train"].images).reshape(-1, 3)
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
    values = np.arange(256) / 255
    mean = counts @ values / len(pixels)
    std = np.sqrt(counts @ values**2 / len(pixels) - mean**2)
    np.testing.assert_allclose(mean, NORMALIZATIONS["cifar10"][0], atol=0.003)
    np.testing.assert_allclose(std, NORMALIZATIONS["cifar10"][1], atol=0.003)


def test_preprocess_augments_only_with_a_key(images):
    preprocess = jax.jit(make_preprocess("half", ("flip", "cutout")))
    np.testing.assert_array_equal(preprocess(images), images)
    key = jax.random.key(1)
    want = augmented(images[2:], ("flip", "cutout"), key, 2)
    np.testing.assert_array_equal(preprocess(images[2:], key, 2), want)
    assert (np.asarray(want) != images[2:]).any()


def test_unknown_names(images):
    with pytest.raises(UserError, match="did you mean 'flip'"):
        augment.augment(images, ("flipp",), jax.random.key(0))
    with pytest.raises(UserError, match="did you mean 'half'"):
        normalize(images, "hallf")
