"""Many runs as one program: the steps of a single run over a leading replica axis.

A replica is a whole run: its own state, batch indices, step metrics and, in a sweep, `hparams` of
the step. Every array of its own has the replica axis in front, [R, ...]; the data set is shared.
The axis is split over devices, and within a device it takes one of two forms:

- `map`: one replica after another, its steps innermost: the arithmetic of a single run, but for
  last bits where XLA fuses otherwise. The choice on a CPU, where devices are what runs at once.
- `vmap`: all replicas in every step, as batched matrix products. The choice on GPU and TPU.

Where there are more devices than replicas, several share each replica's batches, as in
`parallel/programs.py`: the mesh has the two axes `AXIS`, over replicas, and `parallel.AXIS`, over a
batch.

A replica whose loss is not finite has taken its last step: its state changes no more, and no other
replica sees anything of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cifar_jax.models import find, takes
from cifar_jax.parallel import hardware, programs
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.training import checks, setup
from cifar_jax.training.setup import Run

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


def choose_lowering(form: str, asked: str, model: str | None = None) -> str:
    """Returns how convolutions are computed: under `vmap` as matrix products, which become batched
    ones; a convolution over kernels of many replicas would become a grouped one, which is slow on
    every backend. What was asked for by name stays, and `auto` where the model takes none."""
    chooses = model is None or takes(find(model), "lowering")
    return "gemm" if form == "vmap" and asked == "auto" and chooses else asked


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
    return Mesh(chosen, (AXIS, hardware.AXIS), axis_types=(AxisType.Auto,) * 2)


def describe_mesh(mesh: Mesh) -> str:
    """Returns e.g. `on 4 devices, 2 to share each batch`."""
    text = f"on {mesh.size} device{'s' if mesh.size > 1 else ''}"
    shared = programs.sharing_a_batch(mesh)
    return f"{text}, {shared} to share each batch" if shared > 1 else text


def stack(trees: list) -> Any:
    """Returns one tree of arrays [R, ...] of R trees of arrays [...]."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(trees))
    return jax.tree.map(lambda *leaves: (np if on_host else jnp).stack(leaves), *trees)


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


@jax.jit
def pick(tree: Any, index: jax.Array) -> Any:
    """Returns replica `index`, an int32 scalar, of a tree of arrays [R, ...]."""
    return jax.tree.map(lambda x: x[index], tree)


@functools.partial(jax.jit, donate_argnums=2)
def keep(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Returns, replica by replica, `new` where `chosen`, bool [R], holds, else `old` (donated)."""
    return jax.vmap(_where)(chosen, new, old)


# bool [R]: whether every number of a replica's parameters is finite.
all_finite = jax.jit(jax.vmap(checks.all_finite))


def _where(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def train_until_diverged(
    step: Callable, changing, hparams, examples, batch_indices, row, start, length
):
    """`programs.train_many` of one replica, ended early after a step whose loss is not finite.

    Args:
      changing: (state, step metrics, alive): `alive` is a bool scalar, False for a replica that
        takes no step.

    Returns:
      changing.
    """
    step = functools.partial(step, **hparams)

    def body(carry):
        i, (state, metrics, _) = carry
        batch = batch_indices[row + i]
        state, metrics, (loss, *_) = programs.measured_step(
            step, state, metrics, examples, batch, start + i
        )
        return i + 1, (state, metrics, jnp.isfinite(loss))

    def goes_on(carry):
        i, (_, _, alive) = carry
        return (i < length) & alive

    state, step_metrics, alive = changing
    first = (jnp.zeros((), jnp.int32), (state, programs.packed(step_metrics), alive))
    state, metrics, alive = lax.while_loop(goes_on, body, first)[1]
    return state, programs.unpacked(metrics), alive


def train_or_stand_still(
    step: Callable, changing, hparams, examples, batch_indices, row, start, length
):
    """As `train_until_diverged`, with the same results, for `vmap`: the replicas take their steps
    together, and one that has diverged is left as it is."""
    step = functools.partial(step, **hparams)

    def body(i, carry):
        state, metrics, alive = carry
        batch = batch_indices[row + i]
        *new, (loss, *_) = programs.measured_step(step, state, metrics, examples, batch, start + i)
        state, metrics = _where(alive, tuple(new), (state, metrics))
        return state, metrics, alive & jnp.isfinite(loss)

    state, step_metrics, alive = changing
    first = (state, programs.packed(step_metrics), alive)
    state, metrics, alive = lax.fori_loop(0, length, body, first)
    return state, programs.unpacked(metrics), alive


def train_replicas(
    form: str, step, changing, hparams, examples, batch_indices, row, start, length
) -> tuple:
    """Every replica's chunk, in the form asked for."""
    train = {"map": train_until_diverged, "vmap": train_or_stand_still}[form]

    def one(own):
        changing, hparams, batch_indices = own
        return train(step, changing, hparams, examples, batch_indices, row, start, length)

    own = (changing, hparams, batch_indices)
    return lax.map(one, own) if form == "map" else jax.vmap(one)(own)


def evaluate_in_turn(step: Callable, variables, examples, batch_indices):
    """`programs.evaluate_many` of one replica after another: a batch fills a device by itself."""
    return lax.map(
        lambda own: programs.evaluate_many(step, own[0], examples, own[1]),
        (variables, batch_indices),
    )


def compile_training(
    step: Callable, form: str, mesh: Mesh, remat: bool = False, static_length: bool | None = None
) -> Callable:
    """Returns `programs.compile_training`'s program with a replica axis that divides by the mesh
    (`split_evenly`) in front of the batch indices, `hparams` and `changing`: (state, step metrics,
    alive), as in `train_until_diverged`."""
    train = functools.partial(train_replicas, form)
    return programs.compile_training(step, static_length, mesh, remat, train=train, own=P(AXIS))


def compile_evaluation(step: Callable, mesh: Mesh) -> Callable:
    """Returns `programs.compile_evaluation`'s program of each replica's own variables over its own
    batch indices [R, batches, B]."""
    return programs.compile_evaluation(step, mesh, evaluate=evaluate_in_turn, own=P(AXIS))


def compile_prediction(step: Callable, mesh: Mesh) -> Callable:
    """Returns `predict(variables, images [batches, B, H, W, C]) -> [R, batches, B, classes]`."""

    def predict(variables, images):
        return lax.map(lambda own: programs.predict_many(step, own, images), variables)

    split = programs.over_devices(predict, mesh, (P(AXIS), P()), P(AXIS))
    return jax.jit(split, compiler_options=programs.compiler_options())


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of groups of one recipe, for any number of replicas."""

    form: str
    mesh: Mesh
    train: Callable
    evaluate: Callable
    predict: Callable


def make_programs(run: Run, form: str, mesh: Mesh, step: Callable | None = None) -> Programs:
    """Builds the programs; nothing is compiled yet.

    Args:
      run: any of the runs.
      form: `map` or `vmap` (`choose_form`).
      step: `step(state, batch, **hparams)`; by default the recipe's, without hparams.
    """
    recipe = run.config.recipe
    step = step or setup.step_of(recipe, run.model, run.steps_per_epoch)
    evaluate, predict = setup.inference_steps(recipe, run.model)
    return Programs(
        form=form,
        mesh=mesh,
        train=compile_training(step, form, mesh, recipe.remat),
        evaluate=compile_evaluation(evaluate, mesh),
        predict=compile_prediction(predict, mesh),
    )
