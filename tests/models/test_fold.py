"""The folded linear layer trains as the unfolded one, whatever the optimizer; and unfolds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from cifar_jax import input_pipeline, steps
from cifar_jax.models import fold
from cifar_jax.models.fold import mean_of_normal_blocks, normal_blocks
from cifar_jax.models.vgg import VGG
from cifar_jax.ops import averaging
from cifar_jax.optimizers import make_optimizer
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import evaluation
from cifar_jax.training.workdir import Config
from cifar_jax.weights import files as weight_files
from cifar_jax.weights import init_from
from cifar_jax.weights.state_dict import to_torch

pytestmark = pytest.mark.extended

STEPS, BATCH, CHANNELS, HIDDEN = 20, 4, 6, 8
IMAGE = (4, 4, 3)  # two pools leave one pixel
SGD = Recipe(learning_rate=0.05, momentum=0.9, model="vgg16")
ADAM = Recipe(optimizer="adam", learning_rate=0.003, model="vgg16")
RECIPES = {
    "sgd": SGD.replace(momentum=0.0),
    "momentum": SGD,
    "nesterov, decay": SGD.replace(nesterov=True, weight_decay=0.05),
    "momentum, decay, clip, cosine": SGD.replace(
        weight_decay=0.05, clip_norm=0.2, schedule="cosine", epochs=1
    ),
    "adam": ADAM,
    "adam, clip": ADAM.replace(clip_norm=0.05),
    "adamw": ADAM.replace(optimizer="adamw", weight_decay=1.0),
}
EMA = 0.6  # reached half-way through the steps


def model(folded):
    layers = (5, "M", CHANNELS, "M")
    return VGG(layers=layers, hidden=HIDDEN, fold=folded, dropout_rate=0.5, lowering="lax")


@functools.cache
def gradient(folded):
    """Jitted: (params, images, labels, key of the dropout) -> gradients."""

    def loss(params, images, labels, key):
        net = model(folded)
        logits = net.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jit(jax.grad(loss))


@functools.cache
def start():
    """Unfolded float64 parameters; linear weights large enough that the layers matter."""
    params = jit(model(False).init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))["params"]
    rng = np.random.default_rng(0)

    def enlarge(path, leaf):
        noise = rng.normal(size=leaf.shape) * (0.3 if "classifier" in path[0].key else 0.02)
        return np.asarray(leaf, np.float64) + noise

    return jax.tree_util.tree_map_with_path(enlarge, dict(params))


def train(params, folded, recipe):
    """Returns the weights after 20 steps, their moving average, and the optimizer."""
    optimizer = make_optimizer(recipe, STEPS)
    dtype = params["classifier_6"]["bias"].dtype

    @jit
    def update(params, state, average, gradients, step):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, averaging.moved(average, params, EMA, step)

    state, average = optimizer.init(params), params
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        images = rng.uniform(-1, 1, (BATCH, *IMAGE)).astype(dtype)
        labels = rng.integers(0, 10, BATCH).astype(np.int32)
        gradients = gradient(folded)(params, images, labels, jax.random.key(i))
        params, state, average = update(params, state, average, gradients, i)
    return params, average, optimizer


def difference(ours, theirs):
    """Largest difference over any weight array, against that array's largest value."""
    ours, theirs = jax.device_get((ours, theirs))
    worst = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), ours, theirs)
    return max(jax.tree.leaves(worst))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in RECIPES), ("momentum", "float32"), ("adam", "float32")],
)
def test_twenty_steps_folded_and_not(name, dtype):
    recipe = RECIPES[name]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), start())
        initial = params["classifier_0"]["kernel"]
        want, want_average, optimizer = train(params, False, recipe)
        got, got_average, _ = train(fold.fold(params), True, recipe)
        assert got["classifier_0"]["mean_kernel"].shape == (CHANNELS, HIDDEN)
        shrunk = fold.spread(optimizer, STEPS)
        unfolded = fold.unfold(got, initial, shrunk.astype(dtype))
        averaged = fold.spread(optimizer, STEPS, EMA).astype(dtype)
        unfolded_average = fold.unfold(got_average, initial, averaged)
        moved = difference(want, params)
    assert moved > 1e-2, "the weights hardly moved: nothing was compared"
    assert (float(shrunk) < 0.999) == (recipe.weight_decay > 0)
    # `spread` is a float32; Adam's division makes the rounding of tiny gradients larger.
    tolerance = {"float64": 1e-11, "float32": 2e-4}[dtype]
    if recipe.weight_decay and dtype == "float64":
        tolerance = 1e-6
    assert difference(unfolded, want) < tolerance
    assert difference(unfolded_average, want_average) < tolerance


