"""VGG against PyTorch's: layers, the adaptive pool, logits, gradients, training.

The networks here are configuration D with few channels, built by the same code as the full one,
whose turn is in the tests marked slow. Comparisons in float64 leave rounding no room.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

pytestmark = pytest.mark.extended

torch = pytest.importorskip("torch", reason="parity is checked against PyTorch")

from benchmarks import torch_models  # noqa: E402
from cifar_jax.models import make_model  # noqa: E402
from cifar_jax.models.fold import normal_blocks  # noqa: E402
from cifar_jax.models.layers import kaiming_normal  # noqa: E402
from cifar_jax.models.vgg import VGG, VGG16, adaptive_average_pool  # noqa: E402
from cifar_jax.optimizers import make_optimizer  # noqa: E402
from cifar_jax.parallel.programs import compiler_options  # noqa: E402
from cifar_jax.recipes import Recipe  # noqa: E402
from cifar_jax.weights.state_dict import from_torch, to_torch  # noqa: E402

SMALL = tuple(layer if layer == "M" else max(layer // 64, 3) for layer in VGG16)
HIDDEN = 24


def small(**options):
    options = {"layers": SMALL, "hidden": HIDDEN, "dropout_rate": 0.0, "lowering": "lax"} | options
    return VGG(**options)


@functools.cache
def peer():
    """PyTorch's, in float64, with linear weights large enough to make every layer matter."""
    torch.manual_seed(0)
    model = torch_models.VGG(dropout_rate=0.0, layers=SMALL, hidden=HIDDEN).double()
    for name, weight in model.named_parameters():
        if name.startswith("classifier") or name.endswith("bias"):
            torch.nn.init.normal_(weight, 0, 0.1)
    return model


def params_of(state, dtype=np.float64, **options):
    """Our parameters with the weights of a state dict."""
    model = small(**options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    state = {name: value.detach().numpy() for name, value in state.items()}
    return jax.tree.map(jnp.asarray, from_torch(state, template))


def images_of(seed, count, size=32, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size, 3)).astype(dtype)


def to_nchw(images):
    return torch.tensor(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))


