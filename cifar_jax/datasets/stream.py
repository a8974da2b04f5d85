"""Random access to single records of a prepared set, for feeds that decode as they go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cifar_jax.datasets import Split, decode
from cifar_jax.runtime.errors import UserError


class RecordSource:
    """A `grain` source: `len(source)` and `source[i]` (see `stream.record_source`)."""

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
