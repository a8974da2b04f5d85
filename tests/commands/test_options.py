"""Frozen layers, rates by layer, resizing, batches in parts: against PyTorch and the plain step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit
from tiny_data import tiny, words

from cifar_jax import augment, evaluate, input_pipeline, optimizers, train
from cifar_jax.models.layers import Dense, Dropout, Flatten
from cifar_jax.optimizers import make_optimizer
from cifar_jax.parallel import programs as parallel_programs
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import create_state, make_preprocess, predict_step, train_step
from cifar_jax.training import evaluation, setup

__all__ = ["tiny"]

pytestmark = pytest.mark.extended

SHAPE = (4, 4, 3)


class Tiny(nn.Module):
    """Two dense layers around a dropout: [N, 4, 4, 3] -> [N, 5]."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(Dense(8, name="features_1")(Flatten()(x)))
        x = Dropout(0.5, name="dropout")(x, train)
        return Dense(5, name="features_10")(x)


class Normalised(nn.Module):
    """A dense layer whose outputs are normalised over the batch, with running means."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Dense(5, name="fc")(Flatten()(x))
        running = self.variable("batch_stats", "mean", jnp.zeros, (5,))
        if not train or self.is_initializing():
            return x - running.value.reshape(1, -1)
        mean = x.mean(axis=0)
        running.value = 0.5 * running.value + 0.5 * mean
        return x - mean.reshape(1, -1)


def batch_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, *SHAPE), np.uint8),
        "label": rng.integers(0, 5, count).astype(np.int32),
    }


@functools.cache
def programs(recipe, model):
    """The state before the first step of `recipe`, and its compiled step."""
    create = setup.state_maker(recipe, model, 4, SHAPE)
    return jit(create)(jax.random.key(0)), jit(setup.step_of(recipe, model, 4))


def run_steps(recipe, steps=3, model=None, mask=None):
    """The state after some steps of `recipe` on 10 images each, and the last step's sums."""
    state, step = programs(recipe, model or Tiny())
    mask = np.ones(10, np.float32) if mask is None else mask
    for i in range(steps):
        state, sums = step(state, batch_of(10, i) | {"mask": mask})
    return state, sums


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_prefix_takes_numbers_whole():
    assert optimizers.layer_matches("conv12", "conv")
    assert optimizers.layer_matches("features_10", "features")
    assert optimizers.layer_matches("block1/conv2", "block1")
    assert not optimizers.layer_matches("features_10", "features_1")
    assert not optimizers.layer_matches("conv1", "onv")


def test_splitting_and_merging():
    params = {"a1": {"kernel": 1, "bias": 2}, "a10": {"kernel": 3}, "b": {"c": {"kernel": 4}}}
    trained, frozen = optimizers.split_frozen(params, ("a1", "b/c"))
    assert trained == {"a10": {"kernel": 3}}
    assert frozen == {"a1": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 4}}}
    assert optimizers.merge_frozen(trained, frozen) == params
    assert optimizers.layer_names(params) == ["a1", "a10", "b/c"]


@pytest.mark.parametrize(
    ("freeze", "rated", "words"),
    [
        (("conv",), (), "--freeze: no layer begins with 'conv'.*valid: features_1, features_10"),
        ((), ("feature_1",), "--rate-scale: no layer.*did you mean 'features_1'"),
        (("features",), (), "leaves no layer to train"),
        (("features_1",), ("features_1",), "all of these layers are frozen"),
    ],
)
def test_prefixes_are_looked_at(freeze, rated, words):
    params = {"features_1": {"kernel": 0}, "features_10": {"kernel": 0}}
    with pytest.raises(UserError, match=words):
        optimizers.check_groups(params, freeze, rated)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_scale": ("conv1",)}, "prefix=factor"),
        ({"rate_scale": ("conv1=fast",)}, "prefix=factor"),
        ({"rate_scale": ("conv1=0",)}, "--freeze conv1"),
        ({"rate_scale": ("conv1=1", "conv1=2")}, "twice"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"accumulate": 5, "batch_size": 4}, "finer than --batch-size 4"),
        ({"resize": -1}, "--resize must be at least 0"),
    ],
)
def test_values_that_cannot_be_meant(changes, words):
    with pytest.raises(UserError, match=words):
        Recipe(**changes)


def test_a_recipe_with_lists_survives_json():
    recipe = Recipe(augment=("flip",), freeze=("conv1",), rate_scale=("fc=0.5", "conv2=2"))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.rate_scales == {"fc": 0.5, "conv2": 2.0}


