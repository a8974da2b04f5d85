"""How many runs fit in memory together."""

from __future__ import annotations

import math
from pathlib import Path

import jax

from cifar_jax.models.layer_table import summarise
from cifar_jax.training.setup import Run, input_shape

# Of a state: as it goes into a program and as it comes out, its best so far, a save under way.
STATES = 4
# Of a layer's output in training: itself, what the backward pass keeps, its gradient, and patches
# of a convolution, several times an image. An upper estimate, not a measurement.
ACTIVATIONS = 16
# What is left to everything else.
SHARE = 0.7


def state_bytes(run: Run) -> int:
    """Returns the bytes of one run's state."""
    return sum(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(run.shapes))


def activation_bytes(run: Run) -> int:
    """Returns about how many bytes a training step of one run holds besides the state."""
    recipe = run.config.recipe
    layers = summarise(run.model, input_shape(recipe, run.config.dataset["image_shape"]))
    numbers = sum(math.prod(layer.output_shape) for layer in layers)
    return ACTIVATIONS * 4 * numbers * -(-recipe.batch_size // recipe.accumulate)


def available_bytes(processes: int = 1) -> int | None:
    """Returns the memory that is free for replicas on all local devices, None if unknown.

    An accelerator says so itself (`memory_stats`); a CPU's is the host's, within the limit of the
    process's control group, which `processes` share alike, as if on one host.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return len(devices) * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    free = [_meminfo(), _cgroup()]
    found = min((value for value in free if value is not None), default=None)
    return found and found // processes


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup() -> int | None:
    """What the control group (version 2) leaves; None where it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        return max(limit - int((folder / "memory.current").read_text()), 0)
    except (OSError, ValueError):
        return None


def group_size(
    run: Run, form: str, devices: int, available: int | None, shares: int = 1
) -> tuple[int, int]:
    """Returns how many runs are trained together, at least one a device, and the bytes of one.

    Args:
      run: any of the runs.
      form: under `map` one run of a device is in a step at a time, so that its activations count
        once a device.
      devices: over how many the runs are split; each holds the data set (on a CPU too).
      available: bytes in all, None for no limit.
      shares: devices that share a run's batches; they hold its state each.
    """
    state, activations = STATES * state_bytes(run), activation_bytes(run)
    order = 4 * (len(run.training) + 3 * run.steps_per_epoch)
    one = shares * (state + order) + (activations if form == "vmap" else 0)
    if available is None:
        return 2**31 - 1, one
    split = run.dataset.splits["train"]
    data = devices * shares * math.prod(split.images.shape)
    rest = SHARE * available - data - (activations * devices if form == "map" else 0)
    fitting = int(max(rest, 0) // one)
    return max(fitting - fitting % devices, devices), one
