"""Sums over devices: the numbers of `lax.psum`, in few arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from cifar_jax.ops.all_reduce import TOGETHER, sum_over
from cifar_jax.parallel import hardware

AXIS = hardware.AXIS


def tree_of(seed: int) -> dict:
    """Arrays of several sizes and types, a scalar and an empty one among them."""
    rng = np.random.default_rng(seed)
    shapes = {"scalar": (), "bias": (7,), "kernel": (5, 5, 3, 6), "large": (TOGETHER + 1,)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    counts = rng.integers(0, 9, (3, 3)).astype(np.int32)
    return {**tree, "empty": np.zeros((0, 4), np.float32), "counts": counts, "more": counts[0]}


def summed(function, trees):
    mesh = hardware.mesh_over(jax.local_devices()[: len(trees)])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def each(tree):
        return function(jax.tree.map(lambda x: x[0], tree), AXIS)

    return jax.jit(jax.shard_map(each, mesh=mesh, in_specs=P(AXIS), out_specs=P()))(stacked)


def test_sums_are_those_of_psum_whatever_travels_together():
    trees = [tree_of(seed) for seed in range(3)]
    found = summed(sum_over, trees)
    *_, empty = [tree.pop("empty") for tree in trees]  # psum of it crashes XLA 0.11
    expected = {**summed(lax.psum, trees), "empty": empty}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    np.testing.assert_allclose(found["kernel"], sum(t["kernel"] for t in trees), rtol=1e-5)


def test_small_arrays_are_one_operand_of_the_all_reduce():
    def operands(function):
        program = jax.jit(
            jax.shard_map(
                lambda tree: function(tree, AXIS),
                mesh=hardware.mesh_over(jax.local_devices()[:2]),
                in_specs=P(AXIS),
                out_specs=P(),
            )
        )
        arrays = [jnp.ones((2, size)) for size in (3, 4, 5, 6, TOGETHER)]
        return len(re.findall(r"stablehlo\.all_reduce", program.lower(arrays).as_text()))

    assert operands(lax.psum) == 5
    assert operands(sum_over) == 1