def test_frozen_layers_stay_and_cost_nothing():
    recipe = Recipe(optimizer="adamw", weight_decay=0.1, learning_rate=0.01, ema_decay=0.9)
    frozen = recipe.replace(freeze=("features_1",))
    start, _ = programs(frozen, Tiny())
    after, _ = run_steps(frozen)
    np.testing.assert_array_equal(
        after.params["features_1"]["kernel"], start.params["features_1"]["kernel"]
    )
    np.testing.assert_array_equal(
        after.ema_params["features_1"]["kernel"], start.params["features_1"]["kernel"]
    )
    assert float(jnp.abs(after.params["features_10"]["kernel"]).sum()) != float(
        jnp.abs(start.params["features_10"]["kernel"]).sum()
    )
    held = {leaf.shape for leaf in jax.tree.leaves(after.opt_state)}
    assert (8, 5) in held
    assert (48, 8) not in held, "Adam keeps moments of a frozen layer"
    # One step on the other layer is the step of the whole network.
    one, _ = run_steps(frozen, steps=1)
    whole, _ = run_steps(recipe, steps=1)
    assert_close(one.params["features_10"], whole.params["features_10"], rtol=1e-6)
    # Nothing is differentiated by the frozen kernel: no [48, 8] gradient in the program.
    step = setup.step_of(frozen, Tiny(), 4)
    shapes = [
        variable.aval.shape
        for equation in jax.make_jaxpr(step)(start, batch_of(10)).jaxpr.eqns
        for variable in equation.outvars
    ]
    assert (8, 5) in shapes
    assert (48, 8) not in shapes


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"optimizer": "adam", "weight_decay": 0.01},
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "step", "step_epochs": 0.5},
        {"optimizer": "sgd", "schedule": "cosine"},
    ],
    ids=lambda settings: settings["optimizer"] + settings.get("schedule", ""),
)
def test_rates_by_layer_are_torchs_parameter_groups(settings):
    torch = pytest.importorskip("torch", reason="the yardstick is torch's parameter groups")
    recipe = Recipe(
        learning_rate=0.05, epochs=3, rate_scale=("features=0.1", "features_10=3"), **settings
    )
    scales = {"features_1": 0.1, "features_10": 3.0, "other": 1.0}
    rng = np.random.default_rng(0)
    start = {name: {"kernel": rng.normal(size=(3, 2)).astype(np.float32)} for name in scales}
    weights = {name: torch.tensor(layer["kernel"].copy()) for name, layer in start.items()}
    rate = recipe.learning_rate
    groups = [{"params": [weights[name]], "lr": rate * scale} for name, scale in scales.items()]
    decay = {"weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        theirs = torch.optim.SGD(
            groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **decay
        )
    else:
        theirs = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](
            groups, **decay
        )
    schedule = None
    if recipe.schedule == "step":
        schedule = torch.optim.lr_scheduler.StepLR(theirs, 2, 0.1)
    elif recipe.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 12)
    ours = make_optimizer(recipe, 4)
    params, state = start, ours.init(start)
    update = jit(ours.update)
    for _ in range(8):
        grads = {name: {"kernel": rng.normal(size=(3, 2)).astype(np.float32)} for name in scales}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, weight in weights.items():
            weight.grad = torch.tensor(grads[name]["kernel"])
        theirs.step()
        if schedule:
            schedule.step()
    for name, weight in weights.items():
        moved = np.abs(weight.numpy() - start[name]["kernel"]).max()
        assert moved > 0
        np.testing.assert_allclose(
            params[name]["kernel"], weight.numpy(), atol=2e-5 * moved, rtol=1e-6
        )


@pytest.mark.parametrize("size", [7, 3, 4])
def test_resizing_is_torchs_bilinear(size):
    torch = pytest.importorskip("torch", reason="the yardstick is torch's interpolate")
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.tensor(images.transpose(0, 3, 1, 2)), (size, size), mode="bilinear", antialias=True
    )
    got = augment.resize(jnp.asarray(images), size)
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_resizing_in_every_use_and_in_bfloat16():
    images = batch_of(3)["image"]
    full = make_preprocess("imagenet", resize=7)(images)
    mean, std = (np.float32(x) for x in augment.NORMALIZATIONS["imagenet"])
    by_hand = augment.resize(jnp.asarray((images / np.float32(255) - mean) / std), 7)
    np.testing.assert_allclose(full, by_hand, atol=1e-5)
    half = make_preprocess("imagenet", precision="bfloat16", resize=7)(images)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))
    recipe = Recipe(resize=7)
    state, _ = run_steps(recipe, steps=1)
    assert state.params["features_1"]["kernel"].shape == (7 * 7 * 3, 8)
    prepare = setup.preprocess_of(recipe)
    logits = predict_step({"params": state.params}, images, model=Tiny(), preprocess=prepare)
    assert logits.shape == (3, 5)


def test_a_batch_in_parts_is_the_same_step():
    """Dropout and augmentation included; 10 images do not divide by 3, and 4 are masked."""
    some = np.array([1, 1, 0, 1, 1, 1, 0, 1, 0, 0], np.float32)
    recipe = Recipe(optimizer="adam", learning_rate=0.01, augment=("flip",), batch_size=10)
    for mask in (None, some):
        whole, sums = run_steps(recipe, mask=mask)
        other, other_sums = run_steps(recipe.replace(accumulate=3), mask=mask)
        assert_close(other_sums, sums, rtol=1e-5)
        assert_close(other.params, whole.params, rtol=1e-4, atol=1e-5)


