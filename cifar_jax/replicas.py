"""Many runs as one program: the steps of a single run over a leading replica axis.

A replica is a whole run: its own state, order of images, record and, in a sweep, numbers of the
recipe. Every array of its own has the replica axis in front, [R, ...]; the data set is shared.
The axis is split over devices, and within a device it takes one of two forms:

- `map`: one replica after another, its steps innermost: the arithmetic of a single run, but for
  last bits where XLA fuses otherwise. The choice on a CPU, where devices are what runs at once.
- `vmap`: all replicas in every step, as batched matrix products. The choice on GPU and TPU.

Where there are more devices than replicas, several share each replica's batches, as in
`parallel.py`: the mesh has the two axes `AXIS`, over replicas, and `parallel.AXIS`, over a batch.

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

from cifar_jax import hardware, parallel
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


def replica_mesh(asked: str, replicas: int, batch_size: int = 1, weights: int = 0) -> Mesh:
    """Returns the devices the replicas are split over, and those that share a replica's batches.

    Args:
      asked: `all` local devices, a number of them, or `auto`: all, but no more to share a batch
        than `hardware.choose_devices` gives one run.
      replicas: how many; each device along their axis gets at least one.
      batch_size, weights: of a replica, for `auto`.

    Returns:
      A mesh [devices over replicas, devices over a batch]. Devices that are left over where the
      first does not divide them stay idle.

    Raises:
      UserError: more devices than there are.
    """
    devices = hardware.choose_devices("all" if asked == "auto" else asked, 1, 0)
    rows = min(devices, replicas)
    columns = devices // rows
    if asked == "auto":
        columns = min(columns, hardware.choose_devices("auto", batch_size, weights))
    chosen = np.array(jax.local_devices()[: rows * columns]).reshape(rows, columns)
    return Mesh(chosen, (AXIS, parallel.AXIS), axis_types=(AxisType.Auto,) * 2)


def sharing_a_batch(mesh: Mesh) -> int:
    """Returns over how many devices a replica's batches are split."""
    return mesh.shape[parallel.AXIS]


def describe_mesh(mesh: Mesh) -> str:
    """Returns e.g. `on 4 devices, 2 to share each batch`."""
    text = f"on {mesh.size} device{'s' if mesh.size > 1 else ''}"
    shared = sharing_a_batch(mesh)
    return f"{text}, {shared} to share each batch" if shared > 1 else text


def stack(trees: list) -> Any:
    """Returns one tree of arrays [R, ...] of R trees of arrays [...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def split_evenly(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays [R, ...] on the mesh, split along the replica axis; where R does not divide,
    the first replica is repeated at the end."""

    def pad(x):
        missing = -x.shape[0] % mesh.shape[AXIS]
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


_ORDER = P(AXIS, None, parallel.AXIS)  # [R, batches, batch]


def _split(function: Callable, mesh: Mesh, own: Any) -> Callable:
    """Splits the first argument, as the specs `own` say, over the mesh."""

    def call(first, *shared):
        specs = (own, *[P()] * len(shared))
        # Without the check of varying axes: nothing is summed over replicas, and what a step sums
        # over its batch's devices is equal on all of them.
        split = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False
        )
        return split(first, *shared)

    return call


def compile_training(
    step: Callable, form: str, mesh: Mesh, remat: bool = False, static_length: bool | None = None
) -> Callable:
    """Returns `run(own, data, row, start, length) -> (state, record, alive)`, jitted.

    Arguments as in `train_until_diverged`, but those of `own` have a replica axis that divides by
    the mesh (`split_evenly`), and its state and record are donated. Lengths as in
    `parallel.compile_training`. `step` takes `axis_name` where devices share a batch.
    """
    if static_length is None:
        static_length = jax.default_backend() != "cpu"
    one = train_until_diverged if form == "map" else train_or_stand_still
    if sharing_a_batch(mesh) > 1:
        step = functools.partial(step, axis_name=parallel.AXIS)
    one = functools.partial(one, step)
    own = (P(AXIS), P(AXIS), P(AXIS), _ORDER, P(AXIS))

    def run(changing, order, numbers, data, row, start, length):
        scalars = (row, start)
        if static_length:
            part = functools.partial(one, length=length)
        else:
            part, scalars = one, (row, start, length)
        split = _split(over_replicas(part, form), mesh, own)
        order = parallel.pad_to_divide(order, sharing_a_batch(mesh), -1, axis=2)
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
        sums = parallel.evaluate_many(step, variables, data, order)
        return lax.psum(sums, parallel.AXIS) if sharing_a_batch(mesh) > 1 else sums

    split = _split(over_replicas(one, "map"), mesh, (P(AXIS), _ORDER))

    def run(own, data):
        variables, order = own
        return split(
            (variables, parallel.pad_to_divide(order, sharing_a_batch(mesh), -1, axis=2)), data
        )

    return jax.jit(run, compiler_options=parallel.compiler_options())


def compile_prediction(step: Callable, mesh: Mesh) -> Callable:
    """Returns `predict(variables, images [batches, B, H, W, C]) -> [R, batches, B, classes]`."""
    one = functools.partial(parallel.predict_many, step)
    split = _split(over_replicas(one, "map"), mesh, P(AXIS))
    return jax.jit(split, compiler_options=parallel.compiler_options())