def test_clipping_happens_in_those_runs():
    """Without the count of 49, the norm would be smaller and the steps longer."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start())
        images = np.random.default_rng(0).uniform(-1, 1, (BATCH, *IMAGE))
        arguments = (images, np.arange(BATCH, dtype=np.int32), jax.random.key(0))
        whole = gradient(False)(params, *arguments)
        folded = gradient(True)(fold.fold(params), *arguments)
        norm = float(optax.tree.norm(whole))
        assert norm > 1.1 * float(optax.tree.norm(folded)) > 0
        for limit in (norm * 0.1, norm * 0.99, norm * 1.01):
            ours = fold.clip_by_global_norm(limit)
            want = optax.clip_by_global_norm(limit).update(whole, optax.EmptyState())[0]
            got = ours.update(folded, ours.init(folded))[0]
            for layer in ("features_0", "classifier_3"):
                assert difference(got[layer], want[layer]) < 1e-12
            assert difference(ours.update(whole, ours.init(whole))[0], want) < 1e-12


def test_logits_are_those_of_the_unfolded_layer():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start())
    images = np.random.default_rng(1).uniform(-1, 1, (3, *IMAGE)).astype(np.float32)
    want = model(False).apply({"params": params}, images)
    got = model(True).apply({"params": fold.fold(params)}, images)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_the_folded_layer_starts_as_the_fold_of_the_unfolded_one():
    """Layer by layer from one key, so that a run's blocks can be drawn again."""
    key = jax.random.key(7)
    images = jnp.zeros((1, *IMAGE))
    whole, folded = (jit(model(f).init)(key, images)["params"] for f in (False, True))
    assert set(folded["classifier_0"]) == {"mean_kernel", "bias"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), dict(folded), fold.fold(whole)
    )
    draw = functools.partial(fold.initial_kernel, model(True), image_shape=IMAGE)
    initial = jit(draw)(key)
    np.testing.assert_allclose(initial, whole["classifier_0"]["kernel"], atol=1e-8)
    back = fold.unfold(folded, initial)
    np.testing.assert_allclose(back["classifier_0"]["kernel"], initial, atol=1e-8)
    mean = mean_of_normal_blocks(0.5)(key, (3, 4))
    blocks = normal_blocks(0.5)(key, (49 * 3, 4)).reshape(49, 3, 4)
    np.testing.assert_allclose(mean, blocks.mean(axis=0), atol=1e-6)


def test_larger_images_are_not_folded():
    shapes = jax.eval_shape(model(True).init, jax.random.key(0), jnp.zeros((1, 8, 12, 3)))
    assert shapes["params"]["classifier_0"]["kernel"].shape == (49 * CHANNELS, HIDDEN)
    assert not fold.is_folded(shapes["params"])
    assert fold.unfold(shapes["params"], None) == shapes["params"]


def test_what_is_not_exact_is_refused():
    params = fold.fold(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start()))
    optimizer = make_optimizer(ADAM.replace(weight_decay=0.1), STEPS)
    with pytest.raises(UserError, match="use --optimizer adamw, or --no-fold"):
        optimizer.init(params)
    optimizer.init(start())
    with pytest.raises(UserError, match="cannot be unfolded with a kernel of shape"):
        fold.unfold(params, jnp.zeros((49, HIDDEN)))


def test_a_runs_weights_unfold_from_its_seed():
    """With averaged weights and decay: nothing but the config and the checkpoint is needed."""
    recipe = SGD.replace(weight_decay=0.05, ema_decay=0.5)
    optimizer, key = make_optimizer(recipe, STEPS), input_pipeline.run_keys(3)["state"]
    data = {"sizes": {"train": 4}, "class_names": ["a"] * 10, "image_shape": list(IMAGE)}
    config = Config("vgg16_finetune", recipe.replace(batch_size=4), 3, data)
    found = {}
    for folded in (False, True):
        net = model(folded).clone(dropout_rate=0.0)
        create = functools.partial(steps.create_state, net, optimizer, image_shape=IMAGE, ema=True)
        state = jit(create)(key)
        step = jit(
            functools.partial(
                steps.train_step, model=net, optimizer=optimizer, ema_decay=recipe.ema_decay
            )
        )
        for i in range(3):
            rng = np.random.default_rng(i)
            images = rng.integers(0, 256, (4, *IMAGE), np.uint8)
            labels = rng.integers(0, 10, 4).astype(np.int32)
            state, _ = step(state, {"image": images, "label": labels})
        variables = steps.inference_variables(state)
        trained = evaluation.Trained(config, net, variables, None, 3, None, [])
        found[folded] = init_from.unfolded(trained)["params"]
    # Linear weights are so small at first that a millionth of the largest is what counts.
    assert difference(found[True], found[False]) < 1e-5


def test_weights_from_a_file_are_folded_and_unfold_again(tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), start())
    path = tmp_path / "weights.safetensors"
    weight_files.write(path, to_torch(params), {})
    data = {"sizes": {"train": 4}, "class_names": ["a"] * 10, "image_shape": list(IMAGE)}
    found = init_from.load(path, model(True), IMAGE)
    assert set(found.variables["params"]["classifier_0"]) == {"mean_kernel", "bias"}
    moved = jax.tree.map(lambda x: jnp.asarray(x) + 0.25, found.variables["params"])
    config = Config("vgg16_finetune", ADAM, 3, data, init_from=found.record)
    trained = evaluation.Trained(config, model(True), {"params": moved}, None, 3, None, [])
    back = init_from.unfolded(trained)["params"]
    assert difference(back, jax.tree.map(lambda x: x + np.float32(0.25), params)) < 1e-6
    weight_files.write(path, to_torch(jax.tree.map(lambda x: 2 * x, params)), {}, overwrite=True)
    with pytest.raises(UserError, match="has changed since"):
        init_from.unfolded(trained)
    path.unlink()
    with pytest.raises(UserError, match="takes the weights the run started from"):
        init_from.unfolded(trained)
