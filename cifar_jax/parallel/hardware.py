"""Which devices compute: the platform, how many of its devices share a batch, and their mesh."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cifar_jax.runtime.environment import usable_cores
from cifar_jax.runtime.errors import UserError, nearest

DEVICES = ("auto", "cpu", "gpu", "tpu")
AXIS = "data"
# A CPU device gets at least so many images of a batch. Two AVX-512 cores, training images/s on one
# device and on two with half the batch each: dropout b20 2,390 and 2,781, deep b16 1,068 and
# 1,382, adam b128 9,984 and 12,608, dropout b128 2,369 and 3,618.
CPU_DEVICE_IMAGES = 8
# With more weights than this their own traffic costs more than sharing saves: vgg16 b128 trains
# 94 images/s on one device and 58 on two.
CPU_DEVICE_WEIGHTS = 4_000_000
# Networks of at most so many weights train batches too small for two devices on one thread: their
# products are so small that two threads wait for each other more than they share. Two cores (AMD
# EPYC), images/s on two threads and on one: tutorial_cnn b4 7,900 and 11,500, b12 12,300 and
# 14,000; of larger networks some gain less (dropout_cnn b12 3,500 and 3,900), others lose
# (deep_cnn b4 1,320 and 1,110).
ONE_THREAD_WEIGHTS = 100_000
# A GPU or TPU gets at least so many images of a batch. A rule, not a measurement: batches of 128
# are shared by up to 8 devices, the tutorial's batches of 4 stay on one (docs/scaling.md).
ACCELERATOR_DEVICE_IMAGES = 16


def cpu_threads(asked: str, batch_size: int, weights: Callable[[], int]) -> int | None:
    """Returns how many threads a process that trains this and nothing else should compute with on
    a CPU: 1, or None for one a core. `asked` as in `choose_devices`; `weights` counts them, and is
    called only where they decide."""
    few_images = asked == "auto" and batch_size < 2 * CPU_DEVICE_IMAGES
    return 1 if few_images and weights() <= ONE_THREAD_WEIGHTS else None


_threads: int | None = None  # what this process's CPU was limited to


def computing_threads() -> int:
    """Returns how many threads of a CPU compute: `select_platform`'s, or one a core."""
    return _threads or usable_cores()


def name_platform(name: str) -> None:
    """Makes JAX take the named platform where it is one by that name, and starts nothing."""
    if name in ("cpu", "tpu"):
        jax.config.update("jax_platforms", name)


def select_platform(name: str, threads: int | None = None) -> str:
    """Makes JAX use the named platform and returns the one in use: `cpu`, `gpu` or `tpu`.

    Call it before anything runs on a device. `auto` takes JAX's choice. A CPU becomes as many
    devices as the process has cores; what runs on one of them still uses all cores. With `threads`
    it becomes so many devices, and no more threads compute; a number that the user set stays
    (`JAX_NUM_CPU_DEVICES`, `PJRT_NPROC`, `NPROC`).

    Raises:
      UserError: unknown name, or no such device here.
    """
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}; {nearest(name, DEVICES)}")
    pool = contextlib.nullcontext()
    with contextlib.suppress(RuntimeError):  # devices are in use already, and stay as they are
        if jax.config.jax_num_cpu_devices < 1 and "--xla_force_host" not in _user_flags():
            limited = threads and not os.environ.keys() & {_POOL, "NPROC"}
            jax.config.update("jax_num_cpu_devices", threads if limited else usable_cores())
            pool = _pool_of(threads) if limited else pool
    before, reasons, found = jax.config.jax_platforms, [], None
    with pool:
        # One after the other: JAX takes a list only if it can start all of it.
        for platform in {"auto": (before,), "gpu": ("cuda", "rocm")}.get(name, (name,)):
            jax.config.update("jax_platforms", platform)
            try:
                found = jax.default_backend()
                break
            except (RuntimeError, AssertionError) as error:  # the latter: `cuda` without a GPU
                reason = str(error).partition(" (set JAX_PLATFORMS")[0]
                reasons += [reason] if reason and "known backends" not in reason else []
    found = {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
    # A process that has used a device already keeps it, whatever is asked for later.
    if found is None or name not in ("auto", found):
        jax.config.update("jax_platforms", before)
        asked, how = f"--device {name}", ""
        if name == "gpu":
            how = "; install .[cuda12] or .[cuda13] and check the driver with nvidia-smi"
        elif name == "auto" and before:
            asked, how = f"JAX_PLATFORMS={before}", "; unset it, or name a device with --device"
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{asked}: JAX finds no such device{why}{how}")
    return found


# Read by XLA when the CPU's devices are made: the threads of the pool that they share.
_POOL = "PJRT_NPROC"


@contextlib.contextmanager
def _pool_of(threads: int):
    global _threads
    os.environ[_POOL] = str(threads)
    try:
        yield
    finally:
        del os.environ[_POOL]
    _threads = threads


def deterministic() -> None:
    """Has XLA compute on a GPU with operations that give the same bits every time, and without
    measuring kernels against one another. Call it before anything runs on a device."""
    os.environ["XLA_FLAGS"] = f"{_user_flags()} --xla_gpu_deterministic_ops=true".strip()


def _user_flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def describe_device() -> str:
    """Returns e.g. `2 x NVIDIA H200 (gpu)`: what JAX computes on."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"


def choose_devices(asked: str, batch_size: int, weights: int) -> int:
    """Returns how many local devices share a batch.

    Args:
      asked: `auto`, `all` or a number; of several processes, that in each. `auto` is as many
        devices as there are with at least `ACCELERATOR_DEVICE_IMAGES` images of the batch each; on
        a CPU `CPU_DEVICE_IMAGES`, which run one batch faster than one device does, unless the
        model has more than `CPU_DEVICE_WEIGHTS`.
      batch_size: images in a batch.
      weights: numbers in the model's parameters.

    Raises:
      UserError: not one of these, or more devices than there are.
    """
    here = jax.local_device_count()
    if asked == "auto":
        images = batch_size // jax.process_count()
        if jax.default_backend() != "cpu":
            return max(1, min(here, images // ACCELERATOR_DEVICE_IMAGES))
        if weights > CPU_DEVICE_WEIGHTS:
            return 1
        return max(1, min(here, images // CPU_DEVICE_IMAGES))
    if asked == "all":
        return here
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"--devices must be auto, all or a number from 1, got {asked!r}")
    if int(asked) > here:
        raise UserError(f"--devices {asked}: there are {here} here ({describe_device()})")
    return int(asked)


def data_mesh(devices: int) -> Mesh | None:
    """Returns a mesh that splits batches over so many devices of each process, process after
    process; None for one device in all."""
    processes = range(jax.process_count())
    chosen = [d for process in processes for d in jax.local_devices(process)[:devices]]
    return None if len(chosen) == 1 else mesh_over(chosen)


def mesh_over(devices: Sequence[jax.Device]) -> Mesh:
    """Returns a mesh of these devices, in this order, with the one axis `AXIS`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Returns the sharding of what every device of the mesh holds whole, None for one device."""
    return None if mesh is None else NamedSharding(mesh, P())
