"""Every lowering computes the same convolution, and the same gradients, as `lax` does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from quick import jit

from cifar_jax.models import make_model
from cifar_jax.ops import layout, pool, winograd
from cifar_jax.ops.convolution import (
    choose,
    convolve,
    cpu_compiler_options,
    takes_pieces,
    to_images,
)
from cifar_jax.ops.im2col import Geometry
from cifar_jax.runtime.errors import UserError

# batch, height, width, channels, features, kernel, padding, pool
SHAPES = [
    (2, 8, 8, 3, 4, 3, 1, True),
    (3, 7, 9, 2, 5, 3, 1, True),  # nothing a multiple of a block; the pool drops a row
    (2, 13, 10, 3, 4, 5, 0, True),
    (2, 13, 10, 3, 4, 5, 2, False),
    (1, 32, 32, 3, 6, 5, 0, True),
    (1, 5, 5, 2, 3, 5, 0, False),  # one output
    (2, 2, 2, 4, 6, 3, 1, True),
    (2, 1, 1, 4, 6, 3, 1, False),
    (2, 7, 5, 3, 4, 1, 1, False),
    (2, 5, 6, 3, 4, 2, 0, True),  # an even kernel
    (2, 9, 10, 8, 5, 3, 1, True),  # more channels than Winograd's form sums up one by one
    (1, 3, 3, 2, 2, 7, 3, False),
    (2, 6, 9, 3, 4, 3, 2, True),  # more padding than "same"
]


def _arrays(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def _value_and_gradients(function, arguments, cotangent):
    value, pull = jax.vjp(function, *arguments)
    return value, *pull(cotangent(value))


def _weights_like(value):
    """Fixed pseudo-random cotangents, so that no gradient is a plain sum."""
    return jnp.sin(jnp.arange(value.size, dtype=value.dtype) * 1.7).reshape(value.shape)


def _all_lowerings(arguments, lowerings=("lax", "gemm", "winograd", "pieces"), **options):
    @jit
    def run(arguments):
        def one(lowering):
            def apply(*a):
                return to_images(convolve(*a, lowering=lowering, **options))

            return _value_and_gradients(apply, arguments, _weights_like)

        return {lowering: one(lowering) for lowering in lowerings}

    return jax.device_get(run(arguments))


def _assert_same(results, tolerance):
    for lowering, arrays in results.items():
        names = ("output", "d input", "d kernel", "d bias")[: len(arrays)]
        for name, got, want in zip(names, arrays, results["lax"], strict=True):
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < tolerance, f"{lowering}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_lowerings_agree_in_float64(shape):
    n, h, w, c, f, k, padding, pool = shape
    with jax.enable_x64(True):
        arguments = _arrays(0, (n, h, w, c), (k, k, c, f), (f,))
        results = _all_lowerings(arguments, padding=padding, pool=pool)
    _assert_same(results, 1e-12)


@pytest.mark.parametrize(
    "shape",
    [(2, 11, 14, 3, 4, 3, 1, False), (1, 13, 12, 2, 3, 5, 0, True), (2, 9, 10, 8, 5, 3, 1, True)],
)
def test_a_column_at_a_time_is_the_same(shape, monkeypatch):
    """As for large layers: Winograd's positions in n parts."""
    monkeypatch.setattr(winograd, "COLUMN_FROM_BYTES", 0)
    monkeypatch.setattr(winograd, "SUM_COLUMN_FROM_BYTES", 0)
    assert len(winograd._parts(6, 3, 3, 10, 4)) == 6
    test_lowerings_agree_in_float64(shape)


@pytest.mark.parametrize("channels", [3, 70])
@pytest.mark.parametrize("limit", [0, winograd.COLUMN_FROM_BYTES])
def test_without_a_gradient_the_output_is_the_same(channels, limit, monkeypatch):
    """Evaluation multiplies by transposed kernels."""
    monkeypatch.setattr(winograd, "COLUMN_FROM_BYTES", limit)
    monkeypatch.setattr(winograd, "SUM_COLUMN_FROM_BYTES", limit)
    with jax.enable_x64(True):
        x, kernel = _arrays(5, (2, 9, 10, channels), (3, 3, channels, 70))
        run = jit(
            lambda x, k, how: to_images(convolve(x, k, padding=1, lowering=how)),
            static_argnames="how",
        )
        want = np.asarray(run(x, kernel, how="lax"))
        for lowering in ("gemm", "winograd"):
            got = np.asarray(run(x, kernel, how=lowering))
            assert np.abs(got - want).max() < 1e-12 * np.abs(want).max()


