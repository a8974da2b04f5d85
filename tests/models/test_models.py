"""The published networks: layers, parameter counts and PyTorch's default initialisation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from scipy import stats

from cifar_jax.models import MODELS, make_model
from cifar_jax.parallel.programs import compile_for_one_call
from cifar_jax.runtime.errors import UserError

# Layer by layer from the write-ups: kernel shape; its product and last entry (the biases) add up.
KERNELS = {
    "tutorial_cnn": {
        "conv1": (5, 5, 3, 6),
        "conv2": (5, 5, 6, 16),
        "fc1": (16 * 5 * 5, 120),
        "fc2": (120, 84),
        "fc3": (84, 10),
    },
    "deep_cnn": {
        "conv1": (5, 5, 3, 10),
        "conv2": (5, 5, 10, 20),
        "conv3": (5, 5, 20, 20),
        "conv4": (5, 5, 20, 10),
        "fc1": (10 * 8 * 8, 800),
        "fc2": (800, 400),
        "fc3": (400, 100),
        "fc4": (100, 10),
    },
    "dropout_cnn": {
        "conv1": (3, 3, 3, 16),
        "conv2": (3, 3, 16, 32),
        "conv3": (3, 3, 32, 64),
        "fc1": (64 * 4 * 4, 500),
        "fc2": (500, 10),
    },
}
# tutorial: 456 + 2,416 + 48,120 + 10,164 + 850
# deep: 760 + 5,020 + 10,020 + 5,010 + 512,800 + 320,400 + 40,100 + 1,010
# dropout: 448 + 4,640 + 18,496 + 512,500 + 5,010
TOTALS = {"tutorial_cnn": 62_006, "deep_cnn": 895_120, "dropout_cnn": 541_094}
SEEDS = 40


@functools.cache
def initial(name):
    """Parameters of SEEDS seeds, stacked."""
    model = MODELS[name](lowering="lax")
    image = jnp.zeros((1, 32, 32, 3))
    draw = compile_for_one_call(lambda key: model.init(key, image), TOTALS[name])
    drawn = [draw(key) for key in jax.random.split(jax.random.key(0), SEEDS)]
    assert set(drawn[0]) == {"params"}
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(each["params"] for each in drawn))


@pytest.mark.parametrize("name", KERNELS)
def test_layers_and_parameter_counts(name):
    params = initial(name)
    assert {layer: value["kernel"].shape[1:] for layer, value in params.items()} == KERNELS[name]
    for layer, shape in KERNELS[name].items():
        assert params[layer]["bias"].shape[1:] == shape[-1:]
        assert params[layer]["kernel"].dtype == params[layer]["bias"].dtype == np.float32
    assert sum(value[0].size for value in jax.tree.leaves(params)) == TOTALS[name]


@pytest.mark.parametrize("name", KERNELS)
def test_initialisation_is_pytorchs_default(name):
    """U(+-1/sqrt(fan_in)) for kernels and biases: range, variance, and a two-sample
    Kolmogorov-Smirnov test against what torch.nn layers of these shapes draw."""
    torch = pytest.importorskip("torch", reason="the yardstick is torch.nn's default")
    torch.manual_seed(0)
    for layer, shape in KERNELS[name].items():
        if len(shape) == 4:
            peers = [torch.nn.Conv2d(shape[2], shape[3], shape[0]) for _ in range(SEEDS // 4)]
        else:
            peers = [torch.nn.Linear(*shape) for _ in range(SEEDS // 4)]
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        for part, theirs in (("kernel", "weight"), ("bias", "bias")):
            ours = initial(name)[layer][part].ravel()
            want = np.concatenate([getattr(p, theirs).detach().numpy().ravel() for p in peers])
            where = f"{layer}.{part}"
            assert np.abs(ours).max() <= bound * (1 + 1e-6), where
            assert np.abs(ours).max() > 0.97 * bound, where
            # The mean square of n uniforms has a relative standard error of sqrt(0.8 / n).
            variance = (ours.astype(float) ** 2).mean() / (bound**2 / 3)
            assert abs(variance - 1) < 4.5 * math.sqrt(0.8 / ours.size), where
            sample = slice(None, None, max(1, ours.size // 20_000))
            found = stats.ks_2samp(ours[sample], want[:20_000])
            assert found.pvalue > 1e-4, f"{where}: {found}"


def test_layers_and_seeds_draw_independently():
    params = initial("deep_cnn")
    first = params["fc2"]["kernel"][:, :20, :20].reshape(SEEDS, -1)
    assert len({row.tobytes() for row in first}) == SEEDS
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.2
    other = params["fc3"]["kernel"][:, :20, :20].reshape(SEEDS, -1)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("name", KERNELS)
def test_an_images_logits_do_not_depend_on_its_batch(name):
    model = MODELS[name]()
    images = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    variables = {"params": jax.tree.map(lambda x: x[0], initial(name))}
    apply = jit(model.apply)
    logits = np.asarray(apply(variables, images))
    assert logits.shape == (5, 10)
    assert logits.dtype == np.float32
    assert np.ptp(logits, axis=0).max() > 1e-3, "every image gives the same logits"
    np.testing.assert_allclose(apply(variables, images[3:4]), logits[3:4], atol=1e-6)


def test_dropout_is_off_in_evaluation_and_right_on_average_in_training():
    model = MODELS["dropout_cnn"]()
    params = jax.tree.map(lambda x: x[0], initial("dropout_cnn"))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    tested = np.asarray(model.apply({"params": params}, image))
    np.testing.assert_array_equal(tested, model.apply({"params": params}, image, train=False))

    @jax.jit
    def trained(key, images):
        rngs = {"dropout": key}
        return model.apply({"params": params}, images, train=True, rngs=rngs)

    # 512 examples of one image: each draws its own mask.
    many = np.asarray(trained(jax.random.key(0), jnp.asarray(image.repeat(512, axis=0))))
    assert len({row.tobytes() for row in many}) == 512
    error = many.std(axis=0) / math.sqrt(512)
    # relu between the two dropouts bends the mean a little, hence the absolute allowance.
    assert (np.abs(many.mean(axis=0) - tested[0]) < 5 * error + 0.01).all()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        # A residual network's last layer reads the mean over a map of any size.
        *((name, 4) for name in MODELS if not name.startswith("resnet")),
        *(("vgg11_bn", 16), ("vgg16_bn", 31)),
    ],
)
def test_images_that_are_too_small(name, side):
    with pytest.raises(UserError, match=r"images of \d+x\d+ are too small here for a"):
        jax.eval_shape(make_model(name).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    with pytest.raises(UserError, match=r"these are \[32, 32, 3\]: a batch axis is missing"):
        jax.eval_shape(make_model(name).init, jax.random.key(0), jnp.zeros((32, 32, 3)))


def test_another_number_of_classes_and_unknown_models():
    model = make_model("tutorial_cnn", num_classes=100)
    logits, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    )
    assert logits.shape == (2, 100)
    assert variables["params"]["fc3"]["kernel"].shape == (84, 100)
    with pytest.raises(UserError, match="did you mean 'dropout_cnn'"):
        make_model("dropout_cn")
