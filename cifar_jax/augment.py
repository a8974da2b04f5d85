"""Image transforms inside the step: normalisation, random augmentation, resizing.

All are pure and jittable, [N, H, W, C] in and out. Augmentations draw from one key an image,
`fold_in(key, global index in the batch)`, so a shard of a batch sees what the whole would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.runtime.errors import UserError, lookup
from cifar_jax.settings import TTA_NAMES

# name -> (mean, standard deviation) of each channel on the [0, 1] scale.
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # Statistics of CIFAR-10's 50,000 training images.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # What torchvision's ImageNet weights expect.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalize(images: jax.Array, name: str = "half", dtype=jnp.float32) -> jax.Array:
    """Returns (x / 255 - mean) / std for uint8 images [..., 3], in `dtype`.

    Float images pass as they are (they count as normalised already), cast to `dtype`.

    Raises:
      UserError: unknown normalisation, or images of any other type.
    """
    mean, std = lookup(NORMALIZATIONS, name, "normalization")
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    if images.dtype != jnp.uint8:
        raise UserError(
            f"images of type {images.dtype} have no known range: give uint8 from 0 to 255, "
            "or floats that are normalised already"
        )
    x = images.astype(jnp.float32) / 255
    if len(set(mean)) == len(set(std)) == 1:
        x = (x - mean[0]) / std[0]
    else:
        shape = (1,) * (x.ndim - 1) + (3,)
        x = (x - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)
    return x.astype(dtype)


def displayable(images: np.ndarray, name: str = "half") -> np.ndarray:
    """Returns normalised float images [..., 3] as uint8: `normalize` undone, cut off at 0 and 255.

    Raises:
      UserError: unknown normalisation.
    """
    mean, std = lookup(NORMALIZATIONS, name, "normalization")
    x = np.asarray(images, np.float32) * np.array(std) + np.array(mean)
    return np.clip(np.rint(255 * x), 0, 255).astype(np.uint8)


def resize(images: jax.Array, size: int) -> jax.Array:
    """Returns float images [N, H, W, C] resized to [N, size, size, C], bilinear.

    Pixel centres at half-integers (PyTorch's `align_corners=False`). Where it shrinks, it
    averages over the pixels a result covers, as torchvision's `Resize` and `antialias=True` of
    `torch.nn.functional.interpolate` do; that function's default, without, differs there only.
    """
    shape = (images.shape[0], size, size, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=True)


def random_flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors one image [H, W, C] left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_translate(image: jax.Array, key: jax.Array, pixels: int = 4) -> jax.Array:
    """Shifts one image [H, W, C] by up to `pixels` each way, edges filled by reflection."""
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def random_cutout(image: jax.Array, key: jax.Array, size: int = 8) -> jax.Array:
    """Sets a size x size square of one image [H, W, C] to 0, the normalised mean.

    The square lies at a random place, wholly inside (DeVries & Taylor, arXiv:1708.04552, let it
    hang over the edge; inside, every image loses the same area).
    """
    height, width, _ = image.shape
    key_row, key_column = jax.random.split(key)
    top = jax.random.randint(key_row, (), 0, height - size + 1)
    left = jax.random.randint(key_column, (), 0, width - size + 1)
    rows, columns = jnp.arange(height), jnp.arange(width)
    hit_rows = (rows >= top) & (rows < top + size)
    hit_columns = (columns >= left) & (columns < left + size)
    hit = hit_rows[:, None, None] & hit_columns[None, :, None]
    return jnp.where(hit, jnp.zeros_like(image), image)


class OfRun(NamedTuple):
    """What an augmentation that is not new in every step draws from.

    Attributes:
      key: the run's typed PRNG key (`TrainState.key`).
      epoch: int32 scalar, from 0.
      index: int32 [N], the images' positions in the data set.
    """

    key: jax.Array
    epoch: jax.Array
    index: jax.Array


_FLIPS = 0x666C6970  # folded into the run's key, so that no step's draws are these


def alternating_flip(images: jax.Array, of_run: OfRun) -> jax.Array:
    """Mirrors half of all images [N, H, W, C] in even epochs and the others in odd ones: each draws
    once, by its place in the data set, and all are mirrored in every other epoch (Jordan,
    arXiv:2404.00498, section 3.6)."""
    key = jax.random.fold_in(of_run.key, _FLIPS)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(of_run.index)
    first = jax.vmap(jax.random.bernoulli)(keys)
    mirrored = first ^ (of_run.epoch % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


AUGMENTATIONS = {"cutout": random_cutout, "flip": random_flip, "translate": random_translate}
BY_RUN = {"alternating_flip": alternating_flip}


def check(names: tuple[str, ...]) -> None:
    """Raises `UserError` for a name that is of no augmentation."""
    for name in names:
        lookup(AUGMENTATIONS | BY_RUN | MIXES, name, "augmentation")


def augment(
    images: jax.Array,
    names: tuple[str, ...],
    key: jax.Array,
    first_example: int | jax.Array = 0,
    *,
    translate_pixels: int = 4,
    cutout_size: int = 8,
    of_run: OfRun | None = None,
) -> jax.Array:
    """Applies the named augmentations, in order, to normalised images [N, H, W, C].

    Args:
      key: typed PRNG key of this step.
      first_example: position of images[0] in the global batch.
      translate_pixels, cutout_size: of `random_translate` and `random_cutout`.
      of_run: what those of `BY_RUN` draw from.

    Raises:
      UserError: unknown augmentation, images too small for it, or one of `BY_RUN` without `of_run`.
    """
    check(names)
    for name in names:
        if name in MIXES:
            raise UserError(f"{name} mixes images of a batch and their labels: see `augment.mixer`")
    side = min(images.shape[1:3])
    if "translate" in names and translate_pixels >= side:
        raise UserError(
            f"--translate-pixels {translate_pixels} reflects more than images of {side} pixels have"
        )
    if "cutout" in names and cutout_size > side:
        raise UserError(f"--cutout-size {cutout_size} is more than images of {side} pixels have")
    options = {"translate": {"pixels": translate_pixels}, "cutout": {"size": cutout_size}}
    positions = jnp.arange(images.shape[0], dtype=jnp.int32) + first_example
    for salt, name in enumerate(names):
        if name in BY_RUN:
            if of_run is None:
                raise UserError(f"{name} needs the images' places in the data set: batch['index']")
            images = BY_RUN[name](images, of_run)
            continue
        function = functools.partial(AUGMENTATIONS[name], **options.get(name, {}))
        salted = jax.random.fold_in(key, salt)
        keys = jax.vmap(lambda i, base=salted: jax.random.fold_in(base, i))(positions)
        images = jax.vmap(function)(images, keys)
    return images


# Mixing the images of a batch, and with them their labels.


class Mixed(NamedTuple):
    """Images that are made of two each.

    Attributes:
      images: [N, H, W, C].
      partner: int32 [N], the place in the batch of each image's second one.
      share: float32 [N], of the first one, in [0, 1]: the target is share times the label of the
        first and 1 - share times that of the second.
    """

    images: jax.Array
    partner: jax.Array
    share: jax.Array


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    """Returns a draw from Beta(alpha, alpha); that of alpha 1 is uniform and quick to compile."""
    return jax.random.uniform(key) if alpha == 1 else jax.random.beta(key, alpha, alpha)


def mixup(image: jax.Array, other: jax.Array, key: jax.Array, alpha: float):
    """Returns share * image + (1 - share) * other of two images [H, W, C], and the share, drawn
    from Beta(alpha, alpha) (Zhang et al., arXiv:1710.09412)."""
    share = _beta(key, alpha)
    weight = share.astype(image.dtype)
    return weight * image + (1 - weight) * other, share


def cutmix(image: jax.Array, other: jax.Array, key: jax.Array, alpha: float):
    """Returns one image [H, W, C] with a rectangle of another, and the share of pixels that are its
    own (Yun et al., arXiv:1905.04899): the rectangle has the sides' shape and, of the area,
    1 - Beta(alpha, alpha), less what hangs over the edge; its centre is a random pixel."""
    key_share, key_row, key_column = jax.random.split(key, 3)
    side = jnp.sqrt(1 - _beta(key_share, alpha))
    hits = []
    for length, place in zip(image.shape[:2], (key_row, key_column), strict=True):
        half = (side * length).astype(jnp.int32) // 2
        centre = jax.random.randint(place, (), 0, length)
        pixels = jnp.arange(length)
        hits.append((pixels >= centre - half) & (pixels < centre + half))
    hit = hits[0][:, None] & hits[1][None, :]
    return jnp.where(hit[:, :, None], other, image), 1 - hit.mean()


MIXES = {"cutmix": cutmix, "mixup": mixup}
_MIXING = 0x6D6978  # folded into a step's key, so that no other draw of it is one of these


def mixer(names: tuple[str, ...], **alphas: float) -> Callable[..., Mixed] | None:
    """Returns `mix(images, key, first_example, mask)` of those of the names that mix images, None
    where none does; where both do, each image draws which.

    An image's partner is its neighbour: the first's is the second and the other way round, and so
    on; an epoch's order is random. An image stays as it is, with a share of 1, where its neighbour
    is masked or missing (the last of an odd number). So the parts of a batch, of devices or of
    `accumulate`, are mixed as the whole is where their lengths are even.

    Args:
      **alphas: `mixup_alpha` and `cutmix_alpha`, of the Beta distributions.
    """
    chosen = [name for name in names if name in MIXES]
    if not chosen:
        return None
    functions = [functools.partial(MIXES[n], alpha=alphas[f"{n}_alpha"]) for n in chosen]

    def mix(images: jax.Array, key: jax.Array, first_example, mask: jax.Array) -> Mixed:
        places = jnp.arange(images.shape[0], dtype=jnp.int32)
        partner = jnp.minimum(places ^ 1, images.shape[0] - 1)
        salted = jax.random.fold_in(key, _MIXING)

        def one(image, other, place, is_mixed):
            key_which, key_draw = jax.random.split(jax.random.fold_in(salted, place))
            mixed, share = functions[0](image, other, key_draw)
            if len(functions) > 1:
                second, second_share = functions[1](image, other, key_draw)
                is_second = jax.random.bernoulli(key_which)
                mixed = jnp.where(is_second, second, mixed)
                share = jnp.where(is_second, second_share, share)
            return jnp.where(is_mixed, mixed, image), jnp.where(is_mixed, share, 1.0)

        is_mixed = (mask[partner] > 0) & (partner != places)
        positions = places + first_example
        mixed, share = jax.vmap(one)(images, images[partner], positions, is_mixed)
        return Mixed(mixed, partner, share.astype(jnp.float32))

    return mix


def views(images: jax.Array, tta: str) -> tuple[jax.Array, tuple[float, ...]]:
    """Returns the views [V, N, H, W, C] of images [N, H, W, C] that test-time augmentation
    averages, and the weight of each.

    `mirror` is the image and its mirror image; `mirror-shift` both of these at their place (1/2)
    and, edges filled by reflection, one pixel down and right and one up and left (1/4 each), as
    airbench's `infer_mirror_translate`.

    Raises:
      UserError: an unknown name, or images of a single row or column.
    """
    if tta not in ("mirror", "mirror-shift"):
        lookup({name: None for name in TTA_NAMES}, tta, "tta")
        return images[None], (1.0,)
    height, width = images.shape[1:3]
    if min(height, width) < 2:
        raise UserError(f"--tta {tta} cannot shift images of {height}x{width} pixels")
    shifted = [images]
    if tta == "mirror-shift":
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        shifted += [padded[:, i : i + height, i : i + width] for i in (0, 2)]
    weights = (0.5, 0.25, 0.25) if len(shifted) > 1 else (1.0,)
    both = [view for x in shifted for view in (x, x[:, :, ::-1])]
    return jnp.stack(both), tuple(w / 2 for w in weights for _ in range(2))


WHITENING_EPSILON = 5e-4


def whitening_kernel(images: np.ndarray, size: int) -> np.ndarray:
    """Returns the kernel float32 [size, size, C, 2 D] of a convolution that whitens the patches of
    normalised images [N, H, W, C], D = size * size * C, and its negative.

    Filter i is eigenvector i of the patches' second moment by 1 / sqrt(eigenvalue + 5e-4), with the
    eigenvalues rising. The eigenvectors' signs are LAPACK's, so another machine may have others.

    Raises:
      UserError: fewer patches than D.
    """
    x = np.asarray(images, np.float64)
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    cut = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    patches = np.concatenate(cut, axis=-1)
    patches = patches.reshape(-1, patches.shape[-1])
    if len(patches) < patches.shape[1]:
        raise UserError(
            f"--whitening-images {len(x)} gives {len(patches)} patches of {size}x{size}: it takes "
            f"{patches.shape[1]} or more"
        )
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    kernel = vectors / np.sqrt(np.maximum(values, 0) + WHITENING_EPSILON)
    kernel = np.concatenate([kernel, -kernel], axis=1)
    return kernel.reshape(size, size, x.shape[3], -1).astype(np.float32)
