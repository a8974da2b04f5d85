"""Images of a user's own: `--dataset folder:PATH`, `npz:FILE` and `npy:FILE`.

A folder holds `train/CLASS/*` and perhaps `test/` and `val/` of the same classes, or `CLASS/*`
alone; then a share of the images is the test split. Files are decoded once into the cache of
`decoded.py`. A file of arrays holds `x_train, y_train, x_test, y_test` (Keras's layout) or `images,
labels`, and perhaps `class_names`. A `.npy` file of images is a test split, as CIFAR-10.1 comes;
its labels lie beside it under its name with "labels" in place of "data" or "images".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_jax.datasets import decoded
from cifar_jax.datasets.image_files import read_image
from cifar_jax.runtime.errors import UserError, notice
from cifar_jax.runtime.files import absolute, expanded

KINDS = ("folder", "npz", "npy")
IN_MEMORY = "in memory"  # in place of the version of a set that no `--dataset` names
TEST_FRACTION = 0.2  # of a set without a test split
SIDE = 32  # of a folder's images where nothing is said
MAX_NAMED = 5  # unreadable files that get a line each
MAX_CLASSES = 10_000
_TRAIN, _TEST, _VALIDATION = "train", "test", "val"


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Some images.

    Attributes:
      images: uint8 [N, S, S, 3].
      labels: int32 [N].
      fingerprint: as `Split.fingerprint`.
      entry: the cache folder they lie in, None for none.
    """

    images: np.ndarray
    labels: np.ndarray
    fingerprint: str
    entry: Path | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """A set as it is stored.

    Attributes:
      name: `folder:/data/photos`.
      where: for the sentence that says what was read.
      class_names: in label order.
      splits: by name.
    """

    name: str
    where: str
    class_names: tuple[str, ...]
    splits: dict[str, Arrays]


def is_own(name: str) -> bool:
    """Whether a data set's name is one of a user's own images."""
    return str(name).partition(":")[0] in KINDS


