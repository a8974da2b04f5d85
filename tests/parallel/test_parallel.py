"""One step, many ways to run it: pmap, shard_map, shardings, vmap, chunks of a scan."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import jit

from cifar_jax import input_pipeline
from cifar_jax.models.layers import ConvRelu, Dense, Dropout, Flatten
from cifar_jax.parallel import placement, programs
from cifar_jax.parallel.data_parallel import (
    pmap_eval_step,
    pmap_train_step,
    shard_map_eval_step,
    shard_map_train_step,
)
from cifar_jax.steps import create_state, eval_step, make_preprocess, predict_step, train_step

pytestmark = pytest.mark.extended

BATCH, STEPS = 8, 2
DEVICES = [2, pytest.param(4, marks=pytest.mark.slow)]
SHAPE = (8, 8, 3)


class Network(nn.Module):
    """dropout_cnn in small, with a convolution of either CPU form: [N, 8, 8, 3] -> [N, 10]."""

    lowering: str = "auto"

    @nn.compact
    def __call__(self, x, train=False):
        x = ConvRelu(16, 3, padding=1, pool=True, lowering=self.lowering, name="conv1")(x)
        x = ConvRelu(8, 3, padding=1, pool=True, lowering=self.lowering, name="conv2")(x)
        x = Dropout(0.25, name="dropout1")(Flatten(name="flatten")(x), train)
        x = nn.relu(Dense(16, name="fc1")(x))
        return Dense(10, name="fc2")(Dropout(0.25, name="dropout2")(x, train))


MODEL = Network()
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
OPTIONS = {
    "model": MODEL,
    "optimizer": OPTIMIZER,
    "preprocess": make_preprocess("half", ("flip", "translate")),
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
}


def batch_of(seed):
    """Three of the eight rows are padding, all of them on the last devices."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (BATCH, *SHAPE), np.uint8),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
        "mask": np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32),
    }


@jit
def start(seed=0):
    return create_state(MODEL, OPTIMIZER, jax.random.key(seed), image_shape=SHAPE, ema=True)


@functools.cache
def one_device():
    """The state and the sums of each step, on one device."""
    step = jit(functools.partial(train_step, **OPTIONS))
    return run(step)


def run(step, prepare=lambda batch: batch, first=lambda x: x):
    state, sums = start(), []
    for i in range(STEPS):
        state, step_sums = step(state, prepare(batch_of(i)))
        sums.append(jax.device_get(first(step_sums)))
    return state, sums


def assert_same_run(state, sums):
    want, want_sums = one_device()
    for got_step, want_step in zip(sums, want_sums, strict=True):
        assert got_step.keys() == want_step.keys()
        for name in want_step:
            np.testing.assert_allclose(got_step[name], want_step[name], rtol=1e-5, err_msg=name)
    for part in ("params", "ema_params", "opt_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
            jax.device_get(getattr(state, part)),
            jax.device_get(getattr(want, part)),
        )
    assert int(state.step) == STEPS


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def test_the_reference_moves():
    state, sums = one_device()
    assert sums[0]["count"] == 5
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start().params)
    # Far above the tolerance, so that a doubled gradient or another dropout mask is seen.
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(("devices", "check"), [(2, False), (4, True)])
def test_shard_map_equals_one_device(devices, check):
    step = jit(
        jax.shard_map(
            functools.partial(train_step, axis_name="data", **OPTIONS),
            mesh=mesh_of(devices),
            in_specs=(P(), P("data")),
            out_specs=(P(), P()),
            check_vma=check,
        )
    )
    assert_same_run(*run(step))


WAYS = {
    "pmap": (pmap_train_step, pmap_eval_step),
    "shard_map": (shard_map_train_step, shard_map_eval_step),
}


@pytest.mark.parametrize(
    ("way", "devices"),
    [("pmap", 2), ("shard_map", 3), pytest.param("pmap", 3, marks=pytest.mark.slow)],
)
def test_a_ready_made_step_equals_one_device(way, devices):
    """Also where eight rows do not divide among three devices."""
    state, sums = run(WAYS[way][0](devices=jax.devices()[:devices], **OPTIONS))
    for leaf in jax.tree.leaves(state.params):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)
    assert_same_run(state, sums)


@pytest.mark.parametrize("devices", DEVICES)
def test_jit_with_shardings_equals_one_device(devices):
    mesh = mesh_of(devices)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jit(
        functools.partial(train_step, **OPTIONS),
        in_shardings=(whole, split),
        out_shardings=(whole, whole),
    )
    assert_same_run(*run(step, prepare=lambda batch: jax.device_put(batch, split)))


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_over_devices_counts_each_image_once(way):
    variables, batch = {"params": start().params}, batch_of(0)
    want = jit(functools.partial(eval_step, model=MODEL))(variables, batch)
    evaluate = WAYS[way][1](devices=jax.devices()[:3], model=MODEL)
    got = evaluate(variables, batch)
    assert float(got["count"]) == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, dict(want))
    whole = {name: batch[name] for name in ("image", "label")}
    assert float(evaluate(variables, whole)["count"]) == BATCH


