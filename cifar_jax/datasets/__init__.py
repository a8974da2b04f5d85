"""Where images come from: prepared tfds directories, archives, and the built-in set.

`load_dataset` ends in plain arrays. It reads sets that tensorflow-datasets or `prepare` wrote in
ArrayRecord format, without TensorFlow, decodes them once and memory-maps them from then on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.datasets import decoded, locate, own_images
from cifar_jax.runtime import errors
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.runtime.files import expanded

# Sets that `prepare` can make by itself.
BUILT_IN = ("cifar10", "cifar100", "shapes10")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, in the set's original order where its records carry it.

    Attributes:
      images: uint8 [N, S, S, 3] (NHWC, RGB), C-contiguous, memory-mapped read-only.
      labels: int32 [N], in [0, number of classes).
      fingerprint: sha256 of class names, pixels and labels; the same wherever the data lies.
      entry: the cache folder that holds the arrays.
      positions: int64 [N], which of the entry's images these are; None for all of them.
    """

    images: np.ndarray
    labels: np.ndarray
    fingerprint: str = ""
    entry: Path | None = None
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image set.

    Attributes:
      name: as tfds names it (`cifar10`, `name/config`).
      version: as tfds names it (`3.0.2`).
      source: one sentence that says which files were read.
      class_names: in label order.
      fingerprint: digest of the splits' fingerprints: changes when any pixel or label does.
      splits: by name.
      test_fraction: share of the prepared set's `train` that is `test` here; 0 where the set has a
        `test` of its own.
    """

    name: str
    version: str
    source: str
    class_names: tuple[str, ...]
    fingerprint: str
    splits: dict[str, Split]
    test_fraction: float = 0.0

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, **options) -> Dataset:
        """Returns the images of a folder (`own_images.py`); options as of `load_dataset`."""
        return load_dataset(f"folder:{os.fspath(path)}", **options)

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        test_images: np.ndarray | None = None,
        test_labels: np.ndarray | None = None,
        *,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
        image_size: int | None = None,
        test_fraction: float = 0.0,
    ) -> Dataset:
        """Returns arrays as a set, as `own_images.of_arrays` takes them.

        Args:
          test_images: by default a share of the others.
          test_labels: of those.
          test_fraction: which share; 0 is `own_images.TEST_FRACTION`.

        Raises:
          UserError: arrays of another kind or shape.
        """
        given = {"train": (images, labels)}
        if test_images is not None:
            given["test"] = (test_images, test_labels)
        found = own_images.of_arrays(given, class_names, name, name, image_size)
        return _of_own(found, ("train", "test"), test_fraction)


def load_dataset(
    name: str = "cifar10",
    *,
    data_dir: str | os.PathLike | None = None,
    archive: str | os.PathLike | None = None,
    image_size: int | None = None,
    splits: Sequence[str] = ("train", "test"),
    test_fraction: float = 0.0,
    cache_dir: str | os.PathLike | None = None,
    download: bool = True,
    url: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Returns the data set `name` as arrays, preparing and decoding it where needed.

    A set prepared in `data_dir` is used; without `data_dir`, in `$TFDS_DATA_DIR` or
    `~/tensorflow_datasets`, in this order. Otherwise cifar10 and cifar100 are prepared from
    `archive` or a download, shapes10 is drawn; into the first of those folders that can be written.
    With `archive` a prepared set is used only where it holds the same images.

    Args:
      name: `cifar10`, `cifar100`, `shapes10`, or any prepared tfds set whose features are one
        image and one class label: `name`, `name/config`, with or without `:1.2.3`; or images of
        one's own, `folder:PATH`, `npz:FILE` and `npy:FILE` (`own_images.py`).
      data_dir: a tfds data directory, or a prepared set itself: nothing else is searched then.
      archive: a CIFAR archive or the extracted folder, see `archives.read_archive`.
      image_size: side in pixels to which images are resized; None requires 32x32 images.
      splits: names of the splits to load.
      test_fraction: for sets without `test`: the share of `train` that is `test` instead, the same
        images at every call.
      cache_dir: where decoded arrays go; by default beside the prepared set, or in the user's
        cache directory where that is read-only.
      download: whether a missing set may be downloaded.
      url: another address of the same archive (its hash is checked).
      progress: whether to show progress bars and notices of long work.

    Raises:
      UserError: unknown name or split, no data to be had, files that cannot be read, a prepared
        set of other images than the archive's, or a `test_fraction` that is not wanted or empty.
    """
    if image_size is not None and not (
        isinstance(image_size, int) and not isinstance(image_size, bool) and 1 <= image_size <= 4096
    ):
        raise UserError(f"--image-size must be a whole number from 1 to 4096, got {image_size!r}")
    if own_images.is_own(name):
        if archive is not None:
            raise UserError(f"{name} is read from no archive: leave --archive out")
        return _of_own(
            own_images.read(name, image_size, cache_dir, progress), splits, test_fraction
        )
    directory = _directory(name, data_dir, archive, download, url, progress)
    if test_fraction:
        _check_test_fraction(directory, test_fraction)
    roots = decoded.cache_roots(directory, cache_dir)
    try:
        key = locate.set_key(directory)
    except OSError as error:
        raise UserError(f"cannot read the set in {directory}: {error.strerror}") from None
    prepared, loaded, meta = None, {}, None
    stored = ["train" if test_fraction and split == "test" else split for split in splits]
    for split in dict.fromkeys(stored):
        entry_name = decoded.entry_name(split, image_size, key)
        found = decoded.find(roots, entry_name)
        if found is None:
            prepared = prepared or locate.inspect(directory)
            if prepared.counts.get(split, 0) == 0:
                has = ", ".join(f"{key} ({count:,})" for key, count in prepared.counts.items())
                hint = "; training can hold some out: --test-fraction 0.2" * (split == "test")
                raise UserError(
                    f"{prepared.name} in {directory} has no split {split!r}; it has {has}{hint}"
                )
            if progress:
                errors.notice(f"decoding {prepared.counts[split]:,} images of {name} {split}, once")
            decoded.build(roots, entry_name, prepared, split, image_size, progress)
            found = decoded.find(roots, entry_name)
            if found is None:
                raise UserError(f"the decoded images of {directory} vanished while being read")
        entry, arrays, meta = found
        loaded[split] = Split(arrays["images"], arrays["labels"], meta["sha256"], entry)
    if meta is None:
        raise UserError("--splits must name at least one split")
    if test_fraction and "train" in loaded:
        loaded |= _held_out(loaded["train"], test_fraction)
    loaded = {split: loaded[split] for split in splits}
    digest = hashlib.sha256("".join(f"{k}:{v.fingerprint}" for k, v in loaded.items()).encode())
    return Dataset(
        name=meta["name"],
        version=meta["version"],
        source=_sentence(meta, directory, entry.parent, image_size, test_fraction),
        class_names=tuple(meta["class_names"]),
        fingerprint=digest.hexdigest(),
        splits=loaded,
        test_fraction=test_fraction,
    )


