"""Where the training images lie: whole on every device, split over the devices, or on the host.

A data set that takes up to `SHARE` of a device's memory is copied to each of the devices that
share a batch. A larger one is split over them, an equal part each, and a batch is gathered from
wherever its images lie. One too large for that as well is streamed from the host.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHARE = 0.25
PLACES = ("resident", "split", "stream")


def device_memory() -> int:
    """Returns the bytes of memory of one device; CPU devices share the machine's."""
    device = jax.local_devices()[0]
    found = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found or machine // jax.local_device_count()


def place_for(size: int, devices: int, memory: int) -> tuple[str, str | None]:
    """Returns (one of `PLACES`, the line that says so unless it is `resident`).

    Args:
      size: bytes of the data set.
      devices: how many share a batch.
      memory: bytes of one device (`device_memory`).
    """
    limit = SHARE * memory
    if size <= limit:
        return "resident", None
    larger = f"the training images ({_gb(size)}) take over {100 * SHARE:.0f} % of a device's memory"
    if devices > 1 and size <= limit * devices:
        return "split", f"Feed       {larger} ({_gb(memory)}): split over the {devices} devices"
    return "stream", f"Feed       {larger} ({_gb(memory)}): streamed from the host (--feed stream)"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def put_split(images: np.ndarray, labels: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns {"image", "label"} with an equal part of the rows on each device, zeros at the end;
    every process reads the parts of its own devices only."""
    sharding = NamedSharding(mesh, P(mesh.axis_names[0]))
    rows = -(-len(labels) // mesh.size) * mesh.size

    def put(x, dtype):
        def part(index):
            first, last, _ = index[0].indices(rows)
            found = np.zeros((last - first, *x.shape[1:]), dtype)
            have = x[first:last]
            found[: len(have)] = have
            return found

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)

    return {"image": put(images, np.uint8), "label": put(labels, np.int32)}


def put_own(
    data: dict[str, np.ndarray], rows: np.ndarray, mesh: Mesh
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns a streamed chunk, of which each device gets the images it will use itself.

    Args:
      data: what this process's devices need: `image` [steps * B, H, W, C] and `label`, step after
        step, B images each.
      rows: int32 [steps, B]: their positions in `data` in that order, -1 for padding.
      mesh: over several processes, with B / n images of each step for each of this one's n devices.
    """
    steps, batch = rows.shape
    here = len(mesh.local_devices)
    axis = mesh.axis_names[0]

    def by_device(x):
        parts = x.reshape(steps, here, batch // here, *x.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(x.shape)

    local = np.arange(steps * batch // here, dtype=np.int32).reshape(steps, 1, -1)
    local = np.broadcast_to(local, (steps, here, batch // here)).reshape(rows.shape)
    make = jax.make_array_from_process_local_data
    data = {name: make(NamedSharding(mesh, P(axis)), by_device(x)) for name, x in data.items()}
    return data, make(NamedSharding(mesh, P(None, axis)), np.where(rows >= 0, local, np.int32(-1)))


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """Returns arrays of this process on every device of a mesh over several processes, which must
    all give the same. Where there is no such mesh it returns the tree as it is: jit moves it."""
    if mesh is None or not mesh.is_multi_process:
        return tree
    sharding = NamedSharding(mesh, P())

    def put(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x  # there already
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data, impl = jax.random.key_data(x), jax.random.key_impl(x)
            return jax.random.wrap_key_data(put(data), impl=impl)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def put_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Returns arrays on every device of the mesh, on the default device where there is none."""
    if mesh is not None and mesh.is_multi_process:
        return spread(tree, mesh)
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, P()))


def held(data: dict[str, jax.Array], order: Any) -> str:
    """Returns how the devices hold the data: `whole`, each all of it; `split`, a part each, in
    which anyone's images lie (`put_split`); `own`, each what it will use itself (`put_own`)."""

    def is_spread(x):
        sharding = getattr(x, "sharding", None)
        return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated

    if not is_spread(data["label"]):
        return "whole"
    return "own" if is_spread(order) else "split"


def take_split(data: dict[str, jax.Array], row: jax.Array, axis: str) -> dict[str, jax.Array]:
    """`feed.take_batch` under shard_map where `data` is this device's part of the data set.

    Args:
      row: int32 [B / devices], this device's part of a row of the order: positions in the whole.

    Each device looks up what it has of the whole batch, zeros elsewhere; their sum is the batch,
    of which each gets its part. That moves B images a step between the devices.
    """
    size = data["label"].shape[0]
    local = lax.all_gather(row, axis, tiled=True) - lax.axis_index(axis).astype(row.dtype) * size
    mine = (local >= 0) & (local < size)
    safe = jnp.where(mine, local, 0)

    def share(x):
        found = x[safe]
        found = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), found, jnp.zeros((), x.dtype))
        return lax.psum_scatter(found, axis, scatter_dimension=0, tiled=True)

    mask = (row >= 0).astype(jnp.float32)
    return {"image": share(data["image"]), "label": share(data["label"]), "mask": mask}
