"""Turns the encoded records of a prepared set into arrays, one range of records at a time.

This file imports nothing of `cifar_jax`, so that it also runs as a script: `decode_all` starts
one such process a core. Threads do not help here: decoding a 32x32 image spends most of its
time holding the interpreter lock (60,000 JPEG images: 9 s in one process, 5 s in two).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# Below this many images a second process costs more than it saves.
IMAGES_PER_PROCESS = 2000
_CHUNK = 512
_FAILED = 3
_PNG = b"\x89PNG\r\n\x1a\n"


class DecodeError(Exception):
    """A record, shard or image cannot be read; the message is one line for the user."""


def open_image(data: bytes):
    """Returns the loaded Pillow image; that of a PNG whose metadata are broken is read without.

    Raises:
      Exception: nearly any, where the pixels cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:
        bare = _without_metadata(data)
        if bare == data:
            if isinstance(error, UnidentifiedImageError):
                raise ValueError("it has no format that Pillow reads") from None
            raise
        image = Image.open(io.BytesIO(bare))
        image.load()
    return image


def _without_metadata(data: bytes) -> bytes:
    """Returns a PNG's pixels and orientation, without anything else; other data as they are."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        crc = zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
        if (
            kind[:1].isupper()
            or kind == b"tRNS"
            or (kind == b"eXIf" and data[end - 4 : end] == crc)
        ):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def decode_image(data: bytes, size: int | None) -> np.ndarray:
    """Returns uint8 [S, S, 3] from an encoded image of any mode Pillow reads with 8 bits.

    Greyscale is repeated over the channels and alpha dropped. With `size` the image is resized
    to S = size, bilinear with antialiasing and without keeping the aspect ratio. Without, it
    must be 32x32 already.

    Raises:
      DecodeError: truncated or foreign data, more than 8 bits a channel, or another size.
    """
    from PIL import Image

    try:
        with open_image(data) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"has pixels of mode {image.mode}, only 8-bit images can be used")
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DecodeError(f"is truncated or no image ({error})") from None
    side = size or 32
    if rgb.size != (side, side):
        if size is None:
            raise DecodeError(f"is {rgb.width}x{rgb.height} pixels, not 32x32: add --image-size 32")
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb, dtype=np.uint8)


def open_records(directory: str, split: str, keys: dict[str, str | None]) -> Any:
    """Returns the random-access tfds source of `split` with images left encoded.

    Args:
      directory: a prepared set in ArrayRecord format (`.../name/version`).
      keys: the features that hold the `image`, the `label` and, or None, the `id`.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders=_encoded(keys))


def _encoded(keys):
    import tensorflow_datasets as tfds

    return {keys["image"]: tfds.decode.SkipDecoding()}


def _records(job: dict) -> Iterator[dict]:
    """Yields the examples `start` to `stop` of a split, in stored order."""
    import tensorflow_datasets as tfds

    if job["file_format"] == "array_record":
        source = open_records(job["directory"], job["split"], job["keys"])
        for first in range(job["start"], job["stop"], _CHUNK):
            yield from source.__getitems__(list(range(first, min(first + _CHUNK, job["stop"]))))
        return
    builder = tfds.builder_from_directory(job["directory"])
    part = f"{job['split']}[{job['start']}:{job['stop']}]"
    read = tfds.ReadConfig(interleave_cycle_length=1)  # stored order
    yield from builder.as_dataset(
        split=part, shuffle_files=False, read_config=read, decoders=_encoded(job["keys"])
    ).as_numpy_iterator()


def decode_range(job: dict) -> None:
    """Decodes the records `start` to `stop` of a split into their places in three .npy files.

    An image goes to the place its `id` gives (`train_00017` is image 17) when `by_id` is set,
    so that the original order of the set returns; otherwise it keeps its stored place.

    Args:
      job: `directory`, `file_format`, `split`, `start`, `stop`, `keys` (see `open_records`),
        `size`, `by_id`, and the files `images` uint8 [N, S, S, 3], `labels` int32 [N] and
        `order` int64 [N], which receives the record's index.

    Raises:
      DecodeError: with one line that says what cannot be read.
    """
    images = np.load(job["images"], mmap_mode="r+")
    labels = np.load(job["labels"], mmap_mode="r+")
    order = np.load(job["order"], mmap_mode="r+")
    keys, index = job["keys"], job["start"]
    try:
        for record in _records(job):
            place = index
            if job["by_id"]:
                place = place_of(record[keys["id"]], job["split"], len(order))
            try:
                images[place] = decode_image(record[keys["image"]], job["size"])
            except DecodeError as error:
                raise DecodeError(f"image {index} {error}") from None
            labels[place] = record[keys["label"]]
            order[place] = index
            index += 1
    except DecodeError:
        raise
    except Exception as error:  # the readers raise whatever their C++ side says
        raise DecodeError(" ".join(str(error).split())[:300] or type(error).__name__) from error
    if index != job["stop"]:
        raise DecodeError(f"index {index} out of bound {index}")


def place_of(identity: bytes, split: str, count: int) -> int:
    """Returns 17 for `train_00017`; -1 when `identity` is not such a name below `count`."""
    match = re.fullmatch(rf"{re.escape(split)}_(\d+)", bytes(identity).decode("utf-8", "replace"))
    place = int(match[1]) if match else -1
    return place if place < count else -1


def decode_all(job: dict, count: int, processes: int | None = None) -> None:
    """Runs `decode_range` over all `count` records, on all cores when there are many.

    Raises:
      DecodeError: as `decode_range`, or when a process died.
    """
    wanted = -(-count // IMAGES_PER_PROCESS)
    affinity = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = processes or max(1, min(cores, wanted))
    if processes == 1:
        decode_range(job | {"start": 0, "stop": count})
        return
    bounds = np.linspace(0, count, processes + 1).astype(int).tolist()
    workers = []
    try:
        for start, stop in itertools.pairwise(bounds):
            # -P: this file's folder must not shadow the top-level modules the worker imports.
            command = [sys.executable, "-P", os.path.abspath(__file__)]
            workers.append(
                subprocess.Popen(
                    [*command, json.dumps(job | {"start": start, "stop": stop})],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for worker in workers:
            out, err = worker.communicate()
            if worker.returncode == _FAILED:
                raise DecodeError(out.strip())
            if worker.returncode:
                last = (err.strip().splitlines() or ["no message"])[-1]
                raise DecodeError(f"the decoding process ended with {worker.returncode} ({last})")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()


if __name__ == "__main__":
    try:
        decode_range(json.loads(sys.argv[1]))
    except DecodeError as failure:
        sys.stdout.reconfigure(errors="backslashreplace")  # it may name any path
        print(failure)
        sys.exit(_FAILED)
