"""Draws the built-in set: ten shapes in random colours over textured backgrounds, 32x32 pixels.

Each shape is a signed distance function over the pixel grid: a pixel's coverage is read off its
distance to the outline, which gives smooth edges. Everything random comes from a fixed seed, one
generator for every 100 images, so splits can be drawn in parallel and never change.

Test accuracy of the small networks' own recipes on version 2.0.0, seed 42: tutorial 71.48 %, deep
76.01 %, dropout 89.38 %. A tenth of the shapes is hard to see, so that none comes near 95 %.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

VERSION = "2.0.0"
COUNTS = {"train": 50_000, "test": 10_000}
SEED = 20_261_122
_CHUNK = 100
_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Hardness:
    """How hard the set is. Change it only together with `VERSION`.

    Attributes:
      radius: smallest and largest radius of a shape, in pixels.
      turn: largest rotation either way, in radians.
      stretch: the two axes differ by a factor of up to exp of this.
      contrast: smallest and largest distance between the colours of shape and background, as a
        share of the way to an unrelated colour.
      faint: share of the images whose shape nearly has the background's colour: they bound the
        accuracy that can be reached, without making the others harder to learn from.
      hue: how far, of 1, a shape's colour is pulled towards its class's own. Colour alone must not
        tell the classes apart, but with none of it a deep network never leaves its plateau.
      texture: strength of the background's stripes and clouds, of 1.
      noise: largest standard deviation of the pixel noise, of 1.
      distractors: blots and bars drawn behind the shape.
      occluders: those drawn over it.
    """

    radius: tuple[float, float] = (8.0, 13.0)
    turn: float = 0.35
    stretch: float = 0.2
    contrast: tuple[float, float] = (0.75, 1.0)
    faint: float = 0.1
    hue: float = 0.4
    texture: float = 0.08
    noise: float = 0.05
    distractors: int = 1
    occluders: int = 0


HARDNESS = Hardness()


def _polygon(corners: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance to a closed polygon, corners [K, 2] in order; negative inside.

    The distance to each edge, with the sign from how often a ray crosses the outline, as in
    Inigo Quilez, "2D distance functions", https://iquilezles.org/articles/distfunctions2d/.
    """
    following = np.roll(corners, -1, axis=0)

    def distance(u, v):
        nearest = np.full(u.shape, np.inf, np.float32)
        inside = np.zeros(u.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners.tolist(), following.tolist(), strict=True):
            ex, ey = x1 - x0, y1 - y0
            wu, wv = u - x0, v - y0
            along = np.clip((wu * ex + wv * ey) / (ex * ex + ey * ey), 0, 1)
            np.minimum(nearest, (wu - along * ex) ** 2 + (wv - along * ey) ** 2, out=nearest)
            crosses = (v >= y0) != (v >= y1)
            inside ^= crosses & ((wu * ey < wv * ex) == (ey > 0))
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """Corners of a regular polygon of radius 1 standing on its base, or of a star."""
    count = corners if inner is None else 2 * corners
    angle = np.arange(count) * (2 * np.pi / count) - np.pi / 2
    radius = np.ones(count)
    if inner is not None:
        radius[1::2] = inner
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(u, v):
    return np.hypot(u, v) - 0.9


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.72) - 0.22


def _crescent(u, v):
    return np.maximum(np.hypot(u, v) - 1.0, 0.78 - np.hypot(u - 0.5, v))


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 15


_CROSS = [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)]
_CROSS += [(-x, -y) for x, y in _CROSS]
_ARROW = [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)]

# In label order. Coordinates: u to the right, v down, the shape about 1 in radius.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
    "triangle": _polygon(1.05 * _regular(3)),
    "square": _polygon(
        1.05 * np.array([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)])
    ),
    "pentagon": _polygon(_regular(5)),
    "star": _polygon(1.1 * _regular(5, inner=0.45)),
    "cross": _polygon(np.array(_CROSS)),
    "arrow": _polygon(np.array(_ARROW)),
    "heart": _polygon(_heart()),
}
CLASS_NAMES = tuple(SHAPES)

# Each class's own colour: once around the wheel.
_ANGLES = 2 * np.pi * (np.arange(len(SHAPES))[:, None] / len(SHAPES) + np.arange(3) / 3)
_COLOURS = (0.5 + 0.5 * np.cos(_ANGLES)).astype(np.float32)