def read(
    name: str,
    image_size: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Found:
    """Reads `folder:PATH`, `npz:FILE` or `npy:FILE`. Raises `UserError` where there are no usable
    images."""
    kind, _, path = name.partition(":")
    if not path:
        raise UserError(f"--dataset {name}: say which, as {kind}:photos")
    path = absolute(expanded(path))
    if not path.exists():
        raise UserError(f"--dataset {name}: there is no {path}")
    if kind == "npz":
        return _of_file(path, image_size)
    if kind == "npy":
        return _of_npy(path, image_size)
    if not path.is_dir():
        raise UserError(f"--dataset {name}: {path} is a file; name the folder it lies in")
    return _of_folder(path, image_size or SIDE, cache_dir, progress)


# Folders


def _of_folder(path: Path, side: int, cache_dir, progress: bool) -> Found:
    parts = {part: path / part for part in (_TRAIN, _TEST, _VALIDATION) if (path / part).is_dir()}
    if _TRAIN not in parts:
        if parts:
            raise UserError(f"{path} has {', '.join(parts)} but no train folder")
        parts = {_TRAIN: path}
    names = tuple(_folders(parts[_TRAIN]))
    check_classes(names, str(parts[_TRAIN]), "one folder a class, with its images inside")
    splits = {}
    for part, folder in parts.items():
        strange = [name for name in _folders(folder) if name not in names]
        if strange:
            raise UserError(f"{folder} has a class {strange[0]} that {parts[_TRAIN]} has not")
        splits[part] = _decoded(path, folder, part, names, side, cache_dir, progress)
    return Found(f"folder:{path}", f"{path}, at {side}x{side} pixels", names, splits)


def _visible(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}") from None


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _decoded(
    path: Path, folder: Path, split: str, names: Sequence[str], side: int, cache_dir, progress
) -> Arrays:
    """Returns a split's images, decoding them where the cache has not these files."""
    files: list[tuple[Path, int]] = []
    digest = hashlib.sha256("\0".join(names).encode())
    for label, name in enumerate(names):
        inside = (
            [e for e in _visible(folder / name) if e.is_file()] if (folder / name).is_dir() else []
        )
        if not inside and split == _TRAIN:
            raise UserError(f"the class {folder / name} has no images: fill or remove it")
        for entry in inside:
            at = entry.stat()
            digest.update(f"{label}/{entry.name}\0{at.st_size}\0{at.st_mtime_ns}\0".encode())
            files.append((Path(entry.path), label))
    if not files:
        raise UserError(f"{folder} has no images")
    roots = decoded.cache_roots(path, cache_dir)
    roots = roots if cache_dir is not None else roots[1:]  # nothing is written among the images
    entry_name = decoded.entry_name(split, side, digest.hexdigest()[:16])
    found = decoded.find(roots, entry_name)
    if found is None:
        if progress:
            notice(f"decoding {len(files):,} images of {folder}, once")
        fill = functools.partial(_fill, files, folder, tuple(names), split, side)
        decoded.make(roots, entry_name, f"{split}-{side}-", fill)
        found = decoded.find(roots, entry_name)
        if found is None:
            raise UserError(f"the decoded images of {folder} vanished while being read")
    entry, arrays, meta = found
    return Arrays(arrays["images"], arrays["labels"], meta["sha256"], entry)


def _fill(files, folder: Path, names: tuple[str, ...], split: str, side: int, new: Path) -> dict:
    """Decodes files into an entry; those that cannot be read are named and left out."""
    images, labels, order, bad, grey = [], [], [], [], 0
    for i, (file, label) in enumerate(files):
        try:
            image = read_image(file, side, side)
        except UserError as error:
            bad.append(str(error))
            continue
        grey += bool((image[..., :1] == image).all())
        images.append(image)
        labels.append(label)
        order.append(i)
    for line in bad[:MAX_NAMED]:
        notice(f"skipped: {line}")
    if len(bad) > MAX_NAMED:
        notice(f"skipped: {len(bad):,} files of {folder} in all")
    for label, name in enumerate(names):
        if split == _TRAIN and label not in labels:
            raise UserError(f"no image of the class {folder / name} can be read")
    if not images:
        raise UserError(f"no image of {folder} can be read")
    if grey:
        notice(f"{grey:,} of {len(images):,} images of {folder} are grey: three equal channels")
    arrays = {
        "images": np.stack(images),
        "labels": np.array(labels, np.int32),
        "order": np.array(order, np.int64),
    }
    for name, array in arrays.items():
        np.save(new / f"{name}.npy", array)
    return {
        "class_names": names,
        "split": split,
        "directory": str(folder),
        "sha256": decoded.fingerprint(names, arrays["images"], arrays["labels"]),
        "files": {
            name: {
                "bytes": (new / f"{name}.npy").stat().st_size,
                "crc32": zlib.crc32(array.data),
            }
            for name, array in arrays.items()
        },
    }


# Arrays


def _of_file(path: Path, image_size: int | None) -> Found:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise UserError(f"cannot read {path} as a .npz file of arrays: {error}") from None
    pairs = {_TRAIN: ("x_train", "y_train"), _TEST: ("x_test", "y_test")}
    if "x_train" not in held:
        pairs = {_TRAIN: ("images", "labels")}
    missing = [name for name in pairs[_TRAIN] if name not in held]
    if missing:
        raise UserError(
            f"{path} holds {', '.join(held) or 'nothing'}; it needs x_train, y_train (and x_test, "
            "y_test) or images, labels"
        )
    given = {}
    for split, (images, labels) in pairs.items():
        if images in held and labels in held:
            given[split] = held[images], held[labels]
        elif images in held or labels in held:
            raise UserError(f"{path} has only one of {images} and {labels}")
    names = held.get("class_names")
    names = None if names is None else [str(name) for name in names]
    return of_arrays(given, names, f"npz:{path}", str(path), image_size)


def _of_npy(path: Path, image_size: int | None) -> Found:
    beside = [path.name.replace(word, "labels") for word in ("data", "images")]
    labels = next((path.with_name(name) for name in beside if name != path.name), None)
    if labels is None or not labels.exists():
        raise UserError(
            f"{path} needs its labels beside it: data.npy or images.npy, and labels.npy"
        )
    arrays = []
    for file in (path, labels):
        try:
            arrays.append(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {file} as a .npy file: {error}") from None
    return of_arrays({_TEST: tuple(arrays)}, None, f"npy:{path}", str(path), image_size)


def of_arrays(
    given: dict[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None,
    name: str,
    where: str,
    image_size: int | None = None,
) -> Found:
    """Returns {split: (images, labels)} as a set.

    Args:
      given: images uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]; labels whole numbers [N] or
        [N, 1], from 0.
      class_names: in label order; by default the numbers.
      image_size: side to which images are resized; None for square images as they are.

    Raises:
      UserError: arrays of another kind or shape, or labels beyond the class names.
    """
    checked = {}
    for split, (images, labels) in given.items():
        about = f"{where}, {split}"
        checked[split] = _images(np.asarray(images), about, image_size), _labels(labels, about)
        if len(checked[split][0]) != len(checked[split][1]):
            raise UserError(f"{about}: {len(images)} images and {len(labels)} labels")
    if len({images.shape[1:] for images, _ in checked.values()}) > 1:
        raise UserError(f"{where}: its splits have images of different sizes: give --image-size")
    highest = max(int(labels.max()) for _, labels in checked.values())
    names = tuple(map(str, range(highest + 1) if class_names is None else class_names))
    check_classes(names, where, "two labels at least")
    if highest >= len(names):
        raise UserError(f"{where} has a label {highest} and {len(names)} class names")
    trained = checked[_TRAIN][1].tolist() if _TRAIN in checked else range(len(names))
    empty = set(range(len(names))) - set(trained)
    if empty:
        raise UserError(f"{where}: no training image has the label {min(empty)}")
    splits = {
        split: Arrays(images, labels, decoded.fingerprint(names, images, labels))
        for split, (images, labels) in checked.items()
    }
    return Found(name, where, names, splits)


def _images(images: np.ndarray, about: str, image_size: int | None) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UserError(f"{about}: images are {images.dtype}; they must be uint8, from 0 to 255")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise UserError(
            f"{about}: images have the shape {list(images.shape)}; "
            "it must be [N, H, W, 3], or [N, H, W] of grey ones"
        )
    if images.shape[-1] == 1:
        notice(f"{about}: grey images, three equal channels")
        images = np.repeat(images, 3, axis=-1)
    if image_size and images.shape[1:3] != (image_size, image_size):
        from PIL import Image, ImageOps

        side = (image_size, image_size)
        resized = (
            ImageOps.fit(Image.fromarray(image), side, Image.Resampling.BICUBIC) for image in images
        )
        return np.stack([np.asarray(image) for image in resized])
    if images.shape[1] != images.shape[2]:
        raise UserError(
            f"{about}: images of {images.shape[1]}x{images.shape[2]}: give --image-size"
        )
    return np.ascontiguousarray(images)


def _labels(labels, about: str) -> np.ndarray:
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise UserError(
            f"{about}: labels are {labels.dtype} {list(labels.shape)}; they must be whole numbers "
            "[N], from 0"
        )
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(f"{about}: labels from {labels.min()} to {labels.max()}; they start at 0")
    return labels.astype(np.int32)


def check_classes(names: Sequence[str], where: str, needed: str) -> None:
    """Raises `UserError` where there are no two classes to tell apart."""
    if len(names) < 2:
        has = f"a single class, {names[0]}" if names else "no classes"
        raise UserError(f"{where} has {has}; a data set needs {needed}")