def test_a_cpu_cuts_large_batches_of_small_networks_by_itself():
    """Two pieces or more, a step's same result; never where normalisation would see a part."""
    recipe, large = Recipe(learning_rate=0.1, batch_size=65), batch_of(65)
    state, step = programs(recipe, Tiny())
    plain = functools.partial(train_step, model=Tiny(), optimizer=make_optimizer(recipe, 4))
    for size, loops in ((63, False), (65, True)):
        batch = {name: x[:size] for name, x in large.items()}
        new, sums = step(state, batch)
        assert_close(sums, jit(plain)(state, batch)[1], rtol=1e-5)
        assert_close(new.params, jit(plain)(state, batch)[0].params, rtol=1e-4, atol=1e-5)
        uncompiled = setup.step_of(recipe, Tiny(), 4)
        assert ("scan[" in str(jax.make_jaxpr(uncompiled)(state, batch))) == loops
    assert [parallel_programs.microbatches(size, state) for size in (1, 63, 65, 255, 512)] == [
        1,
        1,
        2,
        2,
        16,
    ]
    assert parallel_programs.microbatches(65, programs(recipe, Normalised())[0]) == 1
    wide = jax.eval_shape(lambda: {"w": jnp.zeros((2048, 2048))})  # 4.2 million weights
    assert parallel_programs.microbatches(512, state.replace(params=wide)) == 1


def test_parts_normalise_by_themselves_in_order():
    recipe = Recipe(learning_rate=0.0, batch_size=10, accumulate=2)
    state, _ = run_steps(recipe, steps=1, model=Normalised())
    params = state.params["fc"]
    x = make_preprocess()(batch_of(10)["image"]).reshape(10, -1) @ params["kernel"]
    first, second = (np.asarray(x[i : i + 5].mean(axis=0) + params["bias"]) for i in (0, 5))
    np.testing.assert_allclose(state.batch_stats["mean"], 0.25 * first + 0.5 * second, rtol=1e-4)


def test_parts_under_an_axis():
    """A batch over two devices, each cutting its half into parts."""
    model, optimizer = Tiny(), optax.sgd(0.1)
    create = functools.partial(create_state, model, optimizer, image_shape=SHAPE)
    state, batch = jit(create)(jax.random.key(0)), batch_of(8)
    step = functools.partial(train_step, model=model, optimizer=optimizer)
    want, sums = jit(step)(state, batch)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    over, every = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()
    split = jax.shard_map(
        functools.partial(step, accumulate=2, axis_name="batch"),
        mesh=mesh, in_specs=(every, over), out_specs=(every, every),
    )  # fmt: skip
    got, got_sums = jit(split)(state, batch)
    assert_close(got_sums, sums, rtol=1e-5)
    assert_close(got.params, want.params, rtol=1e-4, atol=1e-6)


def test_options_together_in_bfloat16():
    recipe = Recipe(
        optimizer="adam", learning_rate=0.01, batch_size=10, precision="bfloat16", resize=6,
        freeze=("features_10",), rate_scale=("features_1=0.5",), accumulate=3,
    )  # fmt: skip
    state, sums = run_steps(recipe)
    full, full_sums = run_steps(recipe.replace(precision="float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert float(sums["loss"]) == pytest.approx(float(full_sums["loss"]), rel=0.02)
    assert float(sums["count"]) == 10
    assert not np.array_equal(
        state.params["features_1"]["kernel"], full.params["features_1"]["kernel"]
    )


def test_a_run_with_every_option(tiny, tmp_path):
    options = words(
        "--recipe adam --conv gemm --batch-size 60 --epochs 1 --no-plots --normalize imagenet "
        "--resize 20 --freeze conv --rate-scale fc1=0.1,fc3=2 --accumulate 4 --remat --devices 1"
    )
    where = ["--data-dir", str(tiny), "--workdir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"--freeze: no layer begins with 'features'.*conv1"):
        train.main([*options, *where, "--freeze", "features"], say=id)
    assert not (tmp_path / "run").exists()
    lines = []
    summary = train.main([*options, *where], say=lines.append)
    said = "\n".join(lines)
    assert (
        "resized to 20x20, frozen conv, rates fc1=0.1 fc3=2, 4 parts a batch, rematerialised"
        in said
    )
    assert summary["recipe"]["rate_scale"] == ["fc1=0.1", "fc3=2"]
    trained = evaluation.load(tmp_path / "run")
    create = setup.state_maker(trained.config.recipe, trained.model, 8, (32, 32, 3))
    start = jit(create)(input_pipeline.run_keys(42)["state"]).params
    shapes = jax.tree.map(jnp.shape, trained.variables["params"])
    assert shapes["fc1"]["kernel"] == (16 * 2 * 2, 120)
    moved = {
        name: float(jnp.abs(layer["kernel"] - start[name]["kernel"]).max())
        for name, layer in trained.variables["params"].items()
    }
    assert max(moved["conv1"], moved["conv2"]) < 1e-6  # drawn by a program optimised otherwise
    assert moved["fc1"] < moved["fc2"] / 2 < moved["fc3"] / 2
    found = evaluate.main([str(tmp_path / "run"), "--data-dir", str(tiny)], say=id)
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
