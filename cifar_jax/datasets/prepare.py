"""Makes a prepared tfds directory where there is none, by builders that need no TensorFlow.

Stock tfds reads the results as its own: names, versions, features, keys and split names are those
of tensorflow-datasets 4.9.10 (`image_classification/cifar.py`), so the records come in the same
shuffled order too. Stock builders cannot prepare without TensorFlow: they open files through
`tf.io` and encode images in a TensorFlow graph; here the images arrive as PNG bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from cifar_jax.datasets import BUILT_IN, locate, shapes10
from cifar_jax.datasets.archives import ARCHIVES, Arrays, read_archive
from cifar_jax.datasets.decoded import waiting
from cifar_jax.runtime.download import Unreachable
from cifar_jax.runtime.download import download as fetch
from cifar_jax.runtime.errors import UserError, lookup, notice
from cifar_jax.runtime.files import expanded, lock, make_folder


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    archive: str | os.PathLike | None = None,
    download: bool = True,
    url: str | None = None,
    progress: bool = True,
) -> Path:
    """Returns the directory of `name`, written in ArrayRecord format where it was absent.

    Args:
      name: `cifar10`, `cifar100` or `shapes10`.
      data_dir: the tfds data directory to write into; by default `$TFDS_DATA_DIR` if writable,
        then `~/tensorflow_datasets`.
      archive: see `archives.read_archive`.
      download: whether the archive may be downloaded (to `<data_dir>/downloads`).
      url: another address of the same archive.
      progress: whether to show progress.

    Raises:
      UserError: no data to be had, a damaged archive, no space, or a directory not writable.
    """
    lookup(dict.fromkeys(BUILT_IN), name, "data set")
    root = locate.prepare_dir(locate.search_dirs(data_dir))
    if archive is not None and name not in ARCHIVES:
        raise UserError(f"{name} is drawn, not read: leave --archive out")
    try:
        make_folder(root)
        with lock(root / f".{name}.lock", waiting=functools.partial(waiting, root)):
            existing = locate.find_prepared(name, [root])
            if existing is not None:
                return existing
            arrays = None
            if name in ARCHIVES:
                path = _archive(name, root, archive, download, url, progress)
                arrays = read_archive(path, ARCHIVES[name])
            return _write(name, root, arrays, progress)
    except (OSError, RuntimeError) as error:  # the ArrayRecord writer raises RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot prepare {name} in {root}: {reason}; free some space or use another --data-dir"
        ) from error


def _archive(name, root, archive, may_download, url, progress) -> Path:
    """Returns a local archive of the set."""
    if archive is not None:
        return Path(expanded(archive))
    spec = ARCHIVES[name]
    remedy = (
        f"give the archive with --archive ({spec.url.rsplit('/', 1)[1]}, its -python form or the "
        "extracted folder), a prepared set with --data-dir, or train on drawn images with "
        "--dataset shapes10"
    )
    if not may_download:
        raise UserError(f"{name} is not prepared and must not be downloaded: {remedy}")
    url = url or spec.url
    if progress:
        notice(f"downloading {spec.title} from {url}, {spec.size / 1e6:.0f} MB")
    try:
        return fetch(
            url,
            root / "downloads" / spec.url.rsplit("/", 1)[1],
            size=spec.size,
            sha256=spec.sha256,
            remedy="use --archive or another --data-dir",
            progress=progress,
        )
    except Unreachable as error:
        raise UserError(
            f"{name} is not prepared and cannot be downloaded ({error}): {remedy}"
        ) from error


def _write(name: str, root: Path, arrays: Arrays | None, progress: bool) -> Path:

    # Written by a run that was killed; the lock is ours, so nobody is at work on them.
    for stale in (root / name).glob("incomplete.*"):
        shutil.rmtree(stale, ignore_errors=True)
    if progress:
        notice(f"preparing {name} in {root / name}")
    # tfds draws its bars wherever stderr goes, a log file too.
    if progress and sys.stderr.isatty():
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    builder = BUILDERS[name](arrays=arrays, data_dir=str(root), file_format="array_record")
    # tfds prints on stdout that it downloads, which it does not, and makes download folders.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as unused:
        builder.download_and_prepare(download_dir=unused)
    return Path(builder.data_dir)


_CIFAR_CITATION = """\
@TECHREPORT{Krizhevsky09learningmultiple,
    author = {Alex Krizhevsky},
    title = {Learning multiple layers of features from tiny images},
    institution = {},
    year = {2009}
}
"""
_BLOCK = 50  # images that one task encodes
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class ArrayBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a set that is already in memory.

    Subclasses give the class attributes below; `arrays` is set before `download_and_prepare`.
    """

    VERSION = tfds.core.Version("3.0.2")
    LABELS: ClassVar[dict[str, int]] = {}
    DESCRIPTION = ""
    HOMEPAGE = ""
    CITATION = ""

    def __init__(self, *, arrays: Arrays | None = None, **kwargs):
        self.arrays = arrays
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            **{
                label: tfds.features.ClassLabel(num_classes=classes)
                for label, classes in self.LABELS.items()
            },
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
        )

    def make_arrays(self) -> Arrays:
        """Returns the set's content, for builders that can make it themselves."""
        raise ValueError(f"{self.name} is built from arrays: pass arrays=")

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        del dl_manager
        if self.arrays is None:
            self.arrays = self.make_arrays()
        for label, names in self.arrays.names.items():
            self.info.features[label].names = names
        return {split: self._generate_examples(split) for split in self.arrays.images}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        labels = self.arrays.labels[split]
        for index, image in enumerate(_png_files(self.arrays.images[split])):
            example = {label: int(values[index]) for label, values in labels.items()}
            yield index, {"id": f"{split}_{index:05d}", "image": image, **example}