def test_mixed_is_winograd_without_a_gradient_and_gemm_with_one():
    x, kernel, bias = _arrays(9, (3, 14, 14, 6), (5, 5, 6, 16), (16,), dtype=np.float32)
    assert choose("auto", 5, 6, (10, 10), True)[0] == "mixed"

    def forward(lowering):
        return lambda *a: to_images(convolve(*a, pool=True, lowering=lowering))

    # F(2, 5), on the blocks that `gemm` takes too.
    def two_by_two(x, kernel, bias):
        phases = layout.to_blocked(x, 2)
        g = Geometry(2, 5, 0, 3, 14, 14, phases.tiles, True)
        y = winograd.winograd_conv(phases.phases, kernel, g)
        return to_images(layout.Blocked(pool.bias_relu_pool(y, bias), 3, 5, 5))

    got, want = (jit(f)(x, kernel, bias) for f in (forward("auto"), two_by_two))
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - jit(forward("gemm"))(x, kernel, bias)).max() > 0

    def with_gradients(*a):
        return [
            _value_and_gradients(forward(lowering), a, _weights_like)
            for lowering in ("auto", "gemm")
        ]

    for a, b in zip(*jit(with_gradients)(x, kernel, bias), strict=True):
        np.testing.assert_array_equal(a, b)


