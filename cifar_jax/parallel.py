"""Where steps become programs: jit and shardings over devices, and nothing else.

A training program runs many steps of an epoch in one dispatch and writes each step's sums to a
record that stays on the device until it is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cifar_jax import resident
from cifar_jax.feed import take_batch
from cifar_jax.hardware import AXIS, CPU_DEVICE_WEIGHTS, everywhere
from cifar_jax.steps import parameter_count

RECORD_FIELDS = ("loss", "correct", "count")


def pad_to_divide(x: jax.Array, devices: int, fill: int, axis: int = 1) -> jax.Array:
    """Pads an axis, a batch, with `fill` so that it divides among the devices."""
    missing = -x.shape[axis] % devices
    if not missing:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, missing)
    return jnp.pad(x, padding, constant_values=fill)


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

# A CPU computes a step in pieces (`accumulate`), for the same reason. Large batches, pieces of so
# many images, in turn against none (tutorial_cnn: against two): 512 on two devices tutorial_cnn
# 1.22x, dropout_cnn 1.7x, deep_cnn 2.1x; on one 0.92x, 1.3x, -. Networks of more than
# `CPU_DEVICE_WEIGHTS` would spend on adding up gradients what that saves.
CPU_PIECES_FROM, CPU_PIECE_IMAGES = 256, 32

# Smaller ones in two pieces from so many images a device on, for networks of at most so many
# weights: tutorial_cnn 1.12 to 1.17x at 64 images on each of two devices, 1.04x at 128 on one.
# dropout_cnn would lose (0.96x; 0.92x in four pieces on one).
CPU_TWO_PIECES_FROM, CPU_TWO_PIECES_WEIGHTS = 64, 100_000


def pieces(images: int, state) -> int:
    """Returns into how many pieces a step of `images` on a device is cut where the recipe does
    not say: by the measurements above; 1 wherever it would be another step."""
    if jax.default_backend() != "cpu" or jax.tree.leaves(state.batch_stats):
        return 1
    weights = parameter_count(state.params)
    if images >= CPU_PIECES_FROM and weights <= CPU_DEVICE_WEIGHTS:
        return images // CPU_PIECE_IMAGES
    return 2 if images >= CPU_TWO_PIECES_FROM and weights <= CPU_TWO_PIECES_WEIGHTS else 1


def tiles(batches: jax.Array, variables, fill: int = -1) -> jax.Array:
    """Cuts batches [batches, B, ...] into those that a CPU evaluates at a time, [tiles, size, ...],
    a batch's last one padded with `fill`; elsewhere they stay as they are."""
    if jax.default_backend() != "cpu":
        return batches
    large = parameter_count(variables) > CPU_DEVICE_WEIGHTS
    size = CPU_EVAL_TILE_LARGE if large else CPU_EVAL_TILE
    if batches.shape[1] <= size:
        return batches
    padded = pad_to_divide(batches, size, fill)
    return padded.reshape(-1, size, *batches.shape[2:])


def evaluate_many(step: Callable, variables, data, order, take: Callable = take_batch):
    """Adds up `step`'s sums over all batches of an order [batches, batch]."""
    order = tiles(order, variables)

    def body(sums, row):
        return jax.tree.map(jnp.add, sums, step(variables, take(data, row))), None

    shapes = jax.eval_shape(lambda: step(variables, take(data, order[0])))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(body, zeros, order)[0]


def predict_many(step: Callable, variables, images):
    """Maps `step` over batches of images [batches, B, H, W, C]; returns [batches, B, classes]."""
    found = lax.map(lambda batch: step(variables, batch), tiles(images, variables, fill=0))
    batches, size = images.shape[:2]
    return found.reshape(batches, -1, found.shape[-1])[:, :size]


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
      mesh: from `hardware.data_mesh`; each device then computes its part of every batch, and a
        batch that does not divide is padded and masked. Results differ in the order of sums only.
        `data` may then also be from `resident.put_split` or `put_own`.
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
        return mapped(state, record, data, pad_to_divide(order, mesh.size, -1), *scalars)

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
        return mapped(variables, data, pad_to_divide(order, mesh.size, -1))

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
        return split(variables, pad_to_divide(images, mesh.size, 0))[:, : images.shape[1]]

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
