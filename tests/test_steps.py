"""The pure steps: masks, sums, draws, averaging, precision; and every test image counted once."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from cifar_jax import input_pipeline
from cifar_jax.models import MODELS
from cifar_jax.models.layers import Dense, Dropout, Flatten
from cifar_jax.ops import averaging
from cifar_jax.optimizers import make_optimizer
from cifar_jax.parallel import placement, programs
from cifar_jax.parallel.data_parallel import shard_map_train_step
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import (
    create_state,
    cross_entropy,
    eval_step,
    inference_variables,
    make_preprocess,
    predict_step,
    train_step,
)

# Its update is the gradient itself, kept in the optimizer state for the test to read.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, *_: (jax.tree.map(jnp.zeros_like, grads), grads),
)
SHAPE = (4, 4, 3)


class Tiny(nn.Module):
    """Two dense layers around a dropout: [N, 4, 4, 3] -> [N, 5]."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(Dense(16, name="fc1")(Flatten()(x)))
        return Dense(5, name="fc2")(Dropout(self.rate, name="dropout")(x, train))


def batch_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, *SHAPE), np.uint8),
        "label": rng.integers(0, 5, count).astype(np.int32),
    }


def state_of(model, optimizer=KEEP_GRADIENT, seed=0, **options):
    return create_state(model, optimizer, jax.random.key(seed), image_shape=SHAPE, **options)


def jitted(model, optimizer=KEEP_GRADIENT, **options):
    return jit(functools.partial(train_step, model=model, optimizer=optimizer, **options))