def _png_files(images: np.ndarray) -> Iterator[io.BytesIO]:
    """Yields each of uint8 [N, H, W, 3] as a PNG file, the form in which tfds takes encoded images.

    Compression releases the interpreter lock: it runs on the other cores while tfds writes.
    """
    blocks = (images[start : start + _BLOCK] for start in range(0, len(images), _BLOCK))
    with ThreadPoolExecutor() as pool:
        for encoded in pool.map(_encode_png, blocks):
            yield from map(io.BytesIO, encoded)


def _encode_png(images: np.ndarray) -> list[bytes]:
    """uint8 [N, H, W, 3] -> N PNG files; three times as fast as one Pillow call an image.

    Every line is filtered against the line above it (PNG filter 2) for all images at once.
    """
    count, height, width, _ = images.shape
    lines = np.empty((count, height, 1 + 3 * width), np.uint8)
    lines[:, :, 0] = 2
    lines[:, :, 1:] = images.reshape(count, height, 3 * width)
    lines[:, 1:, 1:] -= images[:, :-1].reshape(count, height - 1, 3 * width)  # wraps, as meant
    start = b"\x89PNG\r\n\x1a\n"
    start += _png_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    end = _png_chunk(b"IEND", b"")
    return [start + _png_chunk(b"IDAT", zlib.compress(image, 3)) + end for image in lines]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class Cifar10(ArrayBuilder, skip_registration=True):
    """CIFAR-10."""

    LABELS: ClassVar[dict[str, int]] = {"label": 10}
    DESCRIPTION = (
        "CIFAR-10: 60,000 colour images of 32x32 pixels in 10 classes, 50,000 for training and "
        "10,000 for testing, 6,000 of each class."
    )
    HOMEPAGE = _CIFAR_PAGE
    CITATION = _CIFAR_CITATION


class Cifar100(ArrayBuilder, skip_registration=True):
    """CIFAR-100."""

    LABELS: ClassVar[dict[str, int]] = {"label": 100, "coarse_label": 20}
    DESCRIPTION = (
        "CIFAR-100: 60,000 colour images of 32x32 pixels in 100 classes of 600 images, 500 for "
        "training and 100 for testing; the classes form 20 superclasses (coarse_label)."
    )
    HOMEPAGE = _CIFAR_PAGE
    CITATION = _CIFAR_CITATION


class Shapes10(ArrayBuilder, skip_registration=True):
    """The built-in set: ten kinds of drawn shapes."""

    VERSION = tfds.core.Version(shapes10.VERSION)
    LABELS: ClassVar[dict[str, int]] = {"label": len(shapes10.CLASS_NAMES)}
    DESCRIPTION = (
        "Drawn 32x32 colour images of ten shapes over textured backgrounds, 50,000 for training "
        "and 10,000 for testing, made from a fixed seed for machines without a data set."
    )

    def make_arrays(self) -> Arrays:
        images, labels = {}, {}
        for split in shapes10.COUNTS:
            images[split], values = shapes10.draw_split(split)
            labels[split] = {"label": values}
        return Arrays(images, labels, {"label": list(shapes10.CLASS_NAMES)})


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100, "shapes10": Shapes10}
