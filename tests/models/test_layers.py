"""Layers: PyTorch's initialisation, its order of features, and parameters shared by lowerings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.models.layers import Conv, ConvRelu, Dense, Flatten


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [(ConvRelu(64, 5), (1, 9, 9, 20), 500), (Dense(200), (1, 300), 300)],
    ids=["conv", "dense"],
)
def test_initialisation_is_pytorchs(layer, shape, fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases alike."""
    params = layer.init(jax.random.key(0), jnp.ones(shape))["params"]
    bound = 1 / np.sqrt(fan_in)
    for name in ("kernel", "bias"):
        values = np.asarray(params[name]).ravel()
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.9 * bound
        error = bound / np.sqrt(3 * values.size)
        assert abs(values.mean()) < 4.5 * error, name
    deciles = np.histogram(params["kernel"], bins=10, range=(-bound, bound))[0] / 6000
    np.testing.assert_allclose(deciles / deciles.mean(), 1, atol=0.08)


def test_parameters_do_not_depend_on_the_lowering():
    x = jnp.ones((2, 12, 12, 3))
    drawn = [
        ConvRelu(4, 3, lowering=form).init(jax.random.key(3), x)
        for form in ("lax", "gemm", "winograd", "auto")
    ]
    assert drawn[0]["params"]["kernel"].shape == (3, 3, 3, 4)
    for other in drawn[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, drawn[0])


@pytest.mark.parametrize("lowering", ["lax", "gemm", "winograd"])
def test_flatten_is_row_by_row_channels_fastest(lowering):
    """Through an identity kernel the flattened features are the input's own."""
    x = jax.random.uniform(jax.random.key(0), (2, 6, 7, 3))  # positive: relu changes nothing
    kernel = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    params = {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}
    blocked = ConvRelu(3, 3, padding=1, lowering=lowering).apply(params, x)
    np.testing.assert_allclose(Flatten().apply({}, blocked), x.reshape(2, -1), atol=1e-5)


@pytest.mark.parametrize("lowering", ["lax", "gemm", "winograd"])
def test_conv_has_no_relu(lowering):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    layer = Conv(5, 3, padding=1, lowering=lowering)
    params = layer.init(jax.random.key(0), x)
    y = layer.apply(params, x)
    assert y.shape == (2, 8, 8, 5)
    assert (y < 0).any()
    both = ConvRelu(5, 3, padding=1, lowering="lax").apply(params, x)
    np.testing.assert_allclose(jnp.maximum(y, 0), both, atol=1e-5)
    bare = Conv(5, 3, padding=1, use_bias=False, lowering=lowering)
    assert set(bare.init(jax.random.key(0), x)["params"]) == {"kernel"}
