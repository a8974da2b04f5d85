"""Reads the CIFAR archives, in the binary or the Python form, packed or already extracted.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html. Nothing is extracted to disk, and pickles
can only make the containers and arrays such a file needs.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.runtime.errors import UserError

_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class ArchiveSpec:
    """What an archive of a CIFAR set holds.

    Attributes:
      title: the set's name in messages.
      url, size, sha256: the binary archive on its author's server, in bytes; figures from
        tensorflow-datasets 4.9.10, `url_checksums/`.
      binary: split -> (files, images in each file); each record is one byte for each of
        `labels`, then the planes of red, green and blue.
      pickled: split -> (files, images in each file) of the Python form.
      labels: label -> number of classes, in the binary form's order.
      names: label -> file of the binary form with one class name a line.
      meta: the Python form's file of class names.
      pickled_labels: label -> (key in a pickled batch, key of its names in `meta`).
    """

    title: str
    url: str
    size: int
    sha256: str
    binary: dict[str, tuple[tuple[str, ...], int]]
    pickled: dict[str, tuple[tuple[str, ...], int]]
    labels: dict[str, int]
    names: dict[str, str]
    meta: str
    pickled_labels: dict[str, tuple[str, str]]


_HOST = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    "cifar10": ArchiveSpec(
        title="CIFAR-10",
        url=_HOST + "cifar-10-binary.tar.gz",
        size=170052171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        binary={
            "train": (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), 10000),
            "test": (("test_batch.bin",), 10000),
        },
        pickled={
            "train": (tuple(f"data_batch_{i}" for i in range(1, 6)), 10000),
            "test": (("test_batch",), 10000),
        },
        labels={"label": 10},
        names={"label": "batches.meta.txt"},
        meta="batches.meta",
        pickled_labels={"label": ("labels", "label_names")},
    ),
    "cifar100": ArchiveSpec(
        title="CIFAR-100",
        url=_HOST + "cifar-100-binary.tar.gz",
        size=168513733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        binary={"train": (("train.bin",), 50000), "test": (("test.bin",), 10000)},
        pickled={"train": (("train",), 50000), "test": (("test",), 10000)},
        labels={"coarse_label": 20, "label": 100},
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        meta="meta",
        pickled_labels={
            "coarse_label": ("coarse_labels", "coarse_label_names"),
            "label": ("fine_labels", "fine_label_names"),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A whole set in memory: what a builder writes.

    Attributes:
      images: split -> uint8 [N, 32, 32, 3].
      labels: split -> label -> int [N].
      names: label -> class names in label order.
    """

    images: dict[str, np.ndarray]
    labels: dict[str, dict[str, np.ndarray]]
    names: dict[str, list[str]]


def read_archive(path: Path, spec: ArchiveSpec) -> Arrays:
    """Returns the images and labels of an archive, in its own order.

    Args:
      path: a tar file (compressed or not) or a folder that holds the batch files, itself or in
        one of its folders.
      spec: the set it must be.

    Raises:
      UserError: no such file, not an archive, another set's, damaged or incomplete.
    """
    if not path.exists():
        raise UserError(f"--archive {path} does not exist")
    try:
        files = dict(_wanted(path, spec))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"cannot read --archive {path} ({reason}): it is damaged or no tar archive; "
            f"fetch it again from {spec.url}"
        ) from error
    except ValueError as error:
        raise UserError(f"cannot read --archive {path}: {error}") from error
    for layout, read, extra in (
        (spec.binary, _read_binary, list(spec.names.values())),
        (spec.pickled, _read_pickled, [spec.meta]),
    ):
        needed = [name for names, _ in layout.values() for name in names] + extra
        missing = [name for name in needed if name not in files]
        if not missing:
            return read(path, spec, files)
        if len(missing) < len(needed) - len(extra):
            raise UserError(f"--archive {path} is incomplete: it lacks {', '.join(missing)}")
    held = ", ".join(sorted(files)[:5]) or "none of its files"
    raise UserError(
        f"--archive {path} is not {spec.title} (it holds {held}); expected "
        f"{spec.url.rsplit('/', 1)[1]}, its -python form, or the folder extracted from either"
    )


