"""Plain convolutions and pools computed in other forms: the same numbers, the same gradients."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from cifar_jax.models import plain
from cifar_jax.ops.rewrite import rewritten


def compared(function, *args, lowering="auto"):
    """Returns (results and gradients of a random projection) of `function` and of its rewritten
    form, and what was noted."""
    fast = rewritten(function, lowering)

    def both(function):
        def loss(*args):
            y = function(*args)
            weights = np.random.default_rng(7).normal(size=y.shape)
            return (y.astype(jnp.float32) * weights.astype(np.float32)).sum(), y

        gradients = jax.grad(loss, tuple(range(len(args))), has_aux=True)
        return jax.tree.leaves(jit(gradients)(*args))

    plainly, quickly, notes = both(function), both(fast), collections.Counter()
    jax.eval_shape(
        rewritten(function, lowering, lambda kind, form: notes.update([f"{kind} {form}"])),
        *args,
    )
    return plainly, quickly, dict(notes)


def assert_close(got, want, tolerance):
    """Within `tolerance` of the largest number of each array."""
    for found, expected in zip(got, want, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def images(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def of_layer(layer, x, tolerance=2e-5, **options):
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    want, got, notes = compared(layer.apply, variables, x, **options)
    assert_close(got, want, tolerance)
    return notes


CONVOLUTIONS = {
    "same": ({}, "gemm"),
    "valid": ({"padding": "VALID"}, "gemm"),
    "number": ({"padding": 2, "kernel_size": (5, 5)}, "winograd"),
    "uneven padding": ({"padding": ((0, 2), (1, 0))}, "gemm"),
    "even kernel": ({"kernel_size": (2, 2)}, "gemm"),
    "no bias": ({"use_bias": False, "kernel_size": (7, 7)}, "gemm"),
    "circular": ({"padding": "CIRCULAR"}, "gemm"),
    "masked": ({"mask": np.tril(np.ones((3, 3)))[:, :, None, None] * np.ones((3, 8))}, "gemm"),
    "stride": ({"strides": 2}, "patches"),
    "strides": ({"strides": (1, 3), "padding": ((1, 0), (0, 2))}, "patches"),
    "stem": ({"strides": 2, "kernel_size": (7, 7), "padding": 3}, "patches"),
    "oblong": ({"kernel_size": (3, 5)}, "patches"),
    "dilated": ({"kernel_dilation": (2, 3)}, "patches"),
    "1x1": ({"kernel_size": (1, 1)}, "patches"),
    "1x1 strided": ({"kernel_size": (1, 1), "strides": 2, "padding": "VALID"}, "patches"),
    "half": ({"dtype": jnp.bfloat16}, "gemm"),
    "half strided": ({"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "strides": 2}, "patches"),
    "precise": ({"kernel_size": (5, 5), "precision": "highest"}, "gemm"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name):
    options, form = CONVOLUTIONS[name]
    layer = nn.Conv(8, **{"kernel_size": (3, 3), **options})
    # bfloat16 holds 8 bits; XLA adds such products up in another order, and rounds between.
    tolerance = 2e-2 if "half" in name else 2e-5
    assert of_layer(layer, images(3, 9, 10, 3), tolerance) == {f"convolution {form}": 1}


def test_a_layer_without_shared_weights_cuts_its_patches_by_a_convolution():
    assert of_layer(nn.ConvLocal(4, (3, 3)), images(2, 6, 6, 3)) == {"convolution patches": 1}


@pytest.mark.parametrize("features", [6, 12])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution_in_groups(features, groups, strides):
    layer = nn.Conv(features, (3, 3), feature_group_count=groups, strides=strides)
    assert of_layer(layer, images(2, 7, 8, 6)) == {"convolution patches": 1}


@pytest.mark.parametrize("shape", [(9, 9, 16), (2, 3, 9, 9, 16)], ids=["one", "two axes"])
def test_other_numbers_of_batch_axes(shape):
    assert of_layer(nn.Conv(4, (3, 3)), images(*shape)) == {"convolution winograd": 1}


def pooled(x, padding="VALID", window=(2, 2), strides=(2, 2)):
    return nn.max_pool(x, window, strides, padding)


POOLS = {
    "2x2": {},
    "padded": {"padding": ((1, 0), (0, 1))},
    "overlapping": {"window": (3, 3), "padding": "SAME"},
    "stride 1": {"window": (2, 3), "strides": (1, 1)},
    "apart": {"window": (2, 2), "strides": (3, 3)},
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_and_ties_in_it(name):
    x = np.random.default_rng(0).integers(0, 3, (3, 9, 8, 4)).astype(np.float32)
    want, got, notes = compared(functools.partial(pooled, **POOLS[name]), x)
    assert_close(got, want, 1e-6)
    assert notes == {"pool windows": 1}


# Several layers


class Stack(nn.Module):
    """Convolutions with what may follow one; `kind` says what comes between."""

    kind: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        if self.kind == "own gradient":
            x = relu_with_a_leaking_gradient(x)
        elif self.kind == "maximum":
            x = jnp.maximum(x, 0)
        else:
            before, x = x, nn.relu(x)
        if self.kind == "read twice":
            x = x + before.mean()
        x = pooled(x)
        x = nn.Conv(6, (3, 3), padding="VALID")(x)
        return nn.Dense(5)(nn.relu(x).reshape(x.shape[0], -1))


@jax.custom_jvp
def relu_with_a_leaking_gradient(x):
    return jax.nn.relu(x)


@relu_with_a_leaking_gradient.defjvp
def _leaking(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jax.nn.relu(x), jnp.where(x > 0, dx, 0.5 * dx)


@pytest.mark.parametrize("kind", ["", "own gradient", "maximum", "read twice"])
def test_bias_relu_and_pool_go_with_their_convolution_where_nothing_else_reads_them(kind):
    notes = of_layer(Stack(kind), images(4, 12, 11, 3))
    alone = {} if kind == "" else {"pool windows": 1}
    assert notes == {"convolution gemm": 1, "convolution winograd": 1, **alone}


@pytest.mark.parametrize("lowering", ["gemm", "winograd"])
def test_the_form_that_is_asked_for(lowering):
    assert of_layer(Stack(), images(4, 12, 12, 3), lowering=lowering) == {
        f"convolution {lowering}": 2
    }


def test_within_jit_and_remat_and_over_many_weights():
    model = Stack()
    x = images(4, 12, 12, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    notes = of_layer(nn.jit(nn.remat(Stack))(), x)
    assert notes == {"convolution gemm": 1, "convolution winograd": 1}
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    each = jax.vmap(rewritten(model.apply), (0, None))
    want = [model.apply(jax.tree.map(lambda leaf, i=i: leaf[i], many), x) for i in range(2)]
    assert_close([jit(each)(many, x)], [jnp.stack(want)], 2e-5)


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda module, x, _: (nn.Conv(3, (3, 3))(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return body(self, x, None)[0]


@pytest.mark.parametrize(
    ("layer", "x", "notes"),
    [
        (nn.ConvTranspose(4, (3, 3), (2, 2)), images(2, 6, 6, 3), {"convolution lax": 1}),
        (nn.Conv(4, (3,)), images(2, 6, 3), {"convolution lax": 1}),
        (
            nn.Conv(4, (3, 3), input_dilation=2, padding=1),
            images(2, 6, 6, 3),
            {"convolution lax": 1},
        ),
        (Loop(), images(2, 6, 6, 3), {"convolution lax": 1}),
    ],
    ids=["transposed", "one axis", "input dilation", "scan"],
)
def test_what_is_left_as_it_is(layer, x, notes):
    assert of_layer(layer, x, tolerance=1e-6) == notes


# A model whose `apply` is rewritten


def test_a_model_keeps_its_names_and_values():
    model, x = Stack(), images(4, 12, 12, 3)
    fast = plain.fast(model)
    assert fast == plain.fast(Stack())
    assert isinstance(fast, Stack)
    assert plain.fast(fast, "lax") is fast
    variables = jax.jit(model.init)(jax.random.key(0), x)
    same = jax.jit(fast.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    want = jit(model.apply)(variables, x)
    assert_close([jit(fast.apply)(variables, x)], [want], 2e-5)
    np.testing.assert_array_equal(jit(fast.clone(lowering="lax").apply)(variables, x), want)
    assert plain.forms(fast, x.shape) == {"convolution": {"gemm": 1, "winograd": 1}}
    assert plain.forms(fast.clone(lowering="lax"), x.shape) == plain.forms(model, x.shape) == {}
