"""Compiles this project's programs for a GPU that is not there, and counts what they launch.

    python -m benchmarks.gpu_compile                        the table of README.md
    python -m benchmarks.gpu_compile --cases tutorial:4,eval/dropout:512,vmap-64/tutorial:4
    python -m benchmarks.gpu_compile --show FILE            the table of a result file again

It needs the CUDA plugin (`pip install .[cuda12]` or `.[cuda13]`) and no GPU. XLA compiles for the
H100 that `h100.txtpb` describes, without measuring kernels against one another: what runs there
may be other kernels, but their number, the layouts and what a CUDA graph holds are the same.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from cifar_jax.runtime.errors import UserError, run_command

CASES = "tutorial:4,adam:128,dropout:20,deep:16,vmap-64/tutorial:4,vmap-64/dropout:20"
TARGET = Path(__file__).with_name("h100.txtpb")
PLAIN = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")


def topology():
    """Returns the absent H100's only device.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"the CUDA plugin is needed: pip install '.[cuda13]' ({error})") from None
    jax.default_backend()  # the CPU's, before the name changes: what is compiled is for the GPU
    jax.default_backend = lambda: "gpu"
    return described.devices[0]


def split_of(count: int):
    """Returns so many images without memory for them: one, repeated."""
    import numpy as np

    from cifar_jax.datasets import Split

    images = np.broadcast_to(np.uint8(0), (count, 32, 32, 3))
    return Split(images, np.broadcast_to(np.int32(0), (count,)))


def lower(text: str, device, precision: str, length: int):
    """Returns the lowered program that `cifar_jax.train` runs for a case: a chunk of `length`
    steps (0: its own length), or an evaluation of the test images; and its steps."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, SingleDeviceSharding

    from benchmarks.cases import parse
    from cifar_jax.datasets import Dataset
    from cifar_jax.parallel import programs
    from cifar_jax.parallel.placement import Examples
    from cifar_jax.replicas import programs as replica_programs
    from cifar_jax.runtime.timing import Clock
    from cifar_jax.training import setup
    from cifar_jax.training.workdir import Config, describe_data

    where = SingleDeviceSharding(device)

    def shape(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=where)

    def shapes(tree, *lead):
        return jax.tree.map(lambda x: shape(*lead, *x.shape, dtype=x.dtype), tree)

    form, _, replicas = text.partition("/")[0].partition("-")
    case = parse(text.partition("/")[2] if replicas else text)
    splits = {"train": split_of(50_000), "test": split_of(10_000)}
    dataset = Dataset("cifar10", "3.0.2", "", tuple("abcdefghij"), "", splits)
    lowering = replica_programs.choose_lowering(form, "auto") if replicas else "auto"
    config = Config(case.recipe, case.settings(precision), 0, describe_data(dataset))
    run = setup.make_run(config, dataset, setup.Options(lowering=lowering, devices="1"), Clock())
    images = 50_000 if case.kind == "train" else 10_000
    examples = Examples(
        shape(images, 32, 32, 3, dtype=jnp.uint8), shape(images, dtype=jnp.int32)
    )
    if case.kind == "eval":
        batches = shape(images // case.batch_size, case.batch_size, dtype=jnp.int32)
        variables = {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}
        return run.evaluate.jitted.lower(shapes(variables), examples, batches), batches.shape[0]
    rows = images // case.batch_size
    length = length or programs.Chunks(rows).next(rows)
    lead = (int(replicas),) if replicas else ()
    changing = (run.shapes, jax.eval_shape(lambda: programs.empty_metrics(rows)))
    changing = shapes(changing, *lead)
    batches = shape(*lead, rows, case.batch_size, dtype=jnp.int32)
    train = run.train_many
    if replicas:
        mesh = Mesh([[device]], (replica_programs.AXIS, "data"))
        changing = (*changing, shape(*lead, dtype=jnp.bool_))
        train = replica_programs.make_programs(run, form, mesh).train
    place = shape(dtype=jnp.int32)
    return train.jitted.lower(changing, {}, examples, batches, place, place, length=length), length
