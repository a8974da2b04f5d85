"""The images that the page of a run shows: which, and all of them as one picture.

One picture (a sheet) of tiles is far smaller than as many files; the page cuts each out of it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from cifar_jax.reporting.predictions import Predictions

MISTAKES, RIGHT = 240, 120
COLUMNS = 20
_LARGEST = 64  # pixels of a tile's side; larger images are made smaller
TOP = 3


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image of the gallery.

    Attributes:
      index: its place in the test split.
      true, predicted: class numbers.
      sure, own: the probabilities of these two, the predicted and the true class.
      top: the three likeliest classes as (name, probability).
      x, y: its column and row in the sheet, in percent of how far that can be moved (CSS
        `background-position`).
      note: a line more, or nothing.
    """

    index: int
    true: int
    predicted: int
    sure: float
    own: float
    top: list[tuple[str, float]]
    x: float
    y: float
    note: str = ""

    @property
    def right(self) -> bool:
        return self.true == self.predicted


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Tiles and their sheet, a WebP as a `data:` address, of `columns` x `rows` tiles."""

    tiles: list[Tile]
    sheet: str
    columns: int
    rows: int


def choose(said: Predictions, seed: int, mistakes: int = MISTAKES, right: int = RIGHT) -> list[int]:
    """Returns which images to show, as places in `said`, the surest first, mistakes before right
    answers.

    Of mistakes half are the surest and half drawn at random; of right answers half are the least
    sure and half drawn; each from all classes alike.
    """
    rng = np.random.default_rng(seed)
    wrong = said.predicted != said.labels
    chosen = []
    for which, most, order in (
        (wrong, mistakes, -said.confidence),
        (~wrong, right, said.confidence),
    ):
        places = np.flatnonzero(which)
        extreme = _from_all_classes(places, order[places], said.labels[places], most // 2)
        rest = np.setdiff1d(places, extreme)
        drawn = _from_all_classes(rest, rng.random(len(rest)), said.labels[rest], most - most // 2)
        both = np.concatenate([extreme, drawn]).astype(int)
        chosen += both[np.argsort(-said.confidence[both], kind="stable")].tolist()
    return chosen


def _from_all_classes(
    places: np.ndarray, order: np.ndarray, labels: np.ndarray, most: int
) -> np.ndarray:
    """Returns at most `most` of `places`, the lowest `order` first, a class after the other."""
    turn = np.empty(len(places), int)  # which of its class, in the order
    ranked = np.lexsort((order, labels))
    starts = np.searchsorted(labels[ranked], labels[ranked])
    turn[ranked] = np.arange(len(places)) - starts
    return places[np.lexsort((order, turn))][:most]


def make(
    said: Predictions,
    images: np.ndarray,
    class_names: Sequence[str],
    chosen: Sequence[int],
    notes: Sequence[str] = (),
) -> Gallery:
    """Returns the gallery of the images `chosen`, places in `said`.

    Args:
      images: uint8 [M, H, W, 3], the whole test split: `said.indices` are places in it.
      notes: a line more for each, or nothing.
    """
    columns = min(COLUMNS, max(len(chosen), 1))
    rows = max(-(-len(chosen) // columns), 1)
    tiles = []
    for k, place in enumerate(chosen):
        shares, true = said.probabilities[place], int(said.labels[place])
        top = np.argsort(-shares, kind="stable")[:TOP]
        row, column = divmod(k, columns)
        tiles.append(
            Tile(
                index=int(said.indices[place]),
                true=true,
                predicted=int(top[0]),
                sure=float(shares[top[0]]),
                own=float(shares[true]),
                top=[(class_names[i], float(shares[i])) for i in top],
                x=100 * column / max(columns - 1, 1),
                y=100 * row / max(rows - 1, 1),
                note=notes[k] if notes else "",
            )
        )
    sheet = _sheet(images[said.indices[np.asarray(chosen, int)]], columns, rows)
    return Gallery(tiles, sheet, columns, rows)


def _sheet(images: np.ndarray, columns: int, rows: int) -> str:
    from PIL import Image

    height, width = images.shape[1:3]
    shrink = min(1.0, _LARGEST / max(height, width, 1))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    sheet = Image.new("RGB", (columns * size[0], rows * size[1]))
    for k, image in enumerate(images):
        tile = Image.fromarray(np.ascontiguousarray(image))
        tile = tile if shrink == 1 else tile.resize(size, Image.Resampling.LANCZOS)
        row, column = divmod(k, columns)
        sheet.paste(tile, (column * size[0], row * size[1]))
    file = io.BytesIO()
    sheet.save(file, "webp", quality=88 if max(size) <= 32 else 70, method=3)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
