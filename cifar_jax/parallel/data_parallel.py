"""The steps over several devices, for a loop of your own: one way with pmap, one with shard_map.

Each function returns a step that is called as the plain one in `cifar_jax.steps` is, with the whole
batch, and gives what that gives on one device up to the order of sums: gradients, metrics, dropout,
augmentation and batch normalisation are those of the whole batch. (A module that draws random
numbers in its own way gets independent ones on each device: `steps.train_step`.)

    step = pmap_train_step(model=model, optimizer=optimizer)
    evaluate = pmap_eval_step(model=model)
    state, sums = step(state, batch)
    sums = evaluate(inference_variables(state), batch)

A batch that does not divide among the devices is padded, and the padding masked. The state goes in
from anywhere and comes out on every device. `jax.pmap` is kept for code that is written in it; the
commands of this package use shard_map over whole chunks of an epoch
(`cifar_jax.parallel.programs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from cifar_jax import steps
from cifar_jax.parallel.hardware import AXIS, everywhere, mesh_over
from cifar_jax.parallel.programs import over_devices


def pad_batch(batch: steps.Batch, parts: int) -> steps.Batch:
    """Returns a batch that divides into `parts` equal ones: with a mask, and padded where needed.

    Args:
      batch: `image` [B, H, W, C], `label` [B] and perhaps `mask` [B], of NumPy or JAX.
    """
    size = batch["label"].shape[0]
    mask = batch.get("mask")
    batch = {**batch, "mask": np.ones(size, np.float32) if mask is None else mask}
    missing = -size % parts
    if not missing:
        return batch

    def padded(x):
        pad = jnp.pad if isinstance(x, jax.Array) else np.pad
        return pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    return jax.tree.map(padded, batch)


def _pmapped(step: Callable, devices: Sequence[jax.Device] | None) -> Callable:
    devices = list(jax.local_devices() if devices is None else devices)
    # Held whole by every device on the way in and out: no leading axis for the caller to mind.
    step = jax.pmap(
        functools.partial(step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
    )

    def call(first: Any, batch: steps.Batch):
        batch = pad_batch(batch, len(devices))
        split = jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)
        return step(first, split)

    return call


def pmap_train_step(*, devices: Sequence[jax.Device] | None = None, **options) -> Callable:
    """Returns `step(state, batch) -> (state, sums)`: `steps.train_step` under `jax.pmap`.

    Args:
      devices: those that share a batch, all local ones by default.
      **options: of `steps.train_step`: model, optimizer, preprocess, ...
    """
    return _pmapped(functools.partial(steps.train_step, **options), devices)


def pmap_eval_step(*, devices: Sequence[jax.Device] | None = None, **options) -> Callable:
    """Returns `step(variables, batch) -> sums`: `steps.eval_step` under `jax.pmap`, each image
    counted once. Arguments as in `pmap_train_step`."""
    return _pmapped(functools.partial(steps.eval_step, **options), devices)


def _shard_mapped(step: Callable, devices: Sequence[jax.Device] | None, outputs) -> Callable:
    mesh = mesh_over(jax.local_devices() if devices is None else devices)
    step = functools.partial(step, axis_name=AXIS)
    in_specs = (P(), P(AXIS))
    step = jax.jit(over_devices(step, mesh, in_specs, outputs))

    def call(first: Any, batch: steps.Batch):
        # From one device and from all of them would be two programs.
        return step(jax.device_put(first, everywhere(mesh)), pad_batch(batch, mesh.size))

    return call


def shard_map_train_step(*, devices: Sequence[jax.Device] | None = None, **options) -> Callable:
    """Returns `step(state, batch) -> (state, sums)`: `steps.train_step` under shard_map and jit.
    Arguments as in `pmap_train_step`."""
    return _shard_mapped(functools.partial(steps.train_step, **options), devices, (P(), P()))


def shard_map_eval_step(*, devices: Sequence[jax.Device] | None = None, **options) -> Callable:
    """Returns `step(variables, batch) -> sums`: `steps.eval_step` under shard_map and jit, each
    image counted once. Arguments as in `pmap_train_step`."""
    return _shard_mapped(functools.partial(steps.eval_step, **options), devices, P())