def _check_test_fraction(directory: Path, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"--test-fraction must be above 0 and below 1, got {fraction:g}")
    if "test" in locate.split_names(directory):
        raise UserError(f"the set in {directory} has a test split: leave --test-fraction away")


def _held_out(train: Split, fraction: float) -> dict[str, Split]:
    """Returns `train` without a share of its images, and these as `test`."""
    size = len(train)
    count = round(size * fraction)
    if not 0 < count < size:
        raise UserError(f"--test-fraction {fraction:g} of {size} images leaves an empty split")
    order = np.random.RandomState(0).permutation(size)  # the same in every release of NumPy
    found = {}
    for name, chosen in (("train", np.sort(order[count:])), ("test", np.sort(order[:count]))):
        digest = hashlib.sha256(f"{train.fingerprint}:{chosen.tolist()}".encode()).hexdigest()
        arrays = train.images[chosen], train.labels[chosen]
        found[name] = Split(*arrays, digest, train.entry, chosen)
    return found


def _of_own(found: own_images.Found, splits: Sequence[str], test_fraction: float) -> Dataset:
    """Returns a user's own images; where they have no test split that is `val`, or a share of
    `train`, the same images at every call."""
    held = {
        split: Split(part.images, part.labels, part.fingerprint, part.entry)
        for split, part in found.splits.items()
    }
    said, share = "", 0.0
    if "test" in held and test_fraction:
        raise UserError(f"{found.name} has a test split: leave --test-fraction away")
    if "test" not in held and "val" in held and not test_fraction:
        held["test"], said = held["val"], "; it has no test split: val is used"
    elif "test" not in held:
        share = test_fraction or own_images.TEST_FRACTION
        if not 0 < share < 1:
            raise UserError(f"--test-fraction must be above 0 and below 1, got {share:g}")
        held |= _held_out(held["train"], share)
        said = f"; it has no test split: {share:g} of its images, held out"
    missing = [split for split in splits if split not in held]
    if missing:
        raise UserError(f"{found.name} has no split {missing[0]!r}; it has {', '.join(held)}")
    held = {split: held[split] for split in splits}
    digest = hashlib.sha256("".join(f"{k}:{v.fingerprint}" for k, v in held.items()).encode())
    return Dataset(
        name=found.name,
        version="1" if own_images.is_own(found.name) else own_images.IN_MEMORY,
        source=f"{found.where}{said}",
        class_names=found.class_names,
        fingerprint=digest.hexdigest(),
        splits=held,
        test_fraction=share,
    )


