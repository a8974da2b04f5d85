"""The fifteen corruptions of CIFAR-10-C, made on the fly from test images, at five severities.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (2019), arXiv:1903.12261; the numbers in `CORRUPTIONS` are those of the authors'
script for CIFAR (`make_cifar_c.py` of hendrycks/robustness), for images of 32 pixels. What is drawn
at random comes from the corruption's and the severity's own generator: every network sees the same
corrupted images. They are not the published files bit for bit, and two layers are made otherwise:
`frost` is drawn, not cut out of photographs, and what moves is blurred by this file's own form of
ImageMagick's kernel.

Functions take float32 images [N, H, W, 3] in [0, 1] and a generator, and return the same, before
they are clipped.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar_jax.runtime.errors import UserError, nearest

SEVERITIES = 5
_AT_A_TIME = 1000  # images, so that a corruption takes some 100 MB


def corrupt(images: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Returns images corrupted by one of `CORRUPTIONS`.

    Args:
      images: uint8 [N, H, W, 3].
      name: a key of `CORRUPTIONS`.
      severity: 1 to 5.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      UserError: an unknown name or severity.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; {nearest(name, CORRUPTIONS)}")
    if not 1 <= severity <= SEVERITIES:
        raise UserError(f"the severity must be 1 to {SEVERITIES}, got {severity}")
    function, settings = CORRUPTIONS[name]
    setting = settings[severity - 1]
    setting = setting if isinstance(setting, tuple) else (setting,)
    rng = np.random.default_rng([list(CORRUPTIONS).index(name), severity])
    found = []
    for start in range(0, len(images), _AT_A_TIME):
        x = images[start : start + _AT_A_TIME].astype(np.float32) / 255
        found.append((np.clip(function(x, rng, *setting), 0, 1) * 255).astype(np.uint8))
    return np.concatenate(found) if found else images


def load_prepared(folder: Path, name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [10000, 32, 32, 3], labels int32 [10000]) of a directory with the
    published CIFAR-10-C: `NAME.npy` of all severities one after another, and `labels.npy`.

    Raises:
      UserError: a file is missing or not of that form.
    """
    arrays = []
    for path in (Path(folder) / f"{name}.npy", Path(folder) / "labels.npy"):
        try:
            arrays.append(np.load(path, mmap_mode="r"))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: CIFAR-10-C has one such file a corruption"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
    images, labels = arrays
    count = len(images) // SEVERITIES
    if images.ndim != 4 or images.dtype != np.uint8 or len(labels) not in (count, len(images)):
        raise UserError(f"{folder} does not hold CIFAR-10-C: {name}.npy has shape {images.shape}")
    part = slice((severity - 1) * count, severity * count)
    labels = labels[part] if len(labels) == len(images) else labels
    return np.array(images[part]), np.array(labels, np.int32)


# Noise.


def _gaussian_noise(x, rng, deviation):
    return x + rng.normal(0, deviation, x.shape).astype(np.float32)


def _shot_noise(x, rng, photons):
    return rng.poisson(x * photons) / np.float32(photons)


def _impulse_noise(x, rng, share):
    """Salt and pepper, alike often, on so many of all numbers."""
    drawn = rng.random(x.shape, np.float32)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 1, x))


# Blur.


def _gaussian(x, deviation):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest")


def _defocus_blur(x, rng, radius, alias):
    """A disk, of which a Gaussian of 3x3 takes the edge off."""
    from scipy.ndimage import convolve

    reach = math.floor(radius) + 1
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float32)
    line = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    soft = np.outer(line, line) / line.sum() ** 2
    kernel = convolve(disk / disk.sum(), soft.astype(np.float32), mode="constant")
    return convolve(x, kernel[None, :, :, None], mode="mirror")


def _glass_blur(x, rng, deviation, reach, rounds):
    """Each pixel takes the place of a near one, one after the other; blurred before and after. The
    script means to swap two pixels, but its first assignment overwrites what the second reads."""
    x = np.floor(_gaussian(x, deviation) * 255).astype(np.float32) / 255
    images, height, width = x.shape[:3]
    every = np.arange(images)
    for _ in range(rounds):
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                across, down = rng.integers(-reach, reach, (2, images))
                x[:, row, column] = x[every, row + down, column + across]
    return _gaussian(x, deviation)


