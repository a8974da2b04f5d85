"""How batches reach a step: orders, padding and masks, the resident and the streamed feed.

An order is an int32 matrix [steps, batch] of positions in a data set, -1 for padding. Both
feeds turn the same order into the same batches: the resident one gathers on the device from
the whole data set, the streamed one gathers on the host and sends a chunk of steps at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cifar_jax.datasets import Split, decode
from cifar_jax.runtime.errors import UserError

FEEDS = ("resident", "stream")


def run_keys(seed: int) -> dict[str, jax.Array]:
    """Returns the typed keys of a run: `state`, `order` and `split`, all from its seed."""
    base = jax.random.key(seed)
    return {name: jax.random.fold_in(base, i) for i, name in enumerate(("state", "order", "split"))}


def split_indices(key: jax.Array, size: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (training, validation) positions, int32: disjoint, together all of 0..size-1.

    Validation holds round(size * fraction) positions drawn at random without replacement.

    Raises:
      UserError: a split would be empty although a fraction was asked for.
    """
    held_out = round(size * fraction)
    if fraction and not 0 < held_out < size:
        raise UserError(
            f"--validation-fraction {fraction:g} of {size} images leaves an empty split"
        )
    order = np.asarray(jax.random.permutation(key, size)).astype(np.int32)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def check_batch_size(batch_size: int, size: int) -> None:
    """Raises `UserError` where a batch would hold more images than the training split."""
    if batch_size > size:
        raise UserError(f"--batch-size {batch_size} is larger than the training split ({size})")


def batches(positions: Sequence[int] | ArrayLike, batch_size: int) -> np.ndarray:
    """Returns positions cut into an order [ceil(n / batch_size), batch_size], -1 at the end."""
    positions = np.asarray(positions)
    steps = -(-len(positions) // batch_size)
    order = np.full(steps * batch_size, -1, np.int32)
    order[: len(positions)] = positions
    return order.reshape(steps, batch_size)


def epoch_order(
    key: jax.Array, epoch: int, positions: np.ndarray, batch_size: int, drop_last: bool = False
) -> np.ndarray:
    """Returns the shuffled order of one epoch: a permutation from `fold_in(key, epoch)`; with
    `drop_last` without a last batch that holds fewer."""
    shuffle = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), len(positions)))
    if drop_last:
        shuffle = shuffle[: len(positions) // batch_size * batch_size]
    return batches(positions[shuffle], batch_size)


def on_host(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the whole split: `image` uint8 [N, H, W, C], `label` int32 [N]."""
    return {"image": np.ascontiguousarray(images), "label": np.asarray(labels, np.int32)}


def to_device(images: np.ndarray, labels: np.ndarray, sharding=None) -> dict[str, jax.Array]:
    """Returns `on_host`'s arrays on the device."""
    return jax.device_put(on_host(images, labels), sharding)


def take_batch(
    data: Mapping[str, jax.Array | np.ndarray], row: jax.Array | np.ndarray
) -> dict[str, jax.Array]:
    """Gathers one batch; positions of -1 become masked copies of image 0."""
    safe = jnp.maximum(row, 0)
    mask = (row >= 0).astype(jnp.float32)
    return {"image": data["image"][safe], "label": data["label"][safe], "mask": mask}


def columns(order: np.ndarray, process: int, processes: int, devices: int) -> np.ndarray:
    """Returns the part of an order that is for one of several processes with equally many of the
    `devices`: rows are padded so that they divide, and cut in the order of the processes."""
    padded = np.pad(order, ((0, 0), (0, -order.shape[1] % devices)), constant_values=-1)
    return np.split(padded, processes, axis=1)[process]


def stream(
    source,
    order: np.ndarray,
    start: int,
    length: int,
    *,
    threads: int = 4,
    prefetch: int = 2,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, int]]:
    """Yields host chunks of an order, read by grain's worker threads ahead of their use.

    Args:
      source: random access: `source[i]` is {"image": uint8 [H, W, C], "label": int}.
      order: [steps, batch] from `epoch_order` or `batches`.
      start: first step.
      length: steps in a chunk (the last may hold fewer).
      threads: workers reading at the same time.
      prefetch: chunks read ahead.

    Yields:
      (data, rows, steps): the chunk's images and labels, its order [length, batch] into them,
      and how many of its rows are steps; shapes are the same for every chunk.
    """
    import grain

    rest = order[start:]
    padding = np.full((-len(rest) % length, order.shape[1]), -1, np.int32)
    padded = np.concatenate([rest, padding])
    per_chunk = length * order.shape[1]
    examples = (
        grain.MapDataset.source(np.maximum(padded.reshape(-1), 0))
        .map(lambda i: _example(source, int(i)))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * per_chunk)
        )
        .batch(per_chunk, drop_remainder=True)
    )
    local = np.arange(per_chunk, dtype=np.int32).reshape(length, -1)
    for first, data in zip(range(0, len(padded), length), examples, strict=True):
        rows = np.where(padded[first : first + length] >= 0, local, np.int32(-1))
        yield data, rows, min(length, len(rest) - first)


def _example(source, i: int) -> dict[str, np.ndarray]:
    example = source[i]
    image, label = np.asarray(example["image"]), np.int32(example["label"])
    return {"image": image, "label": label, "index": np.int32(i)}


# Random access to single records of a prepared set, for feeds that decode as they go.


class RecordSource:
    """A `grain` source: `len(source)` and `source[i]` (see `input_pipeline.record_source`)."""

    def __init__(self, entry: Path, positions: np.ndarray | None = None):
        meta = json.loads((entry / "meta.json").read_text())
        if meta["file_format"] != "array_record":
            raise UserError(
                f"{meta['directory']} is in {meta['file_format']} format and cannot be streamed; "
                "use the default feed, or prepare the set as ArrayRecord"
            )
        images = np.load(entry / "images.npy", mmap_mode="r")
        order = np.load(entry / "order.npy")
        self._order = np.array(order if positions is None else order[positions])
        self._size = images.shape[1]
        self._keys = meta["keys"]
        self._records = decode.open_records(meta["directory"], meta["split"], meta["keys"])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[int(self._order[index])]
        image = decode.decode_image(record[self._keys["image"]], self._size)
        return {"image": image, "label": np.int32(record[self._keys["label"]])}

    def __repr__(self) -> str:
        return f"RecordSource({len(self)} records)"


def record_source(split: Split):
    """Returns a random-access source over the set's ArrayRecord files, in `split`'s order.

    `source[i]` is `{"image": uint8 [S, S, 3], "label": int32}`, decoded anew from its record:
    equal to `split.images[i]` and `split.labels[i]`. It can be pickled, and read by threads.

    Raises:
      UserError: the set is not in ArrayRecord format.
    """

    return RecordSource(split.entry, split.positions)
