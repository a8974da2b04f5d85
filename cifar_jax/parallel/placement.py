"""Where the training images lie: whole on every device, split over the devices, or on the host.

A data set that takes up to `SHARE` of a device's memory is copied to each of the devices that
share a batch. A larger one is split over them, an equal part each, and a batch is gathered from
wherever its images lie. One too large for that as well is streamed from the host.
"""

from __future__ import annotations

import enum
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cifar_jax import input_pipeline
from cifar_jax.parallel.hardware import AXIS, everywhere
from cifar_jax.runtime import keys

SHARE = 0.25


class Placement(enum.StrEnum):
    """Where examples lie."""

    RESIDENT = "resident"  # all of them on every device
    SPLIT = "split"  # an equal part on each device; anyone's images lie in it
    STREAM = "stream"  # on the host: a chunk's are sent, to each device those it uses itself


@struct.dataclass
class Examples:
    """Images and labels on the devices that share a batch, and how they lie there.

    Attributes:
      image: uint8 [N, H, W, C].
      label: int32 [N].
      index: int32 [N], positions in the data set, None where they lie in its order.
      placement: static, so that jit makes a program for each.
    """

    image: jax.Array
    label: jax.Array
    placement: Placement = struct.field(pytree_node=False, default=Placement.RESIDENT)
    index: jax.Array | None = None

    @property
    def spec(self) -> P:
        """How shard_map splits them over the devices that share a batch."""
        return P() if self.placement is Placement.RESIDENT else P(AXIS)

    def take(self, row: jax.Array) -> dict[str, jax.Array]:
        """Returns the batch of a row of batch indices, int32 [B], as `input_pipeline.take_batch`,
        and its `index`. Under shard_map that is a device's part of the batch, of its part of the
        row."""
        index = jnp.maximum(row, 0)
        index = index if self.index is None else self.index[index]
        if self.placement is Placement.SPLIT:
            return {**self._gather(row), "index": index}
        data = {"image": self.image, "label": self.label}
        return {**input_pipeline.take_batch(data, row), "index": index}

    def _gather(self, row: jax.Array) -> dict[str, jax.Array]:
        """Each device looks up what it has of the whole batch, zeros elsewhere; their sum is the
        batch, of which each gets its part. That moves B images a step between the devices."""
        size = self.label.shape[0]
        first = lax.axis_index(AXIS).astype(row.dtype) * size
        local = lax.all_gather(row, AXIS, tiled=True) - first
        mine = (local >= 0) & (local < size)
        safe = jnp.where(mine, local, 0)

        def part(x):
            found = x[safe]
            found = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), found, jnp.zeros((), x.dtype))
            return lax.psum_scatter(found, AXIS, scatter_dimension=0, tiled=True)

        mask = (row >= 0).astype(jnp.float32)
        return {"image": part(self.image), "label": part(self.label), "mask": mask}


def device_memory() -> int:
    """Returns the bytes of memory of one device; CPU devices share the machine's."""
    device = jax.local_devices()[0]
    found = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found or machine // jax.local_device_count()


def place_for(size: int, devices: int, memory: int) -> tuple[Placement, str | None]:
    """Returns where to put the images, and the line that says so unless they are resident.

    Args:
      size: bytes of the data set.
      devices: how many share a batch.
      memory: bytes of one device (`device_memory`).
    """
    limit = SHARE * memory
    if size <= limit:
        return Placement.RESIDENT, None
    larger = f"the training images ({_gb(size)}) take over {100 * SHARE:.0f} % of a device's memory"
    larger = f"Feed       {larger} ({_gb(memory)}):"
    if devices > 1 and size <= limit * devices:
        return Placement.SPLIT, f"{larger} split over the {devices} devices"
    return Placement.STREAM, f"{larger} streamed from the host (--feed stream)"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns arrays on every device of the mesh, on the default device where there is none.

    Of a mesh over several processes all must give the same; what is on it already stays.
    """
    if mesh is None or not mesh.is_multi_process:
        return jax.device_put(tree, everywhere(mesh))

    def put(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if keys.is_key(x):
            return keys.typed_as(x, put(keys.plain(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, everywhere(mesh), lambda index: x[index])

    return jax.tree.map(put, tree)


def put(
    images: np.ndarray,
    labels: np.ndarray,
    mesh: Mesh | None,
    placement: Placement = Placement.RESIDENT,
) -> Examples:
    """Returns examples as `placement` says: resident, or split, with zeros at the end so that they
    divide; every process then reads the parts of its own devices only."""
    if placement is Placement.RESIDENT:
        return Examples(**replicate(input_pipeline.on_host(images, labels), mesh))
    rows = -(-len(labels) // mesh.size) * mesh.size

    def put_parts(x, dtype):
        def part(index):
            first, last, _ = index[0].indices(rows)
            found = np.zeros((last - first, *x.shape[1:]), dtype)
            have = x[first:last]
            found[: len(have)] = have
            return found

        sharding = NamedSharding(mesh, P(AXIS))
        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)

    return Examples(put_parts(images, np.uint8), put_parts(labels, np.int32), Placement.SPLIT)


def put_chunk(
    data: dict[str, np.ndarray], rows: np.ndarray, mesh: Mesh | None
) -> tuple[Examples, jax.Array]:
    """Returns a streamed chunk, of which each device gets the images it will use itself, and its
    batch indices into them.

    Args:
      data: what this process's devices need: `image` [steps * B, H, W, C] and `label`, step after
        step, B images each.
      rows: int32 [steps, B]: their positions in `data` in that order, -1 for padding.
      mesh: the devices that share a batch, with B / n images of each step for each of this
        process's n.
    """
    if mesh is None:
        data, rows = jax.device_put((data, rows))
        return Examples(**data, placement=Placement.STREAM), rows
    steps, batch = rows.shape
    here = len(mesh.local_devices)

    def by_device(x):
        parts = x.reshape(steps, here, batch // here, *x.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(x.shape)

    local = np.arange(steps * batch // here, dtype=np.int32).reshape(steps, 1, -1)
    local = np.broadcast_to(local, (steps, here, batch // here)).reshape(rows.shape)
    make = jax.make_array_from_process_local_data
    data = {name: make(NamedSharding(mesh, P(AXIS)), by_device(x)) for name, x in data.items()}
    rows = np.where(rows >= 0, local, np.int32(-1))
    indices = make(NamedSharding(mesh, P(None, AXIS)), rows)
    return Examples(**data, placement=Placement.STREAM), indices
