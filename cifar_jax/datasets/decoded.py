"""Decoded splits on disk: written once, checked and memory-mapped from then on.

An entry is a folder `<split>-<size>-<key>` with `images.npy` uint8 [N, S, S, 3], `labels.npy`
int32 [N], `order.npy` int64 [N] (the record each image came from) and `meta.json`, which holds
what the prepared set says of itself, so that a warm start does not import tensorflow-datasets
(60,000 images: 0.1 s against 7 s).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.datasets import decode
from cifar_jax.datasets.locate import PreparedSet, writable
from cifar_jax.runtime.errors import UserError, notice
from cifar_jax.runtime.files import absolute, lock, make_folder, user_cache
from cifar_jax.runtime.progress import Progress, is_terminal

FORMAT = 1  # part of the key: change it when decoding or the files' layout changes
_ARRAYS = ("images", "labels", "order")


class CorruptCache(Exception):
    """An entry exists and its files are not what was written."""


def cache_roots(directory: Path, cache_dir: str | os.PathLike | None) -> list[Path]:
    """Returns the folders that may hold entries of the set in `directory`, best first."""
    place = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:8]
    own = f"{directory.parent.name}-{directory.name}-{place}"
    if cache_dir is not None:
        return [absolute(cache_dir) / own]
    users = user_cache()
    return [directory / "cifar_jax_cache", *([users / "cifar_jax/datasets" / own] if users else [])]


def entry_name(split: str, size: int | None, key: str) -> str:
    """Returns the folder name of a split decoded at `size` from the set with digest `key`."""
    return f"{split}-{size or 'stored'}-{FORMAT}{key}"


def load(entry: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the memory-mapped arrays and the meta data of an entry, None where there is none.

    Raises:
      CorruptCache: a file is missing, has another size or fails its checksum.
    """
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        arrays = {}
        for name in _ARRAYS:
            path, expected = entry / f"{name}.npy", meta["files"][name]
            if path.stat().st_size != expected["bytes"]:
                raise CorruptCache(f"{path} has another size than was written")
            arrays[name] = np.load(path, mmap_mode="r")
            if zlib.crc32(arrays[name].data) != expected["crc32"]:
                raise CorruptCache(f"{path} fails its checksum")
        return arrays, meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"{entry}: {error!r}") from None


