"""States for the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cifar_jax.checkpoints.save_restore import Checkpoints


def make_state(step):
    """A state of every kind of leaf, each of which follows from `step`."""
    values = np.random.default_rng(step).standard_normal((5, 64), np.float32)
    params = {
        "conv1": {"kernel": jnp.asarray(values), "bias": None},
        "fc": {"kernel": jnp.asarray(values[:3, :2], jnp.bfloat16), "bias": jnp.zeros((0,))},
    }
    return {
        "params": params,
        "opt_state": optax.adam(1e-3).init(params),
        "step": jnp.int32(step),
        "key": jax.random.fold_in(jax.random.key(7), step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "flags": np.array([True, step % 2 == 0]),
        "total": np.float64(step / 3),
        "epoch": step,
    }


def host(leaf):
    if jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert type(a) is type(b), path
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), path
        np.testing.assert_array_equal(host(a), host(b), strict=True, err_msg=str(path))


def fill(directory, *steps, **options):
    with Checkpoints(directory, **options) as c:
        for step in steps:
            c.save(step, make_state(step), {"epoch": step}, metric=1 / (1 + step))
