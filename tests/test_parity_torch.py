"""The same weights and batches give what PyTorch gives: logits, loss, gradients, training.

In float64 both sides differ by rounding alone, so the tolerances there leave no room for a
different formula; in float32 they are what sums of this length round to.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import UNOPTIMISED

torch = pytest.importorskip("torch", reason="parity is checked against PyTorch")

from benchmarks.torch_models import MODELS as TORCH_MODELS  # noqa: E402
from cifar_jax.augment import NORMALIZATIONS  # noqa: E402
from cifar_jax.models import MODELS  # noqa: E402
from cifar_jax.ops.convolution import LOWERINGS  # noqa: E402
from cifar_jax.optimizers import make_optimizer  # noqa: E402
from cifar_jax.parallel.programs import compiler_options  # noqa: E402
from cifar_jax.recipes import RECIPES, Recipe  # noqa: E402
from cifar_jax.runtime.errors import UserError  # noqa: E402
from cifar_jax.steps import (  # noqa: E402
    TrainState,
    eval_step,
    make_preprocess,
    predict_step,
    train_step,
)
from cifar_jax.weights.state_dict import from_torch, to_torch  # noqa: E402

NAMES = ("tutorial_cnn", "deep_cnn", "dropout_cnn")
FORMS = tuple(name for name in LOWERINGS if name != "auto")
BATCH, STEPS = 4, 100
# 100 steps of one form in every test run; all of them take minutes.
LONG_FORM = "winograd"

# Its update is the gradient itself, kept in the optimizer state for the test to read.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
)
OPTIMIZERS = {
    "momentum": (
        Recipe(learning_rate=0.01, momentum=0.9),
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    ),
    "adam": (
        Recipe(optimizer="adam", learning_rate=0.001),
        functools.partial(torch.optim.Adam, lr=0.001),
    ),
}
# Adam divides by |g| + 1e-8, and so makes the rounding of a tiny gradient up to 1e5 times larger.
TOLERANCES = {"momentum": 1e-9, "adam": 1e-7}


def quick_options():
    """For programs of few calls, which take longer to optimise than to run."""
    return compiler_options() | UNOPTIMISED


def options_of(name):
    """Dropout off: the two libraries draw different masks."""
    return {"dropout_rate": 0.0} if name == "dropout_cnn" else {}


def torch_model_of(name, dtype=torch.float64):
    torch.manual_seed(1)
    return TORCH_MODELS[name](**options_of(name)).to(dtype)


def images_of(seed, count, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 32, 32, 3)).astype(dtype)


def labels_of(seed, count):
    return np.random.default_rng(1000 + seed).integers(0, 10, count).astype(np.int32)


def to_nchw(images):
    return torch.tensor(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))


def numpy_state(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def torch_gradients(model, images, labels):
    """Returns logits, loss and the gradients under the names of the state dict."""
    logits = model(to_nchw(images))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())
    model.zero_grad()
    loss.backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return logits.detach().numpy(), loss.item(), gradients


def params_with(name, torch_state, dtype):
    """Our parameters with PyTorch's weights, in `dtype`."""
    shapes = jax.eval_shape(MODELS[name]().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes["params"])
    return jax.tree.map(jnp.asarray, from_torch(torch_state, template))


def state_with(params):
    """A state whose optimizer is `KEEP_GRADIENT`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={},
        opt_state=params,
        key=jax.random.key(0),
    )


@functools.cache
def float64_step(name, form):
    """Jitted: (params, images, labels) -> logits, mean loss, gradients."""
    options = {
        "model": MODELS[name](lowering=form, **options_of(name)),
        "preprocess": make_preprocess(precision="float64"),
    }

    def step(params, images, labels):
        batch = {"image": images, "label": labels}
        after, sums = train_step(state_with(params), batch, optimizer=KEEP_GRADIENT, **options)
        logits = options["model"].apply({"params": params}, images)
        return logits, sums["loss"] / len(labels), after.opt_state

    compiling = compiler_options() if form == LONG_FORM else quick_options()
    return jax.jit(step, compiler_options=compiling)


@functools.cache
def float64_update(name, kind):
    """(state, jitted update) of the recipe's optimizer for this network's weights."""
    optimizer = make_optimizer(OPTIMIZERS[kind][0], STEPS)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), update


def assert_close(ours, theirs, tolerance):
    """Largest difference of each entry against that entry's largest value."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].shape == theirs[name].shape, name
        scale = np.abs(theirs[name]).max()
        assert scale > 0, f"{name}: all zero, nothing is compared"
        worst = np.abs(ours[name] - theirs[name]).max() / scale
        assert worst < tolerance, f"{name}: relative difference {worst:.2e}"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        # Winograd's form of the largest network takes longest to compile.
        pytest.param(name, form, marks=pytest.mark.slow)
        if (name, form) == ("deep_cnn", "winograd")
        else (name, form)
        for name in NAMES
        for form in FORMS
    ],
)
def test_logits_loss_and_gradients_in_float64(name, form):
    peer = torch_model_of(name)
    images, labels = images_of(0, BATCH), labels_of(0, BATCH)
    logits, loss, gradients = torch_gradients(peer, images, labels)
    with jax.enable_x64(True):
        params = params_with(name, numpy_state(peer), np.float64)
        ours, our_loss, our_gradients = float64_step(name, form)(params, images, labels)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-11 * np.abs(logits).max())
        assert abs(float(our_loss) - loss) < 1e-11
        assert_close(to_torch(our_gradients), gradients, 1e-11)