def find(roots: list[Path], name: str) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the first good entry `name` in `roots`; a corrupt one gets a notice."""
    for root in roots:
        try:
            found = load(root / name)
        except CorruptCache as error:
            notice(f"the cache of decoded images is corrupt and will be made again ({error})")
            continue
        if found:
            return root / name, *found
    return None


def build(
    roots: list[Path],
    name: str,
    prepared: PreparedSet,
    split: str,
    size: int | None,
    progress: bool = False,
) -> None:
    """Decodes a split into an entry `name` of the first of `roots` that can take it, with a bar on
    a terminal if there is to be `progress`.

    Two processes at once: the second waits and finds the entry made.

    Raises:
      UserError: no place can be written, or the set's images cannot be read.
    """
    fill = functools.partial(_fill, prepared=prepared, split=split, size=size, progress=progress)
    make(roots, name, f"{split}-{size or 'stored'}-", fill)


def make(roots: list[Path], name: str, outdated: str, fill: Callable[[Path], dict]) -> None:
    """Makes an entry `name` in the first of `roots` that can take it.

    Args:
      outdated: how the names of entries begin that this one replaces.
      fill: writes the arrays into a folder and returns the meta data.

    Raises:
      UserError: no place can be written, or what `fill` raises.
    """
    reasons = []
    for root in roots:
        if not writable(root):
            reasons.append(f"{root} is not writable")
            continue
        try:
            make_folder(root)
            with lock(root / ".lock", waiting=functools.partial(waiting, root)):
                try:
                    if load(root / name):
                        return
                except CorruptCache:
                    shutil.rmtree(root / name)
                _write(root, name, outdated, fill)
            return
        except OSError as error:
            reasons.append(f"{root}: {error.strerror or error}")
    raise UserError(
        f"no place for the decoded images ({'; '.join(reasons)}); "
        "free some space, or set XDG_CACHE_HOME to a folder that can be written"
    )


def _write(root: Path, name: str, outdated: str, fill: Callable[[Path], dict]) -> None:
    split = name.split("-")[0]
    for stale in root.glob(f".new-{split}-*"):  # left by a killed process; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".new-{split}-", dir=root))
    try:
        os.chmod(new, 0o755)  # mkdtemp's 0o700 would hide a shared cache from other users
        meta = fill(new)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        os.rename(new, root / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for other in root.glob(f"{outdated}*"):
        if other.name != name:
            shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _shown(order: Path, count: int, progress: bool) -> Iterator[None]:
    """Draws a bar over how many records have a place in `order`, which whoever decodes fills."""
    if not (progress and is_terminal(sys.stderr)):
        yield
        return
    over, places = threading.Event(), np.load(order, mmap_mode="r")

    def watch(bar: Progress) -> None:
        before = 0
        while not over.wait(0.2):
            done = int((places >= 0).sum())
            bar.update(done - before)
            before = done

    with Progress(count, doing="decoding") as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _fill(
    new: Path, prepared: PreparedSet, split: str, size: int | None, progress: bool
) -> dict[str, Any]:
    count, side = prepared.counts[split], size or 32
    shapes = {"images": ((count, side, side, 3), "uint8"), "labels": ((count,), "int32")}
    shapes["order"] = ((count,), "int64")
    job = {
        "directory": str(prepared.directory),
        "file_format": prepared.file_format,
        "split": split,
        "keys": prepared.keys,
        "size": size,
        "by_id": prepared.keys["id"] is not None,
    } | {array: str(new / f"{array}.npy") for array in _ARRAYS}
    for by_id in [True, False] if job["by_id"] else [False]:
        for array, (shape, dtype) in shapes.items():
            _reserve(new / f"{array}.npy", shape, dtype)
        try:
            with _shown(new / "order.npy", count, progress):
                decode.decode_all(job | {"by_id": by_id}, count)
        except decode.DecodeError as error:
            raise _user_error(prepared, split, str(error)) from error
        arrays = {array: np.load(new / f"{array}.npy", mmap_mode="r") for array in _ARRAYS}
        if np.array_equal(np.sort(arrays["order"]), np.arange(count)):
            break  # otherwise the ids are not places: decode again in stored order
    labels, classes = arrays["labels"], len(prepared.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"split {split!r} of {prepared.directory} has labels from {labels.min()} to "
            f"{labels.max()}, the set declares {classes} classes: use a labelled split"
        )
    return {
        "name": prepared.name,
        "version": prepared.version,
        "encoding": prepared.encoding,
        "class_names": prepared.class_names,
        "split": split,
        "keys": prepared.keys,
        "file_format": prepared.file_format,
        "directory": str(prepared.directory),
        "sha256": fingerprint(prepared.class_names, arrays["images"], labels),
        "files": {
            array: {
                "bytes": (new / f"{array}.npy").stat().st_size,
                "crc32": zlib.crc32(arrays[array].data),
            }
            for array in _ARRAYS
        },
    }


def fingerprint(class_names: tuple[str, ...], images: np.ndarray, labels: np.ndarray) -> str:
    """Returns the digest of a split: its class names, uint8 pixels and labels."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    digest.update(images.data)
    digest.update(np.asarray(labels, np.int32).data)
    return digest.hexdigest()


def _reserve(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Makes a .npy file filled with -1 (255) whose blocks exist: a full disk is an OSError here.

    Without that, writing into the mapping would end in SIGBUS.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    array.fill(np.array(-1).astype(dtype))
    array.flush()


def _user_error(prepared: PreparedSet, split: str, reason: str) -> UserError:
    where = f"split {split!r} of {prepared.directory}"
    if "out of bound" in reason:
        return UserError(
            f"{where} holds fewer images than the {prepared.counts[split]:,} it declares; "
            "delete that folder and prepare the set again"
        )
    if "--image-size" in reason:
        return UserError(f"{where}: {reason}")
    return UserError(
        f"cannot read {where}: {reason}; if a file is damaged, delete that folder and prepare "
        "the set again"
    )


def waiting(folder: Path) -> None:
    """Says that another process is waited for: two would only repeat each other's work."""
    notice(f"waiting for another process that works in {folder}")