def loss_of(model, params, images, labels):
    logits = model.apply({"params": params}, images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def assert_close(ours, theirs, tolerance):
    """Largest difference of each entry against that entry's largest value."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        scale = np.abs(value).max()
        assert scale > 0, f"{name}: all zero, nothing is compared"
        worst = np.abs(np.asarray(ours[name]) - value).max() / scale
        assert worst < tolerance, f"{name}: relative difference {worst:.2e}"


PARAMETERS = {"vgg16": 134_301_514, "vgg11_bn": 9_231_114, "vgg16_bn": 14_728_266}


@pytest.mark.parametrize("name", PARAMETERS)
def test_layers_are_torchvisions(name):
    """Names, shapes and count, all without allocating a weight."""
    shapes = jax.eval_shape(make_model(name).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]
    with torch.device("meta"):
        theirs = torch_models.MODELS[name]()
    weights = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    ours = {}
    for layer, entries in shapes["params"].items():
        for entry, value in entries.items():
            layer_name = layer.replace("_", ".")
            part = "bias" if entry == "bias" else "weight"
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
            ours[f"{layer_name}.{part}"] = tuple(value.shape[axis] for axis in order)
    assert ours == weights


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9), (7, 7), (8, 10), (14, 14), (20, 3)])
def test_adaptive_pool_has_pytorchs_bins(size):
    images = np.random.default_rng(0).normal(size=(2, *size, 3))
    with jax.enable_x64(True):
        ours = np.asarray(adaptive_average_pool(jnp.asarray(images), 7))
    theirs = torch.nn.functional.adaptive_avg_pool2d(to_nchw(images), 7).numpy()
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_logits(size):
    """Feature maps of 1, 2 and 7 pixels a side."""
    images = images_of(size, 2, size)
    with torch.no_grad():
        theirs = peer()(to_nchw(images)).numpy()
    with jax.enable_x64(True):
        params = params_of(peer().state_dict())
        ours = np.asarray(jit(small().apply)({"params": params}, jnp.asarray(images)))
    assert np.ptp(theirs, axis=0).max() > 1e-3 * np.abs(theirs).max(), "the images hardly matter"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


def test_gradients_and_weights_after_ten_adam_steps():
    model, torch_model = small(), peer()
    start = {name: value.clone() for name, value in torch_model.state_dict().items()}
    theirs = torch.optim.Adam(torch_model.parameters(), lr=1e-3)
    optimizer = optax.adam(1e-3)
    with jax.enable_x64(True):
        params = params_of(start)

        @jit
        def step(params, state, images, labels):
            gradients = jax.grad(functools.partial(loss_of, model))(params, images, labels)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), state, gradients

        state = optimizer.init(params)
        for i in range(10):
            images, labels = images_of(i, 4), np.arange(4, dtype=np.int32) + i % 6
            params, state, gradients = step(params, state, jnp.asarray(images), labels)
            theirs.zero_grad()
            logits = torch_model(to_nchw(images))
            torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long()).backward()
            if i == 0:
                wanted = {n: w.grad for n, w in torch_model.named_parameters()}
                assert_close(to_torch(gradients), wanted, 1e-11)
            theirs.step()
        # Adam divides by |g| + 1e-8, and so makes the rounding of a tiny gradient larger.
        assert_close(to_torch(params), torch_model.state_dict(), 1e-7)
    torch_model.load_state_dict(start)


def test_initialisation_is_torchvisions():
    """Standard deviations, against what PyTorch draws, to five standard errors."""
    ours = np.asarray(kaiming_normal(jax.random.key(0), (3, 3, 32, 64)))
    layer = torch.nn.Conv2d(32, 64, 3)
    torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    allowed = 5 / math.sqrt(2 * ours.size)
    assert ours.std() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=allowed)
    assert ours.std() == pytest.approx(layer.weight.std().item(), rel=2 * allowed)
    kernel = np.asarray(normal_blocks(0.01)(jax.random.key(1), (49 * 8, 16)))
    assert kernel.std() == pytest.approx(0.01, rel=5 / math.sqrt(2 * kernel.size))
    assert len({block.tobytes() for block in kernel.reshape(49, 8, 16)}) == 49
    few = small(layers=(4, "M"))
    params = jit(few.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))["params"]
    assert all(not np.asarray(layer["bias"]).any() for layer in params.values())
    assert np.asarray(params["classifier_3"]["kernel"]).std() == pytest.approx(0.01, rel=0.15)


@pytest.mark.slow
def test_full_size_in_float32():
    """VGG16 as it is: logits at three sizes (convolutions of `auto`), then gradients and what ten
    Adam steps change (`lax`, the most exact). Relu and pool decide ties by rounding, and Adam
    makes a whole step of a gradient that is rounding alone, so those are compared by norms."""
    torch.manual_seed(0)
    theirs = torch_models.VGG(dropout_rate=0.0)
    for name, weight in theirs.named_parameters():
        if name.startswith("classifier"):
            torch.nn.init.normal_(weight, 0, weight.shape[-1] ** -0.5)
    model = VGG(dropout_rate=0.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    params = jax.tree.map(jnp.asarray, from_torch(state, shapes))
    start = {name: value.copy() for name, value in state.items()}
    full = functools.partial(jax.jit, compiler_options=compiler_options())
    apply = full(model.apply)
    for size in (32, 64, 224):
        images = images_of(size, 2, size, np.float32)
        with torch.no_grad():
            want = theirs(to_nchw(images)).numpy()
        ours = np.asarray(apply({"params": params}, images))
        np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4 * np.abs(want).max())

    def off(ours, wanted):
        return {
            name: float(np.linalg.norm(ours[name] - value) / np.linalg.norm(value))
            for name, value in wanted.items()
        }

    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4)
    adam = make_optimizer(Recipe(optimizer="adam", learning_rate=1e-4), 10)

    @functools.partial(full, donate_argnums=(0, 1))
    def update(params, state, gradients):
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradient = full(jax.grad(functools.partial(loss_of, model.clone(lowering="lax"))))
    moments = adam.init(params)
    for i in range(10):
        images, labels = images_of(i, 4, dtype=np.float32), np.arange(4, dtype=np.int32) + i % 6
        gradients = gradient(params, images, labels)
        optimizer.zero_grad()
        logits = theirs(to_nchw(images))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long()).backward()
        if i == 0:
            wanted = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
            worst = max(off(to_torch(gradients), wanted).values())
            print(f"gradients: {worst:.1e}")
            assert worst < 1e-4
        params, moments = update(params, moments, gradients)
        del gradients
        optimizer.step()
    ours = {name: value - start[name] for name, value in to_torch(params).items()}
    wanted = {n: value.numpy() - start[n] for n, value in theirs.state_dict().items()}
    worst = max(off(ours, wanted).values())
    print(f"changes of ten steps: {worst:.1e}")
    assert worst < 0.02
