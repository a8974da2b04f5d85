"""Where steps become programs: jit, devices and shardings, and nothing else.

A training program runs many steps of an epoch in one dispatch and writes each step's sums to a
record that stays on the device until it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cifar_jax import resident
from cifar_jax.errors import UserError, nearest
from cifar_jax.feed import take_batch
from cifar_jax.records import usable_cores
from cifar_jax.steps import parameter_count

DEVICES = ("auto", "cpu", "gpu", "tpu")
RECORD_FIELDS = ("loss", "correct", "count")
AXIS = "data"
# A CPU device gets at least so many images of a batch. Two AVX-512 cores, training images/s on one
# device and on two with half the batch each: dropout b20 2,390 and 2,781, deep b16 1,068 and
# 1,382, adam b128 9,984 and 12,608, dropout b128 2,369 and 3,618.
CPU_DEVICE_IMAGES = 8
# With more weights than this their own traffic costs more than sharing saves: vgg16 b128 trains
# 94 images/s on one device and 58 on two.
CPU_DEVICE_WEIGHTS = 4_000_000
# A GPU or TPU gets at least so many images of a batch. A rule, not a measurement: batches of 128
# are shared by up to 8 devices, the tutorial's batches of 4 stay on one (docs/scaling.md).
ACCELERATOR_DEVICE_IMAGES = 16


def select_platform(name: str) -> str:
    """Makes JAX use the named platform and returns the one in use: `cpu`, `gpu` or `tpu`.

    Call it before anything runs on a device. `auto` takes JAX's choice. A CPU becomes as many
    devices as the process has cores; what runs on one of them still uses all cores.

    Raises:
      UserError: unknown name, or no such device here.
    """
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}; {nearest(name, DEVICES)}")
    with contextlib.suppress(RuntimeError):  # devices are in use already, and stay as they are
        if jax.config.jax_num_cpu_devices < 1 and "--xla_force_host" not in _user_flags():
            jax.config.update("jax_num_cpu_devices", usable_cores())
    before = jax.config.jax_platforms
    if name != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda,rocm"}.get(name, name))
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        if name == "auto":
            raise UserError(f"JAX finds no usable device: {error}") from None
        found = None
    found = {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
    # A process that has used a device already keeps it, whatever is asked for later.
    if name not in ("auto", found):
        jax.config.update("jax_platforms", before)
        extra = {"gpu": "; install .[cuda12] or .[cuda13] and check the driver with nvidia-smi"}
        raise UserError(f"--device {name}: JAX finds no such device{extra.get(name, '')}")
    return found


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


def _share(x: jax.Array, devices: int, fill: int) -> jax.Array:
    """Pads the second axis, a batch, so that it divides among the devices."""
    missing = -x.shape[1] % devices
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def enable_compilation_cache() -> str:
    """Turns on JAX's persistent compilation cache in the user's cache directory.

    Small programs are kept too: a run starts with some thirty of them, a second's compiling.
    A directory the user set (`JAX_COMPILATION_CACHE_DIR`) wins. Returns the directory.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "cifar_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return jax.config.jax_compilation_cache_dir


def empty_record(steps: int) -> dict[str, jax.Array]:
    """Returns an epoch's record before its first step: float32 [steps] for each sum."""
    return {name: jnp.zeros((steps,), jnp.float32) for name in RECORD_FIELDS}


def train_many(
    step: Callable, state, record, data, order, row, start, length, take: Callable = take_batch
):
    """Runs `length` steps: rows row, row + 1, ... of `order` are steps start, start + 1, ... of
    the epoch. Returns the state and the record with those steps' sums.

    Pure and undecorated. `length` may be traced: the loop is then one program for any length,
    which costs nothing on a CPU; a GPU wants it static, or it waits for the host each step.
    """

    def body(i, carry):
        return recorded_step(step, *carry, data, order, row + i, start + i, take)

    return lax.fori_loop(0, length, body, (state, record))


def recorded_step(step: Callable, state, record, data, order, row, at, take=take_batch):
    """One step of `train_many`: row `row` of the order, its sums at place `at` of the record."""
    state, sums = step(state, take(data, order[row]))
    return state, {name: record[name].at[at].set(sums[name]) for name in record}