def _sentence(
    meta: dict[str, Any], directory: Path, root: Path, image_size: int | None, test_fraction: float
) -> str:
    """Returns e.g. `cifar10 3.0.2 from /data/cifar10/3.0.2 (decoded images in ...)`."""
    parts = [f"decoded images in {root}"]
    if meta["name"] in BUILT_IN and meta["encoding"] == "jpeg":
        parts.append("its pixels were re-encoded as JPEG")
    if image_size:
        parts.append(f"resized to {image_size}x{image_size}")
    if test_fraction:
        parts.append(f"it has no test split: {test_fraction:g} of its training images, held out")
    return f"{meta['name']} {meta['version']} from {directory} ({'; '.join(parts)})"


def _directory(name, data_dir, archive, download, url, progress) -> Path:
    """Returns the prepared directory of `name`, preparing it when it is absent."""
    dirs = locate.search_dirs(data_dir)
    if data_dir is not None and dirs[0].is_file():
        raise UserError(f"--data-dir {data_dir} is a file; name a folder of prepared sets")
    found = locate.find_prepared(name, dirs) if locate.valid_name(name) else None
    if archive is not None and locate.valid_name(name):
        dirs, found = _of_archive(name, dirs, archive)
        data_dir = dirs[0]
    if found is not None:
        return found
    base = str(name).split(":")[0]
    if base not in BUILT_IN:
        known = {path.relative_to(root).parts[0] for root in dirs for path in _within(root)}
        raise UserError(
            f"no prepared data set {name!r} in {', '.join(map(str, dirs))}; "
            f"{nearest(base, {*BUILT_IN, *known})}; or prepare it there with tensorflow-datasets "
            "(file_format='array_record')"
        )
    if base != name:
        raise UserError(f"{name} is not prepared in {', '.join(map(str, dirs))}; use {base}")
    from cifar_jax.datasets.prepare import prepare

    return prepare(
        name, data_dir=data_dir, archive=archive, download=download, url=url, progress=progress
    )


def _of_archive(name: str, dirs: list[Path], archive: str | os.PathLike):
    """Returns the first of `dirs` that holds what `archive` does, or may, and the set in it.

    Raises:
      UserError: the archive cannot be read, or other images are prepared wherever one may write.
    """
    from cifar_jax.datasets.archives import ARCHIVES, read_archive

    base = str(name).split(":")[0]
    if base not in ARCHIVES:
        raise UserError(f"{base} is read from no archive: leave --archive out")
    arrays = read_archive(Path(expanded(archive)), ARCHIVES[base])
    found = {root: locate.find_prepared(name, [root]) for root in dirs}
    for root, directory in found.items():
        if directory is not None and _holds(name, root, arrays):
            return [root], directory
    free = [root for root, directory in found.items() if directory is None]
    if not free:
        where = ", ".join(map(str, found.values()))
        raise UserError(
            f"--archive {archive} holds other images than what is prepared in {where}; "
            "name an empty folder with --data-dir, or leave --archive out"
        )
    return [locate.prepare_dir(free)], None


def _holds(name: str, root: Path, arrays) -> bool:
    """Whether the set prepared in `root` has the images, labels and class names of `arrays`."""
    names = tuple(arrays.names["label"])
    held = load_dataset(name, data_dir=root, splits=list(arrays.images))
    return all(
        split.fingerprint
        == decoded.fingerprint(names, arrays.images[key], arrays.labels[key]["label"])
        for key, split in held.splits.items()
    )


def _within(root: Path) -> list[Path]:
    return list(locate.list_prepared([root]))
