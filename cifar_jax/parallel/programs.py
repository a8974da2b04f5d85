"""Where steps become programs: jit and shardings over devices, and nothing else.

A training program runs many steps of an epoch in one dispatch and writes each step's sums to
arrays that stay on the device until they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cifar_jax.parallel import placement
from cifar_jax.parallel.hardware import AXIS, CPU_DEVICE_WEIGHTS, everywhere
from cifar_jax.parallel.placement import Examples
from cifar_jax.steps import parameter_count

METRICS = ("loss", "correct", "count")
WHOLE = P()


def pad_to_divide(x: jax.Array, devices: int, fill: int, axis: int = 1) -> jax.Array:
    """Pads an axis, a batch, with `fill` so that it divides among the devices."""
    missing = -x.shape[axis] % devices
    if not missing:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, missing)
    return jnp.pad(x, padding, constant_values=fill)


def empty_metrics(*shape: int) -> dict[str, jax.Array]:
    """Returns step metrics before the first step: float32 `shape` (steps last) for each sum."""
    return {name: jnp.zeros(shape, jnp.float32) for name in METRICS}


def packed(step_metrics: dict[str, jax.Array]) -> jax.Array:
    """Returns step metrics as one array [..., steps, 3]: a loop over steps writes one row of it,
    not a number to each of three arrays, which a GPU would launch three kernels for."""
    return jnp.stack([step_metrics[name] for name in METRICS], axis=-1)


def unpacked(metrics: jax.Array) -> dict[str, jax.Array]:
    """Returns what `packed` was given."""
    return {name: metrics[..., i] for i, name in enumerate(METRICS)}


def measured_step(step: Callable, state, metrics, examples: Examples, row: jax.Array, at):
    """Returns the state after a step on the examples at `row` [B], the packed metrics [steps, 3]
    with its sums at place `at`, and its sums [3]."""
    state, sums = step(state, examples.take(row))
    sums = jnp.stack([sums[name].astype(metrics.dtype) for name in METRICS])
    return state, metrics.at[at].set(sums), sums


def train_many(
    step: Callable,
    changing: tuple,
    hparams: Mapping[str, Any],
    examples: Examples,
    batch_indices: jax.Array,
    row: jax.Array,
    start: jax.Array,
    length: jax.Array | int,
) -> tuple:
    """Runs `length` steps: rows row, row + 1, ... of the batch indices are steps start, start + 1,
    ... of the epoch.

    Pure and undecorated. `length` may be traced: the loop is then one program for any length,
    which costs nothing on a CPU; a GPU wants it static, or it waits for the host each step.

    Args:
      changing: (state, step metrics).
      hparams: keyword arguments of `step`.
      batch_indices: int32 [batches, B].

    Returns:
      The state after the steps and the step metrics with their sums.
    """
    step = functools.partial(step, **hparams)

    def body(i, carry):
        return measured_step(step, *carry, examples, batch_indices[row + i], start + i)[:2]

    state, step_metrics = changing
    state, metrics = lax.fori_loop(0, length, body, (state, packed(step_metrics)))
    return state, unpacked(metrics)


def _equal_part(steps: int, most: int) -> int:
    """Returns the length, at most `most`, of the parts that `steps` are cut into: equal ones where
    less than twice as many parts as needed can be equal, else all equal but the last."""
    parts = max(1, -(-steps // most))
    equal = (n for n in range(parts, 2 * parts) if steps % n == 0)
    return -(-steps // next(equal, parts))


class Chunks:
    """How many steps to run before the host looks again.

    On a CPU the length follows the measured speed, about `seconds` a chunk: any length runs the
    same program. Elsewhere a length is a program: all chunks of an epoch are equal where its steps
    have a divisor for that, and of two lengths where they have none.
    """

    def __init__(self, steps_per_epoch: int, *, seconds: float = 0.3, most: int = 2048):
        self._adaptive = jax.default_backend() == "cpu"
        self._seconds = seconds
        self._length = 1 if self._adaptive else _equal_part(steps_per_epoch, most)

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

# A CPU computes a step in microbatches (`accumulate`), for the same reason. Large batches, so many
# images each, in turn against none (tutorial_cnn: against two): 512 on two devices tutorial_cnn
# 1.22x, dropout_cnn 1.7x, deep_cnn 2.1x; on one 0.92x, 1.3x, -. Networks of more than
# `CPU_DEVICE_WEIGHTS` would spend on adding up gradients what that saves.
CPU_MICROBATCHES_FROM, CPU_MICROBATCH_IMAGES = 256, 32

# Smaller ones in two from so many images a device on, for networks of at most so many
# weights: tutorial_cnn 1.12 to 1.17x at 64 images on each of two devices, 1.04x at 128 on one.
# dropout_cnn would lose (0.96x; 0.92x in four on one).
CPU_TWO_FROM, CPU_TWO_WEIGHTS = 64, 100_000


def microbatches(images: int, state) -> int:
    """Returns into how many microbatches a step of `images` on a device is cut where the recipe
    does not say: by the measurements above; 1 wherever it would be another step."""
    if jax.default_backend() != "cpu" or jax.tree.leaves((state.batch_stats, state.collections)):
        return 1
    weights = parameter_count(state.params)
    if images >= CPU_MICROBATCHES_FROM and weights <= CPU_DEVICE_WEIGHTS:
        return images // CPU_MICROBATCH_IMAGES
    return 2 if images >= CPU_TWO_FROM and weights <= CPU_TWO_WEIGHTS else 1


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


def evaluate_many(
    step: Callable, variables, examples: Examples, batch_indices: jax.Array, whole: bool = False
):
    """Adds up `step`'s sums over all batches of batch indices [batches, B], each of them at a time
    where it is `whole`, else in `tiles`."""
    batch_indices = batch_indices if whole else tiles(batch_indices, variables)

    def body(sums, row):
        return jax.tree.map(jnp.add, sums, step(variables, examples.take(row))), None

    shapes = jax.eval_shape(lambda: step(variables, examples.take(batch_indices[0])))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(body, zeros, batch_indices)[0]


def predict_many(step: Callable, variables, images, whole: bool = False):
    """Maps `step` over batches of images [batches, B, H, W, C]; returns [batches, B, classes].
    `whole` as in `evaluate_many`."""
    cut = images if whole else tiles(images, variables, fill=0)
    found = lax.map(lambda batch: step(variables, batch), cut)
    batches, size = images.shape[:2]
    return found.reshape(batches, -1, found.shape[-1])[:, :size]


def compiler_options(remat: bool = False, in_pieces: bool = False) -> dict[str, Any]:
    """Returns the XLA options every program here is compiled with, {} for none; `in_pieces` as in
    `compile_training`.

    XLA:CPU drops the barriers around what `jax.checkpoint` computes again, and then finds that it
    has it already: with `remat` they are kept.
    """
    from cifar_jax.ops import convolution

    options = convolution.cpu_compiler_options(in_pieces)
    if remat and jax.default_backend() == "cpu":
        options["xla_disable_hlo_passes"] = "cse_barrier_expander"
    return options


def sharing_a_batch(mesh: Mesh | None) -> int:
    """Returns over how many devices a batch is split."""
    return 1 if mesh is None else mesh.shape[AXIS]


def over_devices(function: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """Returns `function` split over a mesh's devices, as it is where there is no mesh.

    JAX does not check that what should be equal on all devices is: it would refuse networks with
    the exact GELU, whose derivative in jax 0.12.0 does not say over which devices it varies.
    """
    if mesh is None:
        return function
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)


def compile_training(
    step: Callable,
    static_length: bool | None = None,
    mesh: Mesh | None = None,
    remat: bool = False,
    *,
    train: Callable = train_many,
    own: P = WHOLE,
    in_pieces: bool = False,
) -> Callable:
    """Returns `run(changing, examples, batch_indices, row, start, length, hparams={}) -> changing`,
    jitted.

    Arguments as in `train_many`; `changing` is donated. Any row, start and length share one
    compiled program on a CPU; elsewhere there is one for each length.

    Args:
      step: takes `axis_name` where devices share a batch.
      mesh: from `hardware.data_mesh`; each device then computes its part of every batch, and a
        batch that does not divide is padded and masked. Results differ in the order of sums only.
        The arguments lie on it already (`cifar_jax.parallel.placement`): from elsewhere they would
        make a second program.
      train, own: `train_many`, and how what a run has of its own is split over the mesh.
      in_pieces: whether the model computes batches of this size so (`setup.in_pieces`).
    """
    if static_length is None:
        static_length = jax.default_backend() != "cpu"
    if sharing_a_batch(mesh) > 1:
        step = functools.partial(step, axis_name=AXIS)
    train = functools.partial(train, step)

    def program(changing, hparams, examples, batch_indices, row, start, length):
        batch_indices = pad_to_divide(batch_indices, sharing_a_batch(mesh), -1, axis=-1)
        arrays = (changing, hparams, examples, batch_indices, row, start)
        specs = (own, own, examples.spec, P(*own, None, AXIS), P(), P())
        if static_length:
            steps = functools.partial(train, length=length)
        else:
            steps, arrays, specs = train, (*arrays, length), (*specs, P())
        return over_devices(steps, mesh, specs, own)(*arrays)

    static = {"static_argnames": ("length",)} if static_length else {}
    xla = compiler_options(remat, in_pieces)
    jitted = jax.jit(program, donate_argnums=0, compiler_options=xla, **static)

    def run(changing, examples, batch_indices, row: int, start: int, length: int, hparams=None):
        length = int(length) if static_length else np.int32(length)
        places = (np.int32(row), np.int32(start))
        return jitted(changing, hparams or {}, examples, batch_indices, *places, length=length)

    run.jitted = jitted
    return run


def compile_evaluation(
    step: Callable,
    mesh: Mesh | None = None,
    *,
    evaluate: Callable = evaluate_many,
    own: P = WHOLE,
    in_pieces: bool = False,
) -> Callable:
    """Returns `run(variables, examples, batch_indices) -> sums`, jitted; arguments as in
    `compile_training`, each device adding up its part of the batches."""
    if in_pieces:
        evaluate = functools.partial(evaluate, whole=True)

    def sums_of(variables, examples, batch_indices):
        sums = evaluate(step, variables, examples, batch_indices)
        return lax.psum(sums, AXIS) if sharing_a_batch(mesh) > 1 else sums

    def program(variables, examples, batch_indices):
        batch_indices = pad_to_divide(batch_indices, sharing_a_batch(mesh), -1, axis=-1)
        specs = (own, examples.spec, P(*own, None, AXIS))
        return over_devices(sums_of, mesh, specs, own)(variables, examples, batch_indices)

    jitted = jax.jit(program, compiler_options=compiler_options(in_pieces=in_pieces))

    def run(variables, examples, batch_indices):
        return jitted(*_to_processes((variables, examples, batch_indices), mesh))

    run.jitted = jitted
    return run


def compile_prediction(
    step: Callable, mesh: Mesh | None = None, *, in_pieces: bool = False
) -> Callable:
    """Returns `run(variables, images [batches, B, H, W, C]) -> logits`, jitted; `mesh` and
    `in_pieces` as in `compile_training`."""

    def program(variables, images):
        predict = functools.partial(predict_many, step, whole=in_pieces)
        predict = over_devices(predict, mesh, (WHOLE, P(None, AXIS)), P(None, AXIS))
        logits = predict(variables, pad_to_divide(images, sharing_a_batch(mesh), 0))
        return logits[:, : images.shape[1]]

    # Each process reads all logits, and computes only a part of them.
    whole = everywhere(mesh) if mesh is not None and mesh.is_multi_process else None
    xla = compiler_options(in_pieces=in_pieces)
    jitted = jax.jit(program, compiler_options=xla, out_shardings=whole)
    return lambda *arrays: jitted(*_to_processes(arrays, mesh))


def _to_processes(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays on a mesh over several processes; on one of this process jit puts them."""
    return placement.replicate(tree, mesh) if mesh is not None and mesh.is_multi_process else tree


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
