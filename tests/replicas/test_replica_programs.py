"""Steps over a replica axis: the two forms, their programs, and the memory they are sized by."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tiny_data import Small

from cifar_jax import input_pipeline
from cifar_jax.models.layers import Dense, Dropout, Flatten
from cifar_jax.parallel import placement, programs
from cifar_jax.parallel.placement import Examples
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import programs as replica_programs
from cifar_jax.replicas import scheduler
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.timing import Clock, compile_seconds
from cifar_jax.steps import create_state, eval_step, train_step
from cifar_jax.training import setup

pytestmark = pytest.mark.extended

STEPS, BATCH = 4, 4


class TwoLayers(nn.Module):
    """Dense, dropout, dense: [N, 32, 32, 3] -> [N, 10]."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(Dense(16, name="fc1")(Flatten()(x)))
        return Dense(10, name="fc2")(Dropout(0.5, name="dropout")(x, train))


RECIPE = RECIPES["tutorial"].replace(batch_size=BATCH)
SEEDS = (0, 1, 2)


def step_of(lowering="gemm"):
    return setup.step_of(RECIPE, Small(10, lowering), STEPS)


@functools.cache
def draw():
    create = setup.state_maker(RECIPE, Small(), STEPS, (32, 32, 3))
    return programs.compile_for_one_call(create)


@functools.cache
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 32, 32, 3), np.uint8)
    return Examples(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))


def start(seed):
    """The state and the order of the single run of a seed."""
    keys = input_pipeline.run_keys(seed)
    positions = np.arange(STEPS * BATCH, dtype=np.int32)
    return draw()(keys["state"]), input_pipeline.epoch_order(keys["order"], 1, positions, BATCH)


@functools.cache
def alone():
    """(params, record) of each seed's single run."""
    single, runs = programs.compile_training(step_of()), []
    for seed in SEEDS:
        state, order = start(seed)
        changing = (state, programs.empty_metrics(STEPS))
        state, record = single(changing, data(), order, 0, 0, STEPS)
        runs.append(jax.device_get((state.params, record)))
    return runs


def own(mesh, spoil=None):
    """What the replicas start from, the weights of replica `spoil` not finite; batch indices."""
    states, orders = map(list, zip(*map(start, SEEDS), strict=True))
    if spoil is not None:
        bad = jax.tree.map(lambda x: x * np.float32(1e25), states[spoil].params)
        states[spoil] = states[spoil].replace(params=bad)
    metrics = programs.empty_metrics(len(SEEDS), STEPS)
    changing = (replica_programs.stack(states), metrics, np.ones(len(SEEDS), bool))
    return replica_programs.split_evenly((changing, np.stack(orders)), mesh)


@functools.cache
def program(form):
    """`vmap` as on a GPU, where a length is a program; `map` as on a CPU, where it is not."""
    mesh = replica_programs.replica_mesh("2", len(SEEDS))
    return mesh, replica_programs.compile_training(
        step_of(), form, mesh, static_length=form == "vmap"
    )


@functools.cache
def trained(form, spoil=None):
    """(state, record, alive) on the host after two chunks."""
    Clock()  # from here on compilation is counted
    mesh, run = program(form)
    changing, orders = own(mesh, spoil)
    shared = placement.replicate(data(), mesh)
    first = 2 if form == "vmap" else 3
    changing = run(changing, shared, orders, 0, 0, first)
    compiled = compile_seconds()
    changing = run(changing, shared, orders, first, first, STEPS - first)
    assert compile_seconds() == compiled, "any length runs the same program on a CPU"
    state, record, alive = changing
    assert jax.tree.leaves(state)[0].shape[0] == 4, "three replicas on two devices"
    return jax.device_get((state.params, record, alive, state.step))