def _along(x, degrees, radius, deviation):
    """Blurs each image [H, W, C] towards its own direction, `degrees` [N], by a one-sided Gaussian
    of 2 * radius + 1 pixels; beyond the edge lies the edge."""
    length = 2 * radius + 1
    weights = np.exp(-(np.arange(length) ** 2) / (2 * deviation**2))
    weights /= weights.sum()
    angle = np.deg2rad(degrees)[:, None, None]
    rows, columns = np.arange(x.shape[1])[:, None], np.arange(x.shape[2])
    every = np.arange(len(x))[:, None, None]
    found = np.zeros_like(x)
    for i, weight in enumerate(weights):
        down = np.ceil(i * np.sin(angle) - 0.5).astype(int)
        across = np.ceil(i * np.cos(angle) - 0.5).astype(int)
        at = np.clip(rows + down, 0, x.shape[1] - 1), np.clip(columns + across, 0, x.shape[2] - 1)
        found += np.float32(weight) * x[(every, *at)]
    return found


def _motion_blur(x, rng, radius, deviation):
    return _along(x, rng.uniform(-45, 45, len(x)), radius, deviation)


def _enlarging(size: int, factor: float) -> np.ndarray:
    """Returns float32 [size, size]: a line of pixels times it is its middle, `factor` times as
    large, interpolated linearly."""
    part = math.ceil(size / factor)
    large = round(part * factor)
    at = np.arange(large) * (part - 1) / max(large - 1, 1)
    lower = np.minimum(at.astype(int), max(part - 2, 0))
    matrix = np.zeros((large, size), np.float32)
    first = (size - part) // 2
    matrix[np.arange(large), first + lower] = 1 - (at - lower)
    matrix[np.arange(large), first + np.minimum(lower + 1, part - 1)] += at - lower
    trim = (large - size) // 2
    return matrix[trim : trim + size]


def _enlarged(x, factor):
    images, height, width, channels = x.shape
    down, across = _enlarging(height, factor), _enlarging(width, factor)
    x = (down @ x.reshape(images, height, -1)).reshape(x.shape)
    return (across @ x.reshape(-1, width, channels)).reshape(x.shape)


def _zoom_blur(x, rng, largest):
    factors = np.arange(1, largest, 0.01)
    return (x + sum(_enlarged(x, factor) for factor in factors)) / (len(factors) + 1)


# Weather.


def _clouds(rng, images: int, side: int, decay: float) -> np.ndarray:
    """Returns fractal height maps float32 [N, side, side] in [0, 1], by the diamond-square
    algorithm on a torus; each halving of the distance divides the roughness by `decay`."""
    size = 1 << max(side - 1, 1).bit_length()
    heights = np.zeros((images, size, size), np.float32)
    step, rough = size, 100.0

    def mean_of(corners):
        return corners / 4 + rough * rng.uniform(-rough, rough, corners.shape)

    while step >= 2:
        half = step // 2
        corner = heights[:, ::step, ::step]
        two = corner + np.roll(corner, -1, axis=1)
        heights[:, half::step, half::step] = mean_of(two + np.roll(two, -1, axis=2))
        middle = heights[:, half::step, half::step]
        beside = middle + np.roll(middle, 1, axis=1) + corner + np.roll(corner, -1, axis=2)
        heights[:, ::step, half::step] = mean_of(beside)
        above = middle + np.roll(middle, 1, axis=2) + corner + np.roll(corner, -1, axis=1)
        heights[:, half::step, ::step] = mean_of(above)
        step, rough = half, rough / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return (heights / heights.max(axis=(1, 2), keepdims=True))[:, :side, :side]


def _fog(x, rng, amount, decay):
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    clouds = _clouds(rng, len(x), max(x.shape[1:3]), decay)[:, : x.shape[1], : x.shape[2], None]
    return (x + amount * clouds) * brightest / (brightest + amount)


