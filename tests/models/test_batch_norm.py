"""Batch normalisation as PyTorch's, in training and after; over devices; and without padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from quick import jit

from cifar_jax.models.layers import BatchNorm
from cifar_jax.models.vgg import VGGBatchNorm
from cifar_jax.steps import (
    TrainState,
    create_state,
    inference_variables,
    make_preprocess,
    predict_step,
    train_step,
)

pytestmark = pytest.mark.extended

LAYERS = (4, 4, "M", 6, "M")
MODEL = VGGBatchNorm(layers=LAYERS, lowering="lax")
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
STEPS, BATCH, COUNTED, SIDE = 3, 8, 5, 8


def batch_of(seed, dtype=np.float32):
    """The last three of eight images are padding, and far from what the others look like."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(BATCH, SIDE, SIDE, 3)).astype(dtype)
    images[COUNTED:] = 7
    mask = (np.arange(BATCH) < COUNTED).astype(np.float32)
    return {"image": images, "label": rng.integers(0, 10, BATCH).astype(np.int32), "mask": mask}


def step_with(**options):
    """`train_step` of the model, on images that are normalised already."""
    preprocess = make_preprocess(precision=options.pop("precision", "float32"))
    return functools.partial(
        train_step, model=MODEL, optimizer=OPTIMIZER, preprocess=preprocess, **options
    )


@functools.cache
def start():
    make = functools.partial(create_state, MODEL, OPTIMIZER, image_shape=(SIDE, SIDE, 3))
    return jit(make)(jax.random.key(0))


@functools.cache
def one_device():
    """The state after the steps, on one device."""
    step, state = jit(step_with()), start()
    for i in range(STEPS):
        state, _ = step(state, batch_of(i))
    return jax.device_get((state.params, state.batch_stats))


def assert_same(got, want, tolerance):
    def compare(path, a, b):
        error = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-3)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(compare, got, want)


def variables_of(model):
    """Our float64 variables with the weights and statistics of a PyTorch module."""
    params, stats = {}, {}
    for name, value in model.state_dict().items():
        layer, part = name.rsplit(".", 1)
        layer, value = layer.replace(".", "_"), value.numpy().copy()
        if part == "weight" and value.ndim > 1:
            axes = (2, 3, 1, 0) if value.ndim == 4 else (1, 0)
            params.setdefault(layer, {})["kernel"] = value.transpose(axes)
        elif part in ("weight", "bias"):
            params.setdefault(layer, {})["scale" if part == "weight" else part] = value
        elif part.startswith("running_"):
            stats.setdefault(layer, {})[part.removeprefix("running_")] = value
    return params, stats


def test_training_is_pytorchs():
    """Weights and running statistics after three steps, then logits: in float64, PyTorch seeing
    the images that count alone."""
    torch = pytest.importorskip("torch", reason="parity is checked against PyTorch")
    from benchmarks.torch_models import VGGBatchNorm as TorchVGG

    def to_nchw(images):
        return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    torch.manual_seed(0)
    peer = TorchVGG(layers=LAYERS).double()
    for name, weight in peer.named_parameters():
        if weight.ndim == 1 or name.startswith("classifier"):
            torch.nn.init.uniform_(weight, 0.2, 1.0)
    theirs = torch.optim.SGD(peer.parameters(), lr=0.1, momentum=0.9)
    tested = batch_of(99, np.float64)["image"]
    with jax.enable_x64(True):
        params, stats = jax.tree.map(jnp.asarray, variables_of(peer))
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, params, stats, OPTIMIZER.init(params), jax.random.key(0))
        step = jit(step_with(precision="float64"))
        for i in range(STEPS):
            batch = batch_of(i, np.float64)
            state, _ = step(state, batch)
            theirs.zero_grad()
            logits = peer(to_nchw(batch["image"][:COUNTED]))
            labels = torch.tensor(batch["label"][:COUNTED]).long()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            theirs.step()
        want_params, want_stats = variables_of(peer)
        assert_same(jax.device_get(state.params), want_params, 1e-10)
        assert_same(jax.device_get(state.batch_stats), want_stats, 1e-12)
        assert abs(want_stats["features_1"]["var"] - 1).max() > 0.1
        assert abs(want_stats["features_1"]["mean"]).max() > 0.1
        with torch.no_grad():
            want = peer.eval()(to_nchw(tested)).numpy()
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        got = MODEL.apply(variables, jnp.asarray(tested))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * np.abs(want).max())


def test_padding_and_evaluation_leave_the_statistics_alone():
    step = jit(step_with())
    batch = batch_of(0)
    after, _ = step(start(), batch)
    other = dict(batch, image=np.concatenate([batch["image"][:COUNTED], -batch["image"][:3]]))
    again, _ = step(start(), other)
    jax.tree.map(np.testing.assert_array_equal, again.batch_stats, after.batch_stats)
    none, _ = step(start(), dict(batch, mask=np.zeros(BATCH, np.float32)))
    jax.tree.map(np.testing.assert_array_equal, none.batch_stats, start().batch_stats)
    variables = {"params": after.params, "batch_stats": after.batch_stats}
    logits = predict_step(variables, batch["image"], model=MODEL)
    alone = predict_step(variables, batch["image"][:1], model=MODEL)
    np.testing.assert_allclose(alone, logits[:1], rtol=1e-4, atol=1e-5)


def test_shard_map_takes_the_global_batch():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    step = jit(
        jax.shard_map(
            step_with(axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=(P(), P()),
        )
    )
    state = start()
    for i in range(STEPS):
        state, _ = step(state, batch_of(i))
    assert_same(jax.device_get((state.params, state.batch_stats)), one_device(), 1e-4)


def test_averaged_weights_go_with_averaged_statistics():
    # Batch normalisation of a frozen layer too goes on (`train_step`).
    step = jit(step_with(ema_decay=0.2, freeze=("features_0", "features_1")))
    make = functools.partial(create_state, MODEL, OPTIMIZER, image_shape=(SIDE, SIDE, 3))
    state = make(jax.random.key(0), ema=True, freeze=("features_0", "features_1"))
    average = jax.device_get(state.batch_stats)
    for i, kept in enumerate((1 / 10, 2 / 11, 0.2)):
        state, _ = step(state, batch_of(i))
        average = jax.tree.map(
            lambda a, x, k=kept: k * a + (1 - k) * np.asarray(x),
            average,
            state.batch_stats,
        )
    tested = inference_variables(state)
    assert tested == {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
    assert_same(tested["batch_stats"], average, 1e-5)
    for layer in average:
        assert abs(average[layer]["mean"] - state.batch_stats[layer]["mean"]).max() > 1e-4


def test_pmap_takes_the_global_batch():
    step = jax.pmap(step_with(axis_name="data"), axis_name="data", devices=jax.devices()[:2])
    state = jax.tree.map(lambda x: jnp.stack([x] * 2), start())
    for i in range(STEPS):
        state, _ = step(state, jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch_of(i)))
    got = jax.device_get((state.params, state.batch_stats))
    assert_same(jax.tree.map(lambda x: x[1], got), one_device(), 1e-4)


def test_half_precision_keeps_wide_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (16, 4, 4, 2)), jnp.bfloat16)
    variables = BatchNorm().init(jax.random.key(0), x, True)
    y, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float32)
    stats = updates["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == np.float32
    np.testing.assert_allclose(stats["mean"], 0.1 * wide.mean(axis=(0, 1, 2)), rtol=1e-5)
    want = 0.9 + 0.1 * wide.var(axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats["var"], want, rtol=1e-5)