def test_vmap_over_seeds_is_a_loop_over_seeds():
    step = functools.partial(train_step, **OPTIONS)
    states = [start(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    batches = [batch_of(10 + seed) for seed in range(3)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    got, got_sums = jit(jax.vmap(step))(stacked, together)
    single = jit(step)
    for i, (state, batch) in enumerate(zip(states, batches, strict=True)):
        want, sums = single(state, batch)
        for name in sums:
            assert float(got_sums[name][i]) == pytest.approx(float(sums[name]), rel=1e-5)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-6),
            got.params,
            want.params,
        )


# Chunks: a network of one dense layer, so that only the loop is looked at.


def small_step(counter):
    """A pure step of a linear model, that counts how often it is traced."""

    def step(state, batch):
        counter.append(1)
        x = batch["image"].reshape(batch["label"].shape[0], -1).astype(jnp.float32) / 255

        def loss(w):
            losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, batch["label"])
            return (losses * batch["mask"]).sum() / batch["mask"].sum(), (losses * batch["mask"])

        grad, losses = jax.grad(loss, has_aux=True)(state)
        count = batch["mask"].sum()
        return state - 0.1 * grad, {"loss": losses.sum(), "correct": count, "count": count}

    return step


@pytest.fixture
def small_data():
    rng = np.random.default_rng(0)
    return placement.put(
        rng.integers(0, 256, (50, 4, 4, 3), np.uint8), rng.integers(0, 5, 50), None
    )


def run_chunks(program, data, lengths, epochs=1):
    weights, records = jnp.zeros((48, 5)), []
    for epoch in range(epochs):
        order = input_pipeline.epoch_order(
            jax.random.key(0), epoch, np.arange(50, dtype=np.int32), 4
        )
        metrics, at = programs.empty_metrics(len(order)), 0
        for length in lengths:
            changing = (weights, metrics)
            weights, metrics = program(changing, data, jnp.asarray(order), at, at, length)
            at += length
        assert at == len(order)
        records.append(jax.device_get(metrics))
    return np.asarray(weights), records


def test_chunks_equal_a_loop_over_steps_and_each_other(small_data):
    step = small_step([])
    program = programs.compile_training(step, static_length=False)
    weights, (record,) = run_chunks(program, small_data, [13])
    again, (record_again,) = run_chunks(program, small_data, [1, 5, 2, 4, 1])
    np.testing.assert_array_equal(again, weights)
    jax.tree.map(np.testing.assert_array_equal, record_again, record)

    order = input_pipeline.epoch_order(jax.random.key(0), 0, np.arange(50, dtype=np.int32), 4)
    plain, single = jnp.zeros((48, 5)), jax.jit(step)
    for i, row in enumerate(order):
        plain, sums = single(plain, small_data.take(row))
        for name in programs.METRICS:
            assert record[name][i] == pytest.approx(float(sums[name]), rel=1e-5)
    np.testing.assert_allclose(plain, weights, rtol=1e-5, atol=1e-7)
    assert record["count"].tolist() == [4] * 12 + [2]


def test_a_cpu_traces_a_step_once_for_all_chunks_and_epochs(small_data):
    counter = []
    program = programs.compile_training(small_step(counter), static_length=False)
    run_chunks(program, small_data, [1, 5, 2, 4, 1], epochs=3)
    assert len(counter) == 1
    assert program.jitted._cache_size() == 1


def test_static_lengths_are_a_program_each(small_data):
    counter = []
    program = programs.compile_training(small_step(counter), static_length=True)
    weights, _ = run_chunks(program, small_data, [5, 5, 3], epochs=3)
    assert program.jitted._cache_size() == 2
    flexible = programs.compile_training(small_step([]), static_length=False)
    want, _ = run_chunks(flexible, small_data, [13], epochs=3)
    np.testing.assert_allclose(weights, want, rtol=1e-5, atol=1e-7)


def test_chunk_lengths_cover_an_epoch_and_follow_the_speed():
    chunks = programs.Chunks(2000, seconds=0.3)
    assert chunks.next(2000) == 1
    left, lengths = 2000, []
    while left:
        length = chunks.next(left)
        assert 1 <= length <= left
        chunks.ran(length, length * 0.001)
        lengths.append(length)
        left -= length
    assert 290 <= max(lengths) <= 310, "about 0.3 s of steps of 1 ms"
    chunks.ran(100, 100.0)
    assert chunks.next(50) == 1, "slow steps are run one at a time"


def test_prediction_maps_over_batches():
    """21 images are more than a CPU takes at a time, and do not divide by that."""
    images = np.random.default_rng(0).integers(0, 256, (2, 21, *SHAPE), np.uint8)
    variables = {"params": start().params}
    step = functools.partial(predict_step, model=Network(lowering="lax"))
    got = programs.compile_prediction(step)(variables, images)
    assert got.shape == (2, 21, 10)
    np.testing.assert_allclose(got[1], jax.jit(step)(variables, images[1]), atol=1e-5)