class Chunks:
    """How many steps to run before the host looks again.

    On a CPU the length follows the measured speed, about `seconds` a chunk: any length runs the
    same program. Elsewhere a length is a program, so there are two of them in an epoch at most.
    """

    def __init__(self, steps_per_epoch: int, *, seconds: float = 0.3, most: int = 2048):
        self._adaptive = jax.default_backend() == "cpu"
        self._seconds = seconds
        # Equal parts: the epoch's chunks are then all of one length, or of two.
        parts = -(-steps_per_epoch // most)
        self._length = 1 if self._adaptive else -(-steps_per_epoch // parts)

    def next(self, left: int) -> int:
        """Returns the next chunk's length, at most `left`."""
        return max(1, min(self._length, left))

    def streamed(self, batch_size: int, images: int = 4096) -> int:
        """Returns the streamed feed's length: about so many images a chunk."""
        return max(1, images // batch_size)

    def ran(self, length: int, seconds: float) -> None:
        """Takes note that `length` steps took `seconds`."""
        if self._adaptive and length:
            wanted = self._seconds * length / max(seconds, 1e-6)
            self._length = int(max(1, min(wanted, 8 * length)))


# Images a CPU evaluates at a time: activations then stay in its caches. Sums do not depend on it.
# Against 64, in turn on two cores: tutorial_cnn 1.23 to 1.34x, deep_cnn 1.32x, dropout_cnn 1.15x
# (8 images: dropout_cnn 0.87x). Networks of more than `CPU_DEVICE_WEIGHTS` take the larger tile,
# so that their weights are not read too often.
CPU_EVAL_TILE, CPU_EVAL_TILE_LARGE = 16, 64

# A CPU computes a step in two pieces (`accumulate`) from so many images a device on, for networks
# of at most so many weights, for the same reason: tutorial_cnn 1.12 to 1.17x at 64 images on each
# of two devices, 1.04x at 128 on one. dropout_cnn loses (0.98x) and deep_cnn gains 1.02 to 1.05x:
# what they save in activations they spend on gradients of more weights.
CPU_PIECE_IMAGES, CPU_PIECE_WEIGHTS = 64, 100_000


def pieces(images: int, state) -> int:
    """Returns into how many pieces a step of `images` on a device is cut where the recipe does
    not say: 1 or, by the measurement above, 2; 1 wherever it would be another step."""
    if jax.default_backend() != "cpu" or jax.tree.leaves(state.batch_stats):
        return 1
    few = parameter_count(state.params) <= CPU_PIECE_WEIGHTS
    return 2 if few and images >= CPU_PIECE_IMAGES else 1


def tiles(order: jax.Array, size: int) -> jax.Array:
    """Cuts an order's rows into rows of at most `size`, padded with -1."""
    batch = order.shape[1]
    if batch <= size:
        return order
    padded = jnp.pad(order, ((0, 0), (0, -batch % size)), constant_values=-1)
    return padded.reshape(-1, size)


def evaluate_many(step: Callable, variables, data, order, take: Callable = take_batch):
    """Adds up `step`'s sums over all batches of an order [batches, batch]."""
    if jax.default_backend() == "cpu":
        large = parameter_count(variables) > CPU_DEVICE_WEIGHTS
        order = tiles(order, CPU_EVAL_TILE_LARGE if large else CPU_EVAL_TILE)

    def body(sums, row):
        return jax.tree.map(jnp.add, sums, step(variables, take(data, row))), None

    shapes = jax.eval_shape(lambda: step(variables, take(data, order[0])))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(body, zeros, order)[0]


def predict_many(step: Callable, variables, images):
    """Maps `step` over batches of images [batches, B, H, W, C]; returns [batches, B, classes]."""
    return lax.map(lambda batch: step(variables, batch), images)


def compiler_options(remat: bool = False) -> dict[str, Any]:
    """Returns the XLA options every program here is compiled with, {} for none.

    XLA:CPU drops the barriers around what `jax.checkpoint` computes again, and then finds that it
    has it already: with `remat` they are kept.
    """
    from cifar_jax.models import lowering

    options = lowering.cpu_compiler_options()
    if remat and jax.default_backend() == "cpu":
        options["xla_disable_hlo_passes"] = "cse_barrier_expander"
    return options


_HELD = {"whole": P(), "split": P(AXIS), "own": P(AXIS)}  # see `resident.held`


def _take(held: str) -> dict[str, Callable]:
    return {"take": functools.partial(resident.take_split, axis=AXIS)} if held == "split" else {}


def compile_training(
    step: Callable,
    static_length: bool | None = None,
    mesh: Mesh | None = None,
    remat: bool = False,
) -> Callable:
    """Returns `run(state, record, data, order, row, start, length) -> (state, record)`, jitted.

    Arguments as in `train_many`; state and record are donated. Any row, start and length share
    one compiled program on a CPU; elsewhere there is one for each length.

    Args:
      step: takes `axis_name` if there is a mesh.
      mesh: from `data_mesh`; each device then computes its part of every batch, and a batch that
        does not divide is padded and masked. Results differ in the order of sums only. `data` may
        then also be from `resident.put_split` or `put_own`.
    """
    if static_length is None:
        static_length = jax.default_backend() != "cpu"
    static = ("held", "length") if static_length else ("held",)

    def run(state, record, data, order, row, start, length, held):
        if mesh is None:
            return train_many(step, state, record, data, order, row, start, length)
        each = functools.partial(step, axis_name=AXIS)
        part = functools.partial(train_many, each, **_take(held))
        if static_length:  # the length is no array
            part = functools.partial(part, length=length)
        scalars = (row, start) if static_length else (row, start, length)
        mapped = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(P(), P(), _HELD[held], P(None, AXIS), *[P()] * len(scalars)),
            out_specs=(P(), P()),
        )
        return mapped(state, record, data, _share(order, mesh.size, -1), *scalars)

    options = {"compiler_options": compiler_options(remat), "static_argnames": static}
    jitted = jax.jit(run, donate_argnums=(0, 1), **options)

    def call(state, record, data, order, row: int, start: int, length: int):
        held = resident.held(data, order)
        if mesh is not None:  # a state that is not on the mesh yet would be a second program
            state, record = resident.put_whole((state, record), mesh)
            order = order if held == "own" else resident.put_whole(order, mesh)
            data = resident.put_whole(data, mesh) if held == "whole" else data
        length = int(length) if static_length else np.int32(length)
        rows = (np.int32(row), np.int32(start))
        return jitted(state, record, data, order, *rows, length=length, held=held)

    call.jitted = jitted
    return call


def compile_evaluation(step: Callable, mesh: Mesh | None = None) -> Callable:
    """Returns `evaluate(variables, data, order) -> sums`, jitted; `mesh` as in
    `compile_training`, each device adding up its part of the batches."""

    def part(variables, data, order, **how):
        return lax.psum(evaluate_many(step, variables, data, order, **how), AXIS)

    def run(variables, data, order, held):
        if mesh is None:
            return evaluate_many(step, variables, data, order)
        specs = {"in_specs": (P(), _HELD[held], P(None, AXIS)), "out_specs": P()}
        # The scan's zeros are equal on every device, its sums are not: no check of that.
        mapped = functools.partial(part, **_take(held))
        mapped = jax.shard_map(mapped, mesh=mesh, check_vma=False, **specs)
        return mapped(variables, data, _share(order, mesh.size, -1))

    options = {"compiler_options": compiler_options(), "static_argnames": ("held",)}
    jitted = jax.jit(run, **options)

    def call(variables, data, order):
        held = resident.held(data, order)
        return jitted(*resident.spread((variables, data, order), mesh), held=held)

    return call


def compile_prediction(step: Callable, mesh: Mesh | None = None) -> Callable:
    """Returns `predict(variables, images [batches, B, H, W, C]) -> logits`, jitted; `mesh` as in
    `compile_training`."""

    def run(variables, images):
        if mesh is None:
            return predict_many(step, variables, images)
        specs = {"in_specs": (P(), P(None, AXIS)), "out_specs": P(None, AXIS)}
        split = jax.shard_map(functools.partial(predict_many, step), mesh=mesh, **specs)
        return split(variables, _share(images, mesh.size, 0))[:, : images.shape[1]]

    # Each process reads all logits, and computes only a part of them.
    whole = everywhere(mesh) if mesh is not None and mesh.is_multi_process else None
    jitted = jax.jit(run, compiler_options=compiler_options(), out_shardings=whole)
    return lambda variables, images: jitted(*resident.spread((variables, images), mesh))


# Above so many numbers drawn, a CPU gains more from an optimised program than compiling it costs.
QUICK_NUMBERS = 4_000_000


def compile_for_one_call(function: Callable, numbers: int = 0) -> Callable:
    """Returns `function`, jitted for one call that makes about so many numbers.

    On a CPU the programs of random numbers take LLVM longer to optimise than to run unoptimised:
    drawing dropout_cnn's weights 2.5 s of one core instead of 13 s (last bits may differ). Large
    networks are the other way round.
    """
    quick = numbers < QUICK_NUMBERS and jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if quick else {}
    return jax.jit(function, compiler_options=options)
