"""Many runs as one program: the steps of a single run over a leading replica axis.

A replica is a whole run: its own state, order of images, record and, in a sweep, numbers of the
recipe. Every array of its own has the replica axis in front, [R, ...]; the data set is shared.
The axis is split over devices, and within a device it takes one of two forms:

- `map`: one replica after another, its steps innermost. Each is then computed exactly as a single
  run is. The choice on a CPU, where the devices are what runs at the same time.
- `vmap`: all replicas in every step, as batched matrix products. The choice on GPU and TPU.

A replica whose loss is not finite has taken its last step: its state changes no more, and no other
replica sees anything of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cifar_jax import parallel
from cifar_jax.errors import UserError, nearest

AXIS = "replica"
FORMS = ("auto", "map", "vmap")


def check_form(asked: str) -> None:
    """Raises `UserError` where `asked` is not one of `FORMS`."""
    if asked not in FORMS:
        raise UserError(f"unknown --replica-form {asked!r}; {nearest(asked, FORMS)}")


def choose_form(asked: str = "auto") -> str:
    """Returns `map` or `vmap`: what was asked for, or the backend's own.

    Raises:
      UserError: not one of `FORMS`.
    """
    check_form(asked)
    if asked != "auto":
        return asked
    return "map" if jax.default_backend() == "cpu" else "vmap"


def choose_lowering(form: str, asked: str) -> str:
    """Returns how convolutions are computed: under `vmap` as matrix products, which become batched
    ones; a convolution over kernels of many replicas would become a grouped one, which is slow on
    every backend. What was asked for by name stays."""
    return "gemm" if form == "vmap" and asked == "auto" else asked


def replica_mesh(asked: str, replicas: int) -> Mesh:
    """Returns the devices over which replicas are split: all local ones, or as many as `asked`
    says (`auto`, `all` or a number), but never more than there are replicas.

    Raises:
      UserError: more devices than there are.
    """
    devices = parallel.choose_devices("all" if asked == "auto" else asked, 1, 0)
    chosen = jax.local_devices()[: min(devices, replicas)]
    return jax.make_mesh((len(chosen),), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def stack(trees: list) -> Any:
    """Returns one tree of arrays [R, ...] of R trees of arrays [...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split_evenly(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays [R, ...] on the mesh, split along the replica axis; where R does not divide,
    the first replica is repeated at the end."""

    def pad(x):
        missing = -x.shape[0] % mesh.size
        if not missing:
            return x
        where = np.minimum(np.arange(x.shape[0] + missing), x.shape[0]) % x.shape[0]
        return x[where]

    return jax.device_put(jax.tree.map(pad, tree), NamedSharding(mesh, P(AXIS)))


def to_all(tree: Any, mesh: Mesh) -> Any:
    """Puts what the replicas share on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


@jax.jit
def pick(tree: Any, index: jax.Array) -> Any:
    """Returns replica `index`, an int32 scalar, of a tree of arrays [R, ...]."""
    return jax.tree.map(lambda x: x[index], tree)


@functools.partial(jax.jit, donate_argnums=2)
def keep(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Returns, replica by replica, `new` where `chosen`, bool [R], holds, else `old` (donated)."""
    return jax.vmap(lambda c, *trees: _where(c, *trees))(chosen, new, old)


@jax.jit
def all_finite(params: Any) -> jax.Array:
    """Returns bool [R]: whether every number of a replica's parameters is finite."""
    per_leaf = [
        jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in jax.tree.leaves(params)
    ]
    return jnp.stack(per_leaf).all(axis=0)


def _where(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def train_until_diverged(step: Callable, own, data, row, start, length):
    """`parallel.train_many` of one replica, ended early after a step whose loss is not finite.

    Args:
      own: (state, record, alive, order, numbers): `alive` is a bool scalar, False for a replica
        that takes no step; `numbers` are keyword arguments of `step`.

    Returns:
      state, record, alive.
    """
    state, record, alive, order, numbers = own
    step = functools.partial(step, **numbers)

    def body(carry):
        i, state, record, _ = carry
        state, record = parallel.recorded_step(step, state, record, data, order, row + i, start + i)
        return i + 1, state, record, jnp.isfinite(record["loss"][start + i])

    first = (jnp.zeros((), jnp.int32), state, record, alive)
    return lax.while_loop(lambda carry: (carry[0] < length) & carry[3], body, first)[1:]


def train_or_stand_still(step: Callable, own, data, row, start, length):
    """As `train_until_diverged`, with the same results, for `vmap`: the replicas take their steps
    together, and one that has diverged is left as it is."""
    state, record, alive, order, numbers = own
    step = functools.partial(step, **numbers)

    def body(i, carry):
        state, record, alive = carry
        new = parallel.recorded_step(step, state, record, data, order, row + i, start + i)
        state, record = _where(alive, new, (state, record))
        return state, record, alive & jnp.isfinite(record["loss"][start + i])

    return lax.fori_loop(0, length, body, (state, record, alive))


def over_replicas(function: Callable, form: str) -> Callable:
    """Returns function(own, *shared) over the leading axis of `own`, in the form asked for."""

    def call(own, *shared):
        one = functools.partial(_swapped, function, shared)
        return lax.map(one, own) if form == "map" else jax.vmap(one)(own)

    return call


def _swapped(function, shared, own):
    return function(own, *shared)


def _split(function: Callable, mesh: Mesh) -> Callable:
    """Splits `own`, the first argument, over the mesh; no device has anything to tell another."""

    def call(own, *shared):
        specs = (P(AXIS), *[P()] * len(shared))
        # Without the check of varying axes: nothing is summed over them.
        split = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False
        )
        return split(own, *shared)

    return call


def compile_training(
    step: Callable, form: str, mesh: Mesh, remat: bool = False, static_length: bool | None = None
) -> Callable:
    """Returns `run(own, data, row, start, length) -> (state, record, alive)`, jitted.

    Arguments as in `train_until_diverged`, but those of `own` have a replica axis that divides by
    the mesh (`split_evenly`), and its state and record are donated. Lengths as in
    `parallel.compile_training`.
    """
    if static_length is None:
        static_length = jax.default_backend() != "cpu"
    one = train_until_diverged if form == "map" else train_or_stand_still
    one = functools.partial(one, step)

    def run(changing, order, numbers, data, row, start, length):
        scalars = (row, start)
        if static_length:
            part = functools.partial(one, length=length)
        else:
            part, scalars = one, (row, start, length)
        split = _split(over_replicas(part, form), mesh)
        return split((*changing, order, numbers), data, *scalars)

    static = {"static_argnames": ("length",)} if static_length else {}
    options = parallel.compiler_options(remat)
    jitted = jax.jit(run, donate_argnums=0, compiler_options=options, **static)

    def call(own, data, row: int, start: int, length: int):
        length = int(length) if static_length else np.int32(length)
        return jitted(own[:3], *own[3:], data, np.int32(row), np.int32(start), length=length)

    call.jitted = jitted
    return call


def compile_evaluation(step: Callable, mesh: Mesh) -> Callable:
    """Returns `evaluate((variables, order), data) -> sums`, jitted: each replica's own variables
    over its own order [R, batches, batch]. A batch fills a device by itself, so replicas are
    evaluated one after another on every backend."""

    def one(own, data):
        variables, order = own
        return parallel.evaluate_many(step, variables, data, order)

    return _compiled(one, mesh)


def compile_prediction(step: Callable, mesh: Mesh) -> Callable:
    """Returns `predict(variables, images [batches, B, H, W, C]) -> [R, batches, B, classes]`."""
    return _compiled(functools.partial(parallel.predict_many, step), mesh)


def _compiled(one: Callable, mesh: Mesh) -> Callable:
    split = _split(over_replicas(one, "map"), mesh)
    return jax.jit(split, compiler_options=parallel.compiler_options())