def _wanted(path: Path, spec: ArchiveSpec) -> Iterator[tuple[str, bytes]]:
    """Yields (file name, content) of the files of either form that `path` holds."""
    layouts = [*spec.binary.values(), *spec.pickled.values()]
    wanted = {name for names, _ in layouts for name in names} | {spec.meta, *spec.names.values()}
    # A batch takes about 3.1 kB an image in either form; anything far larger is foreign.
    limit = 2 * _PIXELS * max(count for _, count in layouts) + 1_000_000
    if path.is_dir():
        inner = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        for folder in inner:
            found = [child for child in folder.iterdir() if child.name in wanted]
            if len(found) > 1:
                for child in found:
                    if child.is_file() and child.stat().st_size <= limit:
                        yield child.name, child.read_bytes()
                return
        return
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if member.isfile() and name in wanted:
                if member.size > limit:
                    raise ValueError(f"{member.name} is {member.size:,} bytes, far too large")
                yield name, archive.extractfile(member).read()
        while archive.fileobj.read(1 << 20):  # gzip checks its checksum at its very end
            pass


def _read_binary(path: Path, spec: ArchiveSpec, files: dict[str, bytes]) -> Arrays:
    images, labels = {}, {}
    width = len(spec.labels) + _PIXELS
    for split, (names, count) in spec.binary.items():
        for name in names:
            if len(files[name]) != count * width:
                raise UserError(
                    f"--archive {path} is damaged: {name} holds {len(files[name]):,} bytes, "
                    f"expected {count * width:,}"
                )
        rows = np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, width)
        images[split] = _channels_last(rows[:, len(spec.labels) :])
        labels[split] = {
            label: _checked(path, rows[:, column], label, classes)
            for column, (label, classes) in enumerate(spec.labels.items())
        }
    names = {
        label: [line.strip() for line in files[file].decode("utf-8", "replace").splitlines()]
        for label, file in spec.names.items()
    }
    return Arrays(images, labels, _checked_names(path, spec, names))


def _read_pickled(path: Path, spec: ArchiveSpec, files: dict[str, bytes]) -> Arrays:
    images, labels = {}, {}
    for split, (names, count) in spec.pickled.items():
        batches = [_unpickle(path, name, files[name]) for name in names]
        for name, batch in zip(names, batches, strict=True):
            data = batch.get("data")
            keys = [key for key, _ in spec.pickled_labels.values()]
            if (
                not isinstance(data, np.ndarray)
                or data.dtype != np.uint8
                or data.shape != (count, _PIXELS)
                or any(np.shape(batch.get(key, ())) != (count,) for key in keys)
            ):
                raise UserError(
                    f"--archive {path} is damaged or foreign: {name} does not hold {count:,} "
                    "images with their labels"
                )
        images[split] = _channels_last(np.concatenate([batch["data"] for batch in batches]))
        labels[split] = {
            label: _checked(
                path, np.concatenate([batch[key] for batch in batches]), label, spec.labels[label]
            )
            for label, (key, _) in spec.pickled_labels.items()
        }
    meta = _unpickle(path, spec.meta, files[spec.meta])
    names = {
        label: [_text(name) for name in meta.get(key, ())]
        for label, (_, key) in spec.pickled_labels.items()
    }
    return Arrays(images, labels, _checked_names(path, spec, names))


def _channels_last(rows: np.ndarray) -> np.ndarray:
    """uint8 [N, 3072], planes of red, green, blue -> uint8 [N, 32, 32, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _checked(path: Path, labels: np.ndarray, label: str, classes: int) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"--archive {path} is damaged: a {label} is not in 0..{classes - 1}")
    return labels.astype(np.int64)


def _checked_names(path: Path, spec: ArchiveSpec, names: dict[str, list[str]]):
    for label, classes in spec.labels.items():
        names[label] = [name for name in names[label] if name]
        if len(set(names[label])) != classes:
            raise UserError(
                f"--archive {path} is damaged: it names {len(names[label])} classes for {label}, "
                f"expected {classes}"
            )
    return names


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


class _Unpickler(pickle.Unpickler):
    """Makes containers, numbers, text and arrays; refuses every other global."""

    # numpy has moved this function between modules; old files name the old place.
    _reconstruct = np.zeros(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy._core.multiarray", "scalar"): _number,
            ("numpy._core.numeric", "_frombuffer"): _array,
            ("_codecs", "encode"): _latin1,
        }
        try:
            return allowed[module.replace("numpy.core.", "numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}") from None


def _number(dtype: np.dtype, data: bytes) -> int:
    """Stands in for the function that makes NumPy's scalars."""
    if dtype.kind not in "iu":
        raise pickle.UnpicklingError(f"unexpected number of type {dtype}")
    return int(np.frombuffer(data, dtype)[0])


def _array(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Stands in for the function that makes arrays of pickle protocol 5."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes in old pickle protocols."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r}")
    return text.encode("latin1")


def _unpickle(path: Path, name: str, data: bytes) -> dict[str, Any]:
    """Returns a pickled batch with text keys, whichever Python wrote it."""
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {_text(key): value for key, value in content.items()}
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"--archive {path}: refused to load {name} ({error})") from error