@pytest.mark.parametrize("form", ["map", "vmap"])
def test_a_replica_is_the_single_run(form):
    params, record, alive, steps_done = trained(form)
    assert alive.all()
    assert steps_done.tolist() == [STEPS] * 4
    got = jax.tree.leaves((params, record))
    exact = {"rtol": 1e-5, "atol": 1e-7} if form == "map" else {"rtol": 1e-4, "atol": 1e-6}
    for i, want in enumerate(alone()):
        for mine, single in zip(got, jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(mine[i], single, **exact)


@pytest.mark.parametrize("form", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_devices_along_both_axes_of_the_mesh(form):
    """Six devices: each of three replicas has its batches of 5, with dropout, shared by two."""
    model, batch = TwoLayers(), 5
    step = functools.partial(train_step, model=model, optimizer=optax.sgd(0.1, momentum=0.9))
    create = functools.partial(create_state, model, optax.sgd(0.1, momentum=0.9))
    states = [jit(create)(jax.random.key(seed)) for seed in SEEDS]
    positions = np.arange(STEPS * BATCH, dtype=np.int32)  # 16: the last batch holds one image
    orders = [
        input_pipeline.epoch_order(jax.random.key(9 + seed), 1, positions, batch) for seed in SEEDS
    ]
    mesh = replica_programs.replica_mesh("6", len(SEEDS))
    assert dict(mesh.shape) == {"replica": 3, "data": 2}
    assert replica_programs.describe_mesh(mesh) == "on 6 devices, 2 to share each batch"
    metrics = programs.empty_metrics(len(SEEDS), len(orders[0]))
    changing = (replica_programs.stack(states), metrics, np.ones(3, bool))
    changing, order = replica_programs.split_evenly((changing, np.stack(orders)), mesh)
    run = replica_programs.compile_training(step, form, mesh, static_length=form == "vmap")
    shared = placement.replicate(data(), mesh)
    state, record, alive = run(changing, shared, order, 0, 0, len(orders[0]))
    assert alive.all()
    evaluate = replica_programs.compile_evaluation(functools.partial(eval_step, model=model), mesh)
    sums = evaluate({"params": state.params}, shared, order)
    assert sums["count"].tolist() == [16] * 3, "padding counts nowhere"
    single = programs.compile_training(step)
    for i, seed in enumerate(SEEDS):
        start = jit(create)(jax.random.key(seed))
        changing = (start, programs.empty_metrics(len(orders[0])))
        want, rows = single(changing, data(), orders[i], 0, 0, len(orders[0]))
        got = jax.tree.map(lambda x, i=i: x[i], (state.params, record))
        for mine, theirs in zip(
            jax.tree.leaves(got), jax.tree.leaves((want.params, rows)), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_what_shares_a_batch_where_devices_are_left(monkeypatch):
    shapes = [
        replica_programs.replica_mesh("all", count).devices.shape for count in (1, 2, 3, 8, 100)
    ]
    assert shapes == [(1, 8), (2, 4), (3, 2), (8, 1), (8, 1)]
    # By itself no more than one run of that size takes: batches of 4 stay on one device.
    auto = functools.partial(replica_programs.replica_mesh, "auto", 2)
    assert [auto(size, 1000).devices.shape for size in (4, 20, 128)] == [(2, 1), (2, 2), (2, 4)]


@pytest.mark.parametrize("form", ["map", "vmap"])
def test_a_replica_that_diverges_stops_where_it_is_and_disturbs_no_other(form):
    params, record, alive, steps_done = trained(form, spoil=1)
    clean_params, clean_record, _, _ = trained(form)
    assert alive[:3].tolist() == [True, False, True]
    assert steps_done[:3].tolist() == [STEPS, 1, STEPS], "one bad step, then none"
    assert not np.isfinite(record["loss"][1, 0])
    assert record["count"][1, 1:].tolist() == [0] * (STEPS - 1)
    for got, want in zip(
        jax.tree.leaves((params, record)),
        jax.tree.leaves((clean_params, clean_record)),
        strict=True,
    ):
        np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])


def lowered(form, asked):
    mesh = replica_programs.replica_mesh("1", len(SEEDS))
    step = step_of(replica_programs.choose_lowering(form, asked))
    run = replica_programs.compile_training(step, form, mesh)
    changing, orders = own(mesh)
    args = (changing, {}, placement.replicate(data(), mesh), orders, np.int32(0), np.int32(0))
    return run.jitted.lower(*args, length=np.int32(1)).as_text()


def test_vmapped_convolutions_are_no_grouped_ones():
    assert "feature_group_count = 3" in lowered("vmap", "lax"), "what vmap makes of a convolution"
    text = lowered("vmap", "auto")
    assert "stablehlo.convolution" not in text
    assert "dot_general" in text


def test_forms_and_devices_are_chosen_in_one_place(monkeypatch):
    assert replica_programs.choose_form() == "map"
    assert replica_programs.choose_form("vmap") == "vmap"
    assert replica_programs.choose_lowering("map", "auto") == "auto"
    assert replica_programs.choose_lowering("vmap", "winograd") == "winograd"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert replica_programs.choose_form() == "vmap"
    assert replica_programs.choose_form("map") == "map"
    monkeypatch.undo()
    assert replica_programs.replica_mesh("auto", 3).size == 3
    assert replica_programs.replica_mesh("all", 100).size == 8
    with pytest.raises(UserError, match="did you mean 'vmap'"):
        replica_programs.choose_form("vmapp")


def test_replicas_are_kept_and_picked_one_by_one():
    old = {"w": jnp.zeros((3, 2)), "key": jax.random.split(jax.random.key(0), 3)}
    new = {"w": jnp.ones((3, 2)), "key": jax.random.split(jax.random.key(1), 3)}
    keys = [np.asarray(jax.random.key_data(tree["key"])) for tree in (old, new)]
    found = replica_programs.keep(np.array([False, True, False]), new, old)
    assert found["w"][:, 0].tolist() == [0, 1, 0]
    wanted = np.stack([keys[0][0], keys[1][1], keys[0][2]])
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), wanted)
    assert replica_programs.pick(found, np.int32(1))["w"].tolist() == [1, 1]
    bad = {"a": jnp.array([[1.0], [jnp.inf], [0.0]]), "b": jnp.array([1.0, 1.0, jnp.nan])}
    assert replica_programs.all_finite(bad).tolist() == [True, False, False]


def test_groups_are_as_large_as_memory_allows(monkeypatch):
    split = SimpleNamespace(images=np.zeros((1000, 32, 32, 3), np.uint8))
    run = SimpleNamespace(
        shapes={"w": jax.ShapeDtypeStruct((250_000,), np.float32)},
        training=np.zeros(1000, np.int32),
        steps_per_epoch=10,
        dataset=SimpleNamespace(splits={"train": split}),
    )
    monkeypatch.setattr(scheduler, "activation_bytes", lambda run: 10_000_000)
    images, one = 1000 * 3072, 4 * 1_000_000 + 4 * 1030
    # Under `map` a device holds one run's activations, under `vmap` every run its own.
    free = (2 * images + 2 * 10_000_000 + 5.5 * one) / 0.7
    assert scheduler.group_size(run, "map", 2, int(free)) == (4, one)
    free = (2 * images + 7.5 * (one + 10_000_000)) / 0.7
    assert scheduler.group_size(run, "vmap", 2, int(free)) == (6, one + 10_000_000)
    assert scheduler.group_size(run, "map", 2, 0) == (2, one), "a run a device at least"
    assert scheduler.group_size(run, "map", 2, None)[0] > 10**6
    assert scheduler.available_bytes() > 10**6