# The layers of the models, as (channels, features, kernel, padding, size).
LAYERS = [
    (3, 16, 3, 1, 32),
    (3, 6, 5, 0, 32),
    (32, 64, 3, 1, 8),
    (10, 20, 5, 0, 28),
    (128, 128, 3, 1, 4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "-".join(map(str, s)))
def test_layers_in_float32(layer):
    """Without relu and pool, whose ties may fall either way: to 5e-6 of the largest value with
    `gemm` and 5e-5 with `winograd`, whose transforms round more (F(4, 5) the most)."""
    c, f, k, padding, size = layer
    x, kernel = _arrays(1, (4, size, size, c), (k, k, c, f), dtype=np.float32)
    kernel = kernel / np.float32(np.sqrt(k * k * c))
    arguments = [x, kernel]
    for lowering, tolerance in (("gemm", 5e-6), ("winograd", 5e-5)):
        results = _all_lowerings(arguments, ("lax", lowering), padding=padding)
        _assert_same(results, tolerance)


def test_bfloat16_is_rounded_once_a_layer():
    """The block forms compute in float32: no worse than one rounding of the exact result."""
    x, kernel, bias = _arrays(2, (2, 12, 12, 8), (5, 5, 8, 6), (6,), dtype=np.float32)
    low = x.astype(jnp.bfloat16)
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel, bias)]
    exact = to_images(convolve(*rounded, lowering="lax"))
    for lowering in ("gemm", "winograd"):
        got = to_images(convolve(low, kernel, bias, lowering=lowering))
        assert got.dtype == jnp.bfloat16
        error = jnp.abs(got.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
        assert error < 2**-8, lowering


def _chain(lowerings, x, first, second, bias):
    """Odd sizes between two layers: what hangs over the edge must not leak into the second."""
    x = convolve(x, first, bias, padding=1, pool=True, lowering=lowerings[0])
    x = convolve(x, second, bias, padding=1, lowering=lowerings[1])
    return to_images(convolve(x, second, bias, lowering=lowerings[1]))


@pytest.mark.parametrize(
    "lowerings", [("gemm", "winograd"), ("winograd", "gemm"), ("gemm", "lax"), ("lax", "gemm")]
)
def test_layers_of_different_lowerings_follow_each_other(lowerings):
    with jax.enable_x64(True):
        arguments = _arrays(3, (2, 11, 14, 2), (3, 3, 2, 3), (3, 3, 3, 3), (3,))
        arguments[-1] = jnp.abs(arguments[-1])  # a bias makes the overhang non-zero
        run = jit(
            lambda a: [
                _value_and_gradients(functools.partial(_chain, forms), a, _weights_like)
                for forms in (lowerings, ("lax", "lax"))
            ]
        )
        for got, want in zip(*jax.device_get(run(arguments)), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


def _loss(lowering, x, kernel, bias):
    y = to_images(convolve(x, kernel, bias, padding=1, pool=True, lowering=lowering))
    return (y * _weights_like(y)).sum()


@pytest.mark.parametrize("lowering", ["gemm", "winograd"])
def test_vmap_is_a_loop(lowering):
    with jax.enable_x64(True):
        stacked = _arrays(4, (3, 2, 8, 8, 3), (3, 3, 3, 3, 4), (3, 4))
        gradients = jax.grad(functools.partial(_loss, lowering), argnums=(0, 1, 2))
        together = jit(jax.vmap(gradients))(*stacked)
        one = jit(gradients)
        for i in range(3):
            for got, want in zip(together, one(*(a[i] for a in stacked)), strict=True):
                np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-12)
        text = jit(jax.vmap(gradients)).lower(*stacked).as_text()
        assert "stablehlo.convolution" not in text  # a grouped convolution is what is avoided


@pytest.mark.parametrize("lowering", ["gemm", "winograd"])
def test_scan_is_a_loop(lowering):
    with jax.enable_x64(True):
        x, kernel, bias = _arrays(5, (3, 2, 8, 8, 3), (3, 3, 3, 4), (4,))
        gradient = jax.grad(functools.partial(_loss, lowering), argnums=1)

        def step(kernel, batch):
            kernel = kernel - 0.01 * gradient(batch, kernel, bias)
            return kernel, kernel.sum()

        scanned, _ = jit(lambda: lax.scan(step, kernel, x))()
        for batch in x:
            kernel, _ = jit(step)(kernel, batch)
        np.testing.assert_allclose(scanned, kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lowering", ["gemm", "winograd"])
@pytest.mark.parametrize("check", [True, False])
def test_shard_map_sums_the_shards(lowering, check):
    """Gradients of replicated parameters over a split batch, with and without vma checks."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(True):
        x, kernel, bias = _arrays(6, (4, 8, 8, 3), (3, 3, 3, 4), (4,))

        def local(x, kernel, bias):
            y = to_images(convolve(x, kernel, bias, padding=1, pool=True, lowering=lowering))
            return (y**3).sum()

        def gradients(x, kernel, bias):
            out = jax.grad(local, argnums=(1, 2))(x, kernel, bias)
            return out if check else lax.psum(out, "data")

        spec = PartitionSpec
        split = jax.shard_map(
            gradients,
            mesh=mesh,
            in_specs=(spec("data"), spec(), spec()),
            out_specs=spec(),
            check_vma=check,
        )
        got = jit(split)(x, kernel, bias)
        want = jit(jax.grad(local, argnums=(1, 2)))(x, kernel, bias)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11)


def test_a_sharded_jit_gives_the_same():
    """Correct, though it gathers the batch: on several CPU devices `shard_map` is the fast way."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (
        jax.sharding.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ())
    )
    with jax.enable_x64(True):
        arguments = _arrays(6, (4, 8, 8, 3), (3, 3, 3, 4), (4,))
        gradients = jax.grad(functools.partial(_loss, "gemm"), argnums=(0, 1, 2))
        got = jit(gradients, in_shardings=(split, whole, whole))(*arguments)
        for a, b in zip(got, jit(gradients)(*arguments), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


# All three with every form, one at a time, stand against PyTorch in test_parity_torch.py.
SLOW = [pytest.param("deep_cnn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", ["tutorial_cnn", "dropout_cnn", *SLOW])
def test_models_agree_in_float64(name):
    """Logits and every gradient of whole models, whose `auto` mixes the forms, against lax."""
    with jax.enable_x64(True):
        x = _arrays(7, (2, 32, 32, 3))[0]
        variables = jit(make_model(name).init)(jax.random.key(0), x.astype(jnp.float32))
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)

        @jit
        def run(variables, x):
            def one(lowering):
                model = make_model(name, lowering=lowering)
                return _value_and_gradients(model.apply, (variables, x), _weights_like)

            return {form: one(form) for form in ("lax", "auto")}

        results = jax.device_get(run(variables, x))
    for lowering, result in results.items():
        for (path, got), want in zip(
            jax.tree.leaves_with_path(result), jax.tree.leaves(results["lax"]), strict=True
        ):
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < 1e-11, f"{lowering} {jax.tree_util.keystr(path)}: {error:.1e}"


def test_the_choice_on_a_cpu_and_elsewhere(monkeypatch):
    assert choose("auto", 3, 3, (32, 32), True) == ("gemm", 2)
    assert choose("auto", 5, 3, (28, 28), False) == ("winograd", 4)
    assert choose("auto", 5, 6, (10, 10), True) == ("mixed", 2)
    assert choose("auto", 7, 3, (26, 26), False) == ("gemm", 4)
    assert choose("auto", 3, 64, (8, 8), True) == ("winograd", 4)
    assert choose("auto", 3, 512, (2, 2), True) == ("winograd", 2)
    assert choose("auto", 7, 64, (8, 8), False)[0] == "gemm"  # no such Winograd form
    assert takes_pieces("auto", 1000)
    assert not takes_pieces("auto", 128)
    assert choose("pieces", 3, 64, (8, 8), True) == ("pieces", 1)
    assert choose("pieces", 5, 64, (8, 8), True, images=1000)[0] == "gemm"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("auto", 3, 64, (8, 8), True)[0] == "lax"
    assert choose("auto", 5, 6, (10, 10), True, images=4) == ("patches", 1)
    assert choose("auto", 5, 6, (10, 10), True, images=512) == ("lax", 1)
    assert choose("winograd", 3, 64, (8, 8), True)[0] == "winograd"
    assert not takes_pieces("auto", 1000)
    assert cpu_compiler_options() == {}


def test_bad_lowerings_and_sizes_are_user_errors():
    x, kernel, bias = _arrays(8, (1, 4, 4, 3), (5, 5, 3, 2), (2,), dtype=np.float32)
    with pytest.raises(UserError, match="did you mean 'winograd'"):
        convolve(x, kernel, bias, padding=2, lowering="winograt")
    with pytest.raises(UserError, match="images of 4x4 are too small"):
        convolve(x, kernel, bias)
    one_row = x[:, :1]
    with pytest.raises(UserError, match="1x4 are too small here for a 5x5 convolution with"):
        convolve(one_row, kernel, bias, padding=2, pool=True)


def test_compiler_options_are_accepted_and_the_users_flags_win(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = cpu_compiler_options()
    assert set(options) == {"xla_cpu_experimental_ynn_fusion_type"}
    assert jax.jit(lambda a: a @ a, compiler_options=options)(jnp.eye(3)).shape == (3, 3)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert cpu_compiler_options() == {}


def test_no_gradient_no_winner_index():
    """Evaluation must not pay for what only the gradient needs: no integer array is made."""
    x, kernel, bias = _arrays(9, (2, 8, 8, 3), (3, 3, 3, 4), (4,), dtype=np.float32)
    forward = jit(lambda *a: to_images(convolve(*a, padding=1, pool=True, lowering="gemm")))
    assert "xi32>" not in forward.lower(x, kernel, bias).as_text()


def test_a_stage_is_one_call():
    """What is written out at once is the stage, not each `jnp.where` inside it: on a CPU those
    were loops of their own, and a step of dropout_cnn 5 % slower."""
    y, bias = _arrays(10, (2, 2, 3, 4, 5), (3,), dtype=np.float32)
    both = jit(jax.grad(lambda *a: pool.bias_relu_pool(*a).sum(), argnums=(0, 1)))
    assert both.lower(y, bias).as_text().count("inlineable") == 2  # forward, backward