_ICE = np.array([0.78, 0.88, 1.0], np.float32)  # red, green, blue


def _frost(x, rng, share, amount):
    """Bluish ridges of a fractal, where it is near its middle height."""
    clouds = _clouds(rng, len(x), max(x.shape[1:3]), 2.0)[:, : x.shape[1], : x.shape[2], None]
    return share * x + amount * (1 - np.abs(2 * clouds - 1)) ** 2 * _ICE


_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _snow(x, rng, mean, deviation, zoom, least, radius, blur, kept):
    flakes = rng.normal(mean, deviation, (*x.shape[:3], 1)).astype(np.float32)
    flakes = _enlarged(flakes, zoom)
    flakes = np.where(flakes < least, 0, np.clip(flakes, 0, 1))
    flakes = _along(flakes, rng.uniform(-135, -45, len(x)), radius, blur)
    pale = np.maximum(x, (x @ _GREY)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * pale + flakes + flakes[:, ::-1, ::-1]


# Digital.


def _brightness(x, rng, amount):
    """The V of HSV is the largest of the three."""
    value = x.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1e-12)), brighter)


def _contrast(x, rng, share):
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + share * (x - mean)


def _sampled(x, rows, columns, mirror):
    """Returns x [N, H, W, C] at places [N, H, W] between pixels, linearly; `mirror(i, size)` says
    which pixel stands for one outside."""
    every = np.arange(len(x))[:, None, None]
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    found = np.zeros_like(x)
    for down in (0, 1):
        for across in (0, 1):
            weight = (1 - np.abs(rows - top - down)) * (1 - np.abs(columns - left - across))
            at = mirror(top + down, x.shape[1]), mirror(left + across, x.shape[2])
            found += weight[..., None].astype(np.float32) * x[(every, *at)]
    return found


def _around_the_edge(i, size):
    """... 2 1 0 1 2 ...: the pixel at the edge stands once."""
    i = np.abs(i) % max(2 * (size - 1), 1)
    return np.minimum(i, 2 * (size - 1) - i)


def _with_the_edge(i, size):
    """... 1 0 0 1 ...: it stands twice."""
    i = i % (2 * size)
    return np.minimum(i, 2 * size - 1 - i)


def _elastic_transform(x, rng, shift, smooth, stretch):
    """An affine map that moves three points by up to `stretch` of the side, then each pixel by a
    smooth field; all three numbers are shares of the side."""
    from scipy.ndimage import gaussian_filter

    images, height, width = x.shape[:3]
    side, middle = min(height, width), np.array([width // 2, height // 2], float)
    reach = side // 3
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]], float)
    moved = corners + rng.uniform(-stretch * side, stretch * side, (images, 3, 2))
    ones = np.ones((images, 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], axis=2), corners)  # [N, 3, (x, y)]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back[:, None]
    x = _sampled(x, places[..., 1], places[..., 0], _around_the_edge)
    field = rng.uniform(-1, 1, (2, images, height, width))
    if shift:
        widths = (0, 0, smooth * side, smooth * side)
        field = gaussian_filter(field, widths, mode="reflect", truncate=3)
    down, across = shift * side * field
    return _sampled(x, rows + down, columns + across, _with_the_edge)


def _each(x, change: Callable) -> np.ndarray:
    from PIL import Image

    pictures = (Image.fromarray(image) for image in (x * 255).round().astype(np.uint8))
    return np.stack([np.asarray(change(picture)) for picture in pictures]).astype(np.float32) / 255


def _pixelate(x, rng, share):
    from PIL import Image

    height, width = x.shape[1:3]
    few = max(int(width * share), 1), max(int(height * share), 1)
    box = Image.Resampling.BOX
    return _each(x, lambda picture: picture.resize(few, box).resize((width, height), box))


def _jpeg_compression(x, rng, quality):
    from PIL import Image

    def change(picture):
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=quality)
        return Image.open(file)

    return _each(x, change)


# name: (function, its numbers at severity 1 to 5), in the order of the paper's tables.
CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
}