LONG_NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "deep_cnn" else name for name in NAMES
]
LONG = [form if form == LONG_FORM else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "momentum" else pytest.mark.slow)
        for kind in OPTIMIZERS
    ],
)
@pytest.mark.parametrize("form", LONG)
@pytest.mark.parametrize("name", LONG_NAMES)
def test_weights_after_100_steps_in_float64(name, form, kind):
    losses, weights = torch_training(name, kind)
    start = numpy_state(torch_model_of(name))
    with jax.enable_x64(True):
        init, update = float64_update(name, kind)
        params, ours = params_with(name, start, np.float64), []
        state = init(params)
        for i in range(STEPS):
            images, labels = images_of(i, BATCH), labels_of(i, BATCH)
            _, loss, gradients = float64_step(name, form)(params, images, labels)
            params, state = update(params, state, gradients)
            ours.append(loss)
        assert_close(to_torch(params), weights, TOLERANCES[kind])
    np.testing.assert_allclose(ours, losses, rtol=1e-9)
    moved = [np.abs(weights[n] - start[n]).max() / np.abs(start[n]).max() for n in weights]
    assert min(moved) > 1e-3, "the weights hardly moved: nothing was compared"


@functools.cache
def torch_training(name, kind):
    """Returns 100 losses and the weights after those steps, from PyTorch."""
    model = torch_model_of(name)
    optimizer = OPTIMIZERS[kind][1](model.parameters())
    losses = []
    for i in range(STEPS):
        optimizer.zero_grad()
        labels = torch.tensor(labels_of(i, BATCH)).long()
        loss = torch.nn.functional.cross_entropy(model(to_nchw(images_of(i, BATCH))), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.copy() for name, value in numpy_state(model).items()}


@pytest.mark.parametrize("form", ["lax", "auto"])
@pytest.mark.parametrize(
    "recipe", ["tutorial", pytest.param("deep", marks=pytest.mark.slow), "dropout"]
)
def test_float32_on_real_images(recipe, form, cifar10):
    """As trained: uint8 in, normalised in the step, float32. Logits agree to 2e-5 of the
    largest, gradients to 1e-4 of each entry's largest."""
    recipe = RECIPES[recipe]
    images = np.array(cifar10.splits["train"].images[:20])
    labels = np.array(cifar10.splits["train"].labels[:20])
    mean, std = NORMALIZATIONS[recipe.normalize]
    scaled = (torch.tensor(images).float() / 255 - mean[0]) / std[0]
    peer = torch_model_of(recipe.model, torch.float32)
    logits, loss, gradients = torch_gradients(peer, scaled.numpy(), labels)

    options = {
        "model": MODELS[recipe.model](lowering=form, **options_of(recipe.model)),
        "preprocess": make_preprocess(recipe.normalize),
    }

    @functools.partial(jax.jit, compiler_options=quick_options())
    def all_steps(params, batch):
        variables = {"params": params}
        after, _ = train_step(state_with(params), batch, optimizer=KEEP_GRADIENT, **options)
        tested = eval_step(variables, batch, **options)
        return after.opt_state, tested, predict_step(variables, batch["image"], **options)

    params = params_with(recipe.model, numpy_state(peer), np.float32)
    ours, tested, our_logits = all_steps(params, {"image": images, "label": labels})
    assert_close(to_torch(ours), gradients, 1e-4)
    np.testing.assert_allclose(our_logits, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
    assert abs(float(tested["loss"]) / 20 - loss) < 1e-5
    assert int(tested["correct"]) == (logits.argmax(1) == labels).sum()


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_go_to_pytorch_and_come_back(name):
    image, rng = jnp.zeros((1, 32, 32, 3)), np.random.default_rng(5)
    shapes = jax.eval_shape(MODELS[name]().init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    exported = to_torch(params)
    peer = TORCH_MODELS[name]()
    peer.load_state_dict({k: torch.tensor(v) for k, v in exported.items()}, strict=True)
    jax.tree.map(np.testing.assert_array_equal, from_torch(exported, params), dict(params))


def test_vgg_layers_are_named_as_torchvision_names_them():
    """Configuration D cut down: names by container and number, 7x7 before the linear layers."""
    rng = np.random.default_rng(0)
    shapes = {
        "features_2": (3, 3, 4, 6),
        "features_0": (3, 3, 3, 4),
        "features_10": (3, 3, 6, 8),
        "classifier_0": (7 * 7 * 8, 12),
        "classifier_3": (12, 12),
        "classifier_6": (12, 5),
    }
    params = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[-1])}
        for name, shape in shapes.items()
    }
    state = to_torch(params)
    assert set(state) == {
        f"{layer}.{part}"
        for layer in (
            *(f"features.{i}" for i in (0, 2, 10)),
            *(f"classifier.{i}" for i in (0, 3, 6)),
        )
        for part in ("weight", "bias")
    }
    pooled = rng.normal(size=(2, 7, 7, 8))
    ours = pooled.reshape(2, -1) @ params["classifier_0"]["kernel"]
    theirs = torch.flatten(to_nchw(pooled), 1) @ torch.tensor(state["classifier.0.weight"]).T
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(
        state["features.10.weight"], params["features_10"]["kernel"].transpose(3, 2, 0, 1)
    )
    back = from_torch(state, params)
    assert list(back) == list(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_that_do_not_fit_are_all_listed():
    state = numpy_state(torch_model_of("tutorial_cnn"))
    params = params_with("tutorial_cnn", state, np.float32)
    del state["fc2.bias"]
    state["conv1.weight"] = state["conv1.weight"][:5]
    state["fc9.weight"] = np.zeros(3)
    with pytest.raises(UserError) as raised:
        from_torch(state, params)
    message = str(raised.value)
    assert "fc2.bias is missing" in message
    assert "conv1.weight has shape [5, 3, 5, 5], the model needs [6, 3, 5, 5]" in message
    assert "fc9.weight is not of this model" in message