def draw_split(split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` images and labels of `train` or `test` (all by default).

    Images are uint8 [N, 32, 32, 3], labels int64 [N]; every run of ten images shows each class
    once, in random order, so splits are balanced.
    """
    count = COUNTS[split] if count is None else count
    images = np.empty((count, _SIDE, _SIDE, 3), np.uint8)
    labels = np.empty(count, np.int64)

    def fill(chunk: int) -> None:
        # A number for each split keeps their generators apart; str hashes differ between runs.
        seed = [SEED, list(COUNTS).index(split), chunk]
        rows = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, count))
        drawn, shown = draw(np.random.default_rng(seed), _CHUNK, HARDNESS)
        kept = rows.stop - rows.start
        images[rows], labels[rows] = drawn[:kept], shown[:kept]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the interpreter lock
        list(pool.map(fill, range(-(-count // _CHUNK))))
    return images, labels


def draw(rng: np.random.Generator, count: int, hard: Hardness) -> tuple[np.ndarray, np.ndarray]:
    """Returns `count` (a multiple of 10) images uint8 [N, 32, 32, 3] and their labels int64 [N]."""
    classes = len(CLASS_NAMES)
    order = np.broadcast_to(np.arange(classes), (count // classes, classes))
    labels = rng.permuted(order, axis=1).reshape(-1)
    axis = np.arange(_SIDE, dtype=np.float32) + 0.5
    y, x = np.broadcast_arrays(axis[:, None], axis[None, :])

    back = _uniform(rng, count, 3)
    share = _uniform(rng, count, 1, low=hard.contrast[0], high=hard.contrast[1])
    faint = _uniform(rng, count, 1) < hard.faint
    share = np.where(faint, share * _uniform(rng, count, 1, high=0.1), share)
    other = _far_from(back, rng)
    other = other + np.float32(hard.hue) * (_COLOURS[labels] - other)
    fore = back + share * (other - back)

    image = _background(rng, back, x, y, hard)
    for _ in range(hard.distractors):
        image = _over(image, _blot(rng, count, x, y), _uniform(rng, count, 3))

    radius = _uniform(rng, count, 1, 1, low=hard.radius[0], high=hard.radius[1])
    reach = 0.9 * radius  # the centre stays where most of the shape is in the picture
    centre = [reach + (_SIDE - 2 * reach) * _uniform(rng, count, 1, 1) for _ in range(2)]
    turn = hard.turn * _uniform(rng, count, 1, 1, low=-1, high=1)
    stretch = np.exp(hard.stretch * _uniform(rng, count, 1, 1, low=-0.5, high=0.5))
    du, dv = x - centre[0], y - centre[1]
    u = (np.cos(turn) * du + np.sin(turn) * dv) / (radius * stretch)
    v = (np.cos(turn) * dv - np.sin(turn) * du) / (radius / stretch)
    coverage = np.empty(u.shape, np.float32)
    for label, distance in enumerate(SHAPES.values()):
        of_class = labels == label
        coverage[of_class] = 0.5 - distance(u[of_class], v[of_class]) * radius[of_class]
    # The surface is lit from one side, as real things are.
    slope = _uniform(rng, count, 1, 1, low=-0.15, high=0.15)
    image = _over(image, np.clip(coverage, 0, 1), fore, light=slope * (u + v))

    for _ in range(hard.occluders):
        image = _over(image, _blot(rng, count, x, y, small=True), _uniform(rng, count, 3))
    sigma = _uniform(rng, count, 1, 1, 1, high=hard.noise)
    image = image + sigma * rng.standard_normal(image.shape, np.float32)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), labels


def _uniform(rng, *shape, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return np.float32(low) + np.float32(high - low) * rng.random(shape, np.float32)


def _far_from(colour: np.ndarray, rng) -> np.ndarray:
    """Returns colours [N, 3] that differ clearly from `colour` [N, 3]: the farthest of four."""
    choices = _uniform(rng, 4, *colour.shape)
    distance = np.abs(choices - colour).sum(axis=2)
    return choices[distance.argmax(axis=0), np.arange(len(colour))]


def _over(image, coverage, colour, light=0.0) -> np.ndarray:
    """Paints `colour` [N, 3] over `image` [N, 32, 32, 3] where `coverage` [N, 32, 32] is 1."""
    paint = colour[:, None, None, :] + np.asarray(light, np.float32)[..., None]
    return image + coverage[..., None] * (paint - image)


def _background(rng, colour, x, y, hard: Hardness) -> np.ndarray:
    """A colour with a slope of light, waves in one direction, and clouds of colour."""
    count = len(colour)

    def wave(period_low, period_high):
        angle = _uniform(rng, count, 1, 1, high=2 * np.pi)
        period = _uniform(rng, count, 1, 1, low=period_low, high=period_high)
        phase = _uniform(rng, count, 1, 1, high=2 * np.pi)
        along = np.cos(angle) * x + np.sin(angle) * y
        return np.sin(along * (2 * np.pi / period) + phase)[..., None]

    tint = hard.texture * _uniform(rng, 3, count, 1, 1, 3, low=-1, high=1)
    slope, stripes = wave(60, 120), wave(4, 16)
    clouds = wave(10, 30) * wave(10, 30)
    return colour[:, None, None, :] + tint[0] * slope + tint[1] * stripes + tint[2] * clouds


def _blot(rng, count, x, y, small: bool = False) -> np.ndarray:
    """Coverage [N, 32, 32] of an ellipse, anything from a dot to a bar."""
    across, down = (_SIDE * _uniform(rng, count, 1, 1) for _ in range(2))
    angle = _uniform(rng, count, 1, 1, high=np.pi)
    long = _uniform(rng, count, 1, 1, low=1.0, high=3.0 if small else 9.0)
    short = _uniform(rng, count, 1, 1, low=0.8, high=1.8 if small else 3.0)
    u = (np.cos(angle) * (x - across) + np.sin(angle) * (y - down)) / long
    v = (np.cos(angle) * (y - down) - np.sin(angle) * (x - across)) / short
    return np.clip(0.5 - (np.hypot(u, v) - 1) * short, 0, 1).astype(np.float32)
