"""Image transforms inside the step: normalisation, random augmentation, resizing.

All are pure and jittable, [N, H, W, C] in and out. Augmentations draw from one key an image,
`fold_in(key, global index in the batch)`, so a shard of a batch sees what the whole would.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.runtime.errors import UserError, lookup

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


AUGMENTATIONS = {"cutout": random_cutout, "flip": random_flip, "translate": random_translate}


def augment(
    images: jax.Array, names: tuple[str, ...], key: jax.Array, first_example: int | jax.Array = 0
) -> jax.Array:
    """Applies the named augmentations, in order, to normalised images [N, H, W, C].

    Args:
      key: typed PRNG key of this step.
      first_example: position of images[0] in the global batch.

    Raises:
      UserError: unknown augmentation.
    """
    functions = [lookup(AUGMENTATIONS, name, "augmentation") for name in names]
    positions = jnp.arange(images.shape[0], dtype=jnp.int32) + first_example
    for salt, function in enumerate(functions):
        salted = jax.random.fold_in(key, salt)
        keys = jax.vmap(lambda i, base=salted: jax.random.fold_in(base, i))(positions)
        images = jax.vmap(function)(images, keys)
    return images