def reference(state, batch):
    """Logits of Tiny and each image's cross-entropy, in NumPy float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    x = (batch["image"].reshape(len(batch["label"]), -1) / 255.0 - 0.5) / 0.5
    hidden = np.maximum(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], 0)
    logits = hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    top = logits.max(axis=1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return logits, log_sum - np.take_along_axis(logits, batch["label"][:, None], 1)[:, 0]


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_metrics_are_sums_under_the_mask():
    model, batch = Tiny(rate=0.0), batch_of(9)
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1], np.float32)
    state = state_of(model)
    logits, losses = reference(state, batch)
    hits = (logits.argmax(axis=1) == batch["label"]).astype(float)
    for given, weights in ((batch, np.ones(9)), (batch | {"mask": mask}, mask)):
        _, trained = jitted(model)(state, given)
        tested = eval_step(inference_variables(state), given, model=model)
        for sums in (trained, tested):
            assert {k: v.dtype for k, v in sums.items() if k != "confusion"} == {
                name: np.float32 for name in ("loss", "correct", "count")
            }
            assert float(sums["loss"]) == pytest.approx((losses * weights).sum(), rel=1e-5)
            assert float(sums["correct"]) == (hits * weights).sum()
            assert float(sums["count"]) == weights.sum()
        want = np.zeros((5, 5), int)
        np.add.at(want, (batch["label"], logits.argmax(axis=1)), weights.astype(int))
        np.testing.assert_array_equal(tested["confusion"], want)
    np.testing.assert_allclose(
        predict_step(inference_variables(state), batch["image"], model=model), logits, atol=1e-5
    )


def test_gradient_is_that_of_the_mean_over_unmasked_images():
    model, batch = Tiny(rate=0.0), batch_of(8)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    state = state_of(model)

    def mean_loss(params, rows):
        images = jnp.asarray(batch["image"][rows] / np.float32(127.5) - 1, jnp.float32)
        logits = model.apply({"params": params}, images)
        picked = jax.nn.log_softmax(logits)[jnp.arange(len(rows)), batch["label"][rows]]
        return -picked.mean()

    for given, rows in ((batch, np.arange(8)), (batch | {"mask": mask}, np.flatnonzero(mask))):
        after, _ = jitted(model)(state, given)
        want = jax.grad(mean_loss)(state.params, rows)
        assert_trees_close(after.opt_state, want, rtol=1e-5, atol=1e-7)


def test_padding_changes_neither_sums_nor_gradient():
    """Dropout and augmentation included: the draws belong to images, not to the batch."""
    model, batch = Tiny(), batch_of(6)
    padded = {
        "image": np.concatenate([batch["image"], np.full((3, *SHAPE), 255, np.uint8)]),
        "label": np.concatenate([batch["label"], np.zeros(3, np.int32)]),
        "mask": np.array([1] * 6 + [0] * 3, np.float32),
    }
    state = state_of(model)
    step = jitted(model, preprocess=make_preprocess("half", ("flip",)))
    plain, plain_sums = step(state, batch)
    other, other_sums = step(state, padded)
    assert_trees_close(other_sums, plain_sums, rtol=1e-6)
    assert_trees_close(other.opt_state, plain.opt_state, rtol=1e-5, atol=1e-7)


def test_a_batch_of_padding_alone_does_nothing():
    model, optimizer = Tiny(), optax.sgd(0.1)
    state = state_of(model, optimizer)
    after, sums = jitted(model, optimizer)(state, batch_of(4) | {"mask": np.zeros(4, np.float32)})
    assert {name: float(value) for name, value in sums.items()} == {
        "loss": 0,
        "correct": 0,
        "count": 0,
    }
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_a_steps_draws_depend_on_key_and_step_alone():
    model, batch = Tiny(), batch_of(16)
    state, step = state_of(model), jitted(Tiny())
    after, first = step(state, batch)
    assert int(after.step) == int(state.step) + 1
    assert after.key == state.key, "the base key is never replaced"
    again = step(state, batch)[1]
    second = step(after, batch)[1]
    jumped = step(state.replace(step=jnp.array(1, jnp.int32)), batch)[1]
    other_key = step(state.replace(key=jax.random.key(99)), batch)[1]
    assert float(again["loss"]) == float(first["loss"])
    # KEEP_GRADIENT leaves the weights alone, so only the draws can change the loss.
    assert float(second["loss"]) != float(first["loss"])
    assert float(jumped["loss"]) == float(second["loss"])
    assert float(other_key["loss"]) != float(first["loss"])


def test_dropout_is_used_in_training_only():
    batch = batch_of(16)
    state = state_of(Tiny())
    _, losses = reference(state, batch)
    tested = eval_step(inference_variables(state), batch, model=Tiny())
    assert float(tested["loss"]) == pytest.approx(losses.sum(), rel=1e-5)
    trained = jitted(Tiny())(state, batch)[1]
    assert float(trained["loss"]) != pytest.approx(losses.sum(), rel=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_torchs(smoothing, backend, monkeypatch):
    torch = pytest.importorskip("torch", reason="the yardstick is torch's cross_entropy")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (12, 10)).astype(np.float32), rng.integers(0, 10, 12)
    theirs = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(
        theirs, torch.tensor(labels), label_smoothing=smoothing, reduction="none"
    )
    want.sum().backward()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # each has its own form

    def loss(logits):
        found = cross_entropy(logits, jnp.asarray(labels, jnp.int32), smoothing)
        return found.sum(), found

    gradient, got = jax.grad(loss, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_label_smoothing_reaches_the_step():
    model, batch = Tiny(rate=0.0), batch_of(7)
    state = state_of(model)
    logits = predict_step(inference_variables(state), batch["image"], model=model)
    want = cross_entropy(logits, batch["label"], 0.2).sum()
    got = jitted(model, label_smoothing=0.2)(state, batch)[1]["loss"]
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    plain = jitted(model)(state, batch)[1]["loss"]
    assert float(got) != pytest.approx(float(plain), rel=1e-3)


def test_moving_average_of_the_weights():
    model, optimizer = Tiny(), optax.sgd(0.5)
    state = state_of(model, optimizer, ema=True)
    step = jitted(model, optimizer, ema_decay=0.25)
    average = jax.tree.map(np.asarray, state.params)
    for i, kept in enumerate((1 / 10, 2 / 11, 0.25, 0.25)):  # TensorFlow's (1 + i) / (10 + i)
        state, _ = step(state, batch_of(8, seed=i))
        average = jax.tree.map(
            lambda a, p, k=kept: k * a + (1 - k) * np.asarray(p), average, state.params
        )
    assert_trees_close(state.ema_params, average, rtol=1e-5, atol=1e-7)
    assert inference_variables(state)["params"] is state.ema_params
    assert inference_variables(state_of(model))["params"] is not None
    gap = jax.tree.map(lambda a, p: float(jnp.abs(a - p).max()), state.ema_params, state.params)
    assert min(jax.tree.leaves(gap)) > 1e-4


def test_a_high_decay_does_not_keep_the_drawn_weights():
    drawn, trained = {"w": jnp.ones(3)}, {"w": jnp.zeros(3), "steps": jnp.int32(7)}
    average = drawn | {"steps": jnp.int32(0)}
    left = []
    for step in range(3):
        average = averaging.moved(average, trained, 0.9999, jnp.int32(step))
        left.append(float(average["w"][0]))
    np.testing.assert_allclose(left, np.cumprod([1 / 10, 2 / 11, 3 / 12]), rtol=1e-5)
    assert average["steps"] == 7, "whole numbers are no averages"
    late = averaging.moved(drawn, {"w": jnp.zeros(3)}, 0.9999, jnp.int32(10**6))
    np.testing.assert_allclose(late["w"], 0.9999, rtol=1e-6)


# Its state is the `value` it was last given.
KEEP_VALUE = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros(()),
    lambda grads, state, params=None, *, value, **_: (jax.tree.map(jnp.zeros_like, grads), value),
)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("way", [jitted, shard_map_train_step])
def test_an_optimizer_is_told_the_mean_loss_of_the_global_batch(way, accumulate):
    model, mask = Tiny(rate=0.0), np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    batch, state = batch_of(8) | {"mask": mask}, state_of(model, KEEP_VALUE)
    more = {} if way is jitted else {"devices": jax.devices()[:2]}
    after, _ = way(model=model, optimizer=KEEP_VALUE, accumulate=accumulate, **more)(state, batch)
    _, losses = reference(state, batch)
    assert float(after.opt_state) == pytest.approx((losses * mask).sum() / mask.sum(), rel=1e-5)


PLATEAU = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)


@pytest.mark.parametrize(
    "optimizer",
    [optax.polyak_sgd(0.5), optax.chain(optax.sgd(2.0), PLATEAU)],
    ids=["polyak", "plateau"],
)
def test_optimizers_that_need_the_loss(optimizer):
    model, batch = Tiny(rate=0.0), batch_of(8)
    state, kept = state_of(model, optimizer), state_of(model)
    step, keep = jitted(model, optimizer), jitted(model)
    params, opt_state = state.params, state.opt_state
    for _ in range(6):
        gradient = keep(kept.replace(params=params), batch)[0].opt_state
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            state, sums = step(state, batch)
            value = sums["loss"] / 8
            updates, opt_state = optimizer.update(gradient, opt_state, params, value=value)
        params = optax.apply_updates(params, updates)
    assert_trees_close(state.params, params, rtol=1e-4, atol=1e-5)
    if len(jax.tree.leaves(opt_state)):
        assert float(opt_state[1].scale) == float(state.opt_state[1].scale) < 1


KINDS = ("int8", "int16", "int32", "int64", "uint16", "uint32", "bool")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        *((np.ones((2, *SHAPE), kind), f"of type {kind}.* uint8 from 0 to 255") for kind in KINDS),
        (np.ones(SHAPE, np.uint8), r"these are \[4, 4, 3\]: a batch axis is missing"),
        (np.ones((1, 2, *SHAPE), np.float32), r"these are \[1, 2, 4, 4, 3\]"),
    ],
)
def test_images_that_are_none(images, said):
    model, state = Tiny(), state_of(Tiny())
    batch = {"image": images, "label": np.zeros(2, np.int32)}
    calls = {
        train_step: lambda: train_step(state, batch, model=model, optimizer=KEEP_GRADIENT),
        eval_step: lambda: eval_step(inference_variables(state), batch, model=model),
        predict_step: lambda: predict_step(inference_variables(state), images, model=model),
    }
    for call in calls.values():
        with pytest.raises(UserError, match=said):
            call()


def test_a_step_is_pure():
    """Nothing given is changed or donated, and the same call gives the same bits."""
    model, optimizer = Tiny(), make_optimizer(Recipe(optimizer="adam", learning_rate=0.01), 10)
    state, batch = state_of(model, optimizer, ema=True), batch_of(8)
    device_batch = jax.device_put(batch)
    before = jax.tree.map(lambda x: np.array(x), state.replace(key=jax.random.key_data(state.key)))
    step = jitted(model, optimizer, ema_decay=0.9)
    first, second = (step(state, device_batch)[0] for _ in range(2))
    now = state.replace(key=jax.random.key_data(state.key))
    jax.tree.map(np.testing.assert_array_equal, now, before)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(device_batch), batch)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    unjitted, _ = train_step(state, batch, model=model, optimizer=optimizer, ema_decay=0.9)
    assert_trees_close(unjitted.params, first.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_step_applies_the_optimizer_to_that_gradient(kind):
    model, batch = Tiny(), batch_of(8)
    recipe = Recipe(optimizer=kind, learning_rate=0.1, weight_decay=0.01, schedule="cosine")
    optimizer = make_optimizer(recipe, 5)
    state, kept = state_of(model, optimizer), state_of(model)
    step, keep = jitted(model, optimizer), jitted(model)
    params, opt_state = state.params, state.opt_state
    for i in range(3):
        state, _ = step(state, batch)
        at = kept.replace(params=params, step=jnp.array(i, jnp.int32))
        gradient = keep(at, batch)[0].opt_state
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_close(state.params, params, rtol=1e-5, atol=1e-6)
    assert_trees_close(state.opt_state, opt_state, rtol=1e-5, atol=1e-7)


def test_create_state():
    optimizer = optax.adam(0.01)
    state = state_of(Tiny(), optimizer, ema=True)
    assert state.step.dtype == np.int32
    assert int(state.step) == 0
    assert state.batch_stats == {}
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
    assert state.ema_batch_stats == {}
    for average, weight in zip(
        *map(jax.tree.leaves, (state.ema_params, state.params)), strict=True
    ):
        assert average.unsafe_buffer_pointer() != weight.unsafe_buffer_pointer()
    plain = state_of(Tiny(), optimizer)
    assert plain.ema_params is plain.ema_batch_stats is None
    same, other = state_of(Tiny(), optimizer), state_of(Tiny(), optimizer, seed=1)
    jax.tree.map(np.testing.assert_array_equal, same.params, state.params)
    assert not np.array_equal(other.params["fc1"]["kernel"], state.params["fc1"]["kernel"])


def test_bfloat16_activations_over_float32_weights():
    model, optimizer = MODELS["tutorial_cnn"](lowering="lax"), optax.sgd(0.05)
    state = jit(lambda key: create_state(model, optimizer, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    results = {}
    for precision in ("float32", "bfloat16"):
        preprocess = make_preprocess("half", precision=precision)
        after, sums = jitted(model, optimizer, preprocess=preprocess)(state, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype(np.float32)}
        assert sums["loss"].dtype == np.float32
        predict = jit(functools.partial(predict_step, model=model, preprocess=preprocess))
        logits = predict(inference_variables(state), batch["image"])
        assert logits.dtype == np.float32
        results[precision] = np.asarray(logits), float(sums["loss"]), after.params
    (full, loss, weights), (half, half_loss, half_weights) = results.values()
    assert not np.array_equal(full, half), "bfloat16 was not used"
    np.testing.assert_allclose(half, full, atol=0.02 * np.abs(full).max())
    assert half_loss == pytest.approx(loss, rel=0.01)
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), weights, state.params)
    gap = jax.tree.map(lambda a, b: np.linalg.norm(a - b), weights, half_weights)
    assert all(jax.tree.leaves(jax.tree.map(lambda g, m: g < 0.15 * m, gap, moved)))


@pytest.fixture(scope="module")
def whole_test_split(cifar10):
    """(evaluate(order) -> sums, the sums' reference) over the 10,000 test images."""
    split = cifar10.splits["test"]
    assert len(split) == 10_000
    model = MODELS["tutorial_cnn"]()
    state = jit(lambda key: create_state(model, optax.sgd(0.1), key))(jax.random.key(0))
    variables = inference_variables(state)
    data = placement.put(split.images, split.labels, None)
    run = programs.compile_evaluation(functools.partial(eval_step, model=model))
    predict = jax.jit(functools.partial(predict_step, model=model))
    blocks = np.split(split.images, 20)
    logits = np.concatenate([np.asarray(predict(variables, block), float) for block in blocks])
    labels = np.asarray(split.labels)
    log_sum = np.log(np.exp(logits).sum(axis=1))
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    want = {"loss": (log_sum - logits[np.arange(10_000), labels]).sum(), "confusion": confusion}
    return (lambda order: jax.device_get(run(variables, data, order))), want


@pytest.mark.extended
@pytest.mark.parametrize(
    "batch_size", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 128, 10_000))]
)
def test_every_test_image_is_counted_once(batch_size, whole_test_split):
    evaluate, want = whole_test_split
    sums = evaluate(input_pipeline.batches(np.arange(10_000, dtype=np.int32), batch_size))
    assert sums["count"] == 10_000
    np.testing.assert_array_equal(sums["confusion"], want["confusion"])
    assert sums["confusion"].sum(axis=1).tolist() == [1000] * 10
    assert sums["correct"] == np.trace(want["confusion"])
    assert float(sums["loss"]) == pytest.approx(want["loss"], rel=1e-5)
