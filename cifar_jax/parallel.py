"""Where steps become programs: jit, devices and shardings, and nothing else.

A training program runs many steps of an epoch in one dispatch and writes each step's sums to a
record that stays on the device until it is asked for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.errors import UserError, nearest
from cifar_jax.feed import take_batch

DEVICES = ("auto", "cpu", "gpu", "tpu")
RECORD_FIELDS = ("loss", "correct", "count")


def select_platform(name: str) -> str:
    """Makes JAX use the named platform and returns the one in use: `cpu`, `gpu` or `tpu`.

    Call it before anything runs on a device. `auto` takes JAX's choice.

    Raises:
      UserError: unknown name, or no such device here.
    """
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}; {nearest(name, DEVICES)}")
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


def describe_device() -> str:
    """Returns e.g. `2 x NVIDIA H200 (gpu)`: what JAX computes on."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"


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


def train_many(step: Callable, state, record, data, order, row, start, length):
    """Runs `length` steps: rows row, row + 1, ... of `order` are steps start, start + 1, ... of
    the epoch. Returns the state and the record with those steps' sums.

    Pure and undecorated. `length` may be traced: the loop is then one program for any length,
    which costs nothing on a CPU; a GPU wants it static, or it waits for the host each step.
    """

    def body(i, carry):
        state, record = carry
        state, sums = step(state, take_batch(data, order[row + i]))
        return state, {name: record[name].at[start + i].set(sums[name]) for name in record}

    return lax.fori_loop(0, length, body, (state, record))


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
CPU_EVAL_TILE = 64


def tiles(order: jax.Array, size: int) -> jax.Array:
    """Cuts an order's rows into rows of at most `size`, padded with -1."""
    batch = order.shape[1]
    if batch <= size:
        return order
    padded = jnp.pad(order, ((0, 0), (0, -batch % size)), constant_values=-1)
    return padded.reshape(-1, size)


def evaluate_many(step: Callable, variables, data, order):
    """Adds up `step`'s sums over all batches of an order [batches, batch]."""
    if jax.default_backend() == "cpu":
        order = tiles(order, CPU_EVAL_TILE)

    def body(sums, row):
        return jax.tree.map(jnp.add, sums, step(variables, take_batch(data, row))), None

    shapes = jax.eval_shape(lambda: step(variables, take_batch(data, order[0])))
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


def compile_training(
    step: Callable, static_length: bool | None = None, remat: bool = False
) -> Callable:
    """Returns `run(state, record, data, order, row, start, length) -> (state, record)`, jitted.

    Arguments as in `train_many`; state and record are donated. Any row, start and length share
    one compiled program on a CPU; elsewhere there is one for each length.
    """
    if static_length is None:
        static_length = jax.default_backend() != "cpu"
    static = {"static_argnames": ("length",)} if static_length else {}

    def run(state, record, data, order, row, start, length):
        return train_many(step, state, record, data, order, row, start, length)

    jitted = jax.jit(run, donate_argnums=(0, 1), compiler_options=compiler_options(remat), **static)

    def call(state, record, data, order, row: int, start: int, length: int):
        length = int(length) if static_length else np.int32(length)
        return jitted(state, record, data, order, np.int32(row), np.int32(start), length=length)

    call.jitted = jitted
    return call


def compile_evaluation(step: Callable) -> Callable:
    """Returns `evaluate(variables, data, order) -> sums`, jitted."""
    return jax.jit(functools.partial(evaluate_many, step), compiler_options=compiler_options())


def compile_prediction(step: Callable) -> Callable:
    """Returns `predict(variables, images [batches, B, H, W, C]) -> logits`, jitted."""
    return jax.jit(functools.partial(predict_many, step), compiler_options=compiler_options())


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
