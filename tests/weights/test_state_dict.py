"""State dicts of the PyTorch networks and our variables: names, layouts, the same logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import input_pipeline, steps
from cifar_jax.models import make_model
from cifar_jax.optimizers import make_optimizer
from cifar_jax.parallel.programs import compile_for_one_call
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError
from cifar_jax.weights.state_dict import (
    entries,
    to_torch,
    unwrap,
    variables_from_torch,
)

torch = pytest.importorskip("torch", reason="needs PyTorch")

from benchmarks.torch_models import MODELS as TORCH_MODELS  # noqa: E402

NAMES = ("tutorial_cnn", "deep_cnn", "dropout_cnn")


def data_of(seed, count):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    return images, rng.integers(0, 10, count).astype(np.int32)


def theirs(model, images):
    x = torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    model.eval()
    with torch.no_grad():
        return model(x).numpy()


def numpy_state(model):
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def assert_same_logits(ours, others):
    np.testing.assert_allclose(ours, others, rtol=0, atol=1e-5 * np.abs(others).max())


@functools.cache
def parts_of(name):
    """Shapes, the compiled prediction and the compiled training step of a model."""
    model = make_model(name, lowering="lax")
    optimizer = make_optimizer(RECIPES["adam"], 10)
    create = functools.partial(steps.create_state, model, optimizer, jax.random.key(3))
    options = {"model": model, "optimizer": optimizer}
    return (
        compile_for_one_call(create),
        compile_for_one_call(functools.partial(steps.train_step, **options)),
        compile_for_one_call(functools.partial(steps.predict_step, model=model)),
    )


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_our_weights_give_pytorch_the_same_logits(name, trained):
    create, step, predict = parts_of(name)
    state = create()
    images, labels = data_of(0, 48)
    if trained:
        before = jax.tree.map(np.array, state.params)
        for row in input_pipeline.batches(np.arange(48), 16):
            state, _ = step(state, {"image": images[row], "label": labels[row]})
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.params)
        assert min(jax.tree.leaves(moved)) > 1e-4
    variables = steps.inference_variables(state)
    peer = TORCH_MODELS[name]()
    exported = to_torch(**variables)
    assert [(k, v.shape) for k, v in exported.items()] == [
        (k, tuple(v.shape)) for k, v in peer.state_dict().items()
    ], "in PyTorch's own order"
    peer.load_state_dict({k: torch.tensor(v) for k, v in exported.items()}, strict=True)
    assert_same_logits(predict(variables, images[:16]), theirs(peer, images[:16]))


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_pytorchs_weights_give_us_the_same_logits(name, trained):
    torch.manual_seed(5)
    peer = TORCH_MODELS[name]()
    images, labels = data_of(1, 48)
    if trained:
        optimizer = torch.optim.Adam(peer.parameters(), lr=0.001)
        before = numpy_state(peer)
        for row in np.arange(48).reshape(3, 16):
            x = torch.tensor(images[row].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
            loss = torch.nn.functional.cross_entropy(peer(x), torch.tensor(labels[row]).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(np.abs(before[k] - v).max() > 1e-4 for k, v in numpy_state(peer).items())
    create, _, predict = parts_of(name)
    like = steps.inference_variables(jax.eval_shape(create))
    variables = variables_from_torch(numpy_state(peer), like)
    assert_same_logits(predict(variables, images[:16]), theirs(peer, images[:16]))
    back = to_torch(**variables)
    for key, value in numpy_state(peer).items():
        np.testing.assert_array_equal(back[key], value, strict=True)


# Batch normalisation


class Small(nn.Module):
    """Convolutions with batch normalisation and a linear head, named as VGG's are."""

    @nn.compact
    def __call__(self, x):
        for k, features in ((0, 4), (3, 6)):
            x = nn.Conv(features, (3, 3), name=f"features_{k}")(x)
            x = nn.BatchNorm(
                use_running_average=True, epsilon=1e-5, momentum=0.9, name=f"features_{k + 1}"
            )(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(5, name="classifier_0")(x.reshape(x.shape[0], -1))


def small_torch():
    layers = []
    for channels, features in ((3, 4), (4, 6)):
        layers += [
            torch.nn.Conv2d(channels, features, 3, padding=1),
            torch.nn.BatchNorm2d(features),
            torch.nn.Sequential(torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        ]
    # Numbered as in VGG, where nothing without weights counts here.
    model = torch.nn.ModuleDict(
        {
            "features": torch.nn.Sequential(*layers),
            "classifier": torch.nn.Sequential(torch.nn.Linear(4 * 4 * 6, 5)),
        }
    )
    return model


def run_small(model, x):
    x = model["features"](torch.tensor(x.transpose(0, 3, 1, 2)))
    return model["classifier"](torch.flatten(x, 1))


@functools.cache
def small():
    """A PyTorch network with statistics of its own, and an image batch."""
    torch.manual_seed(0)
    model = small_torch()
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
        model.train()
        run_small(model, x)
        model.eval()
        return model, x, run_small(model, x).numpy()


def small_variables():
    return jax.eval_shape(Small().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_batch_normalisation_comes_with_its_statistics():
    model, x, logits = small()
    state = numpy_state(model)
    variables = variables_from_torch(state, small_variables())
    assert variables["batch_stats"].keys() == {"features_1", "features_4"}
    assert np.abs(variables["batch_stats"]["features_1"]["mean"]).max() > 0.01
    assert_same_logits(jax.jit(Small().apply)(variables, x), logits)
    back = to_torch(**variables)
    assert list(back) == list(state)
    peer = small_torch()
    peer.load_state_dict({k: torch.tensor(v) for k, v in back.items()}, strict=True)
    peer.eval()
    with torch.no_grad():
        np.testing.assert_array_equal(run_small(peer, x).numpy(), logits)
    # A state dict from before PyTorch 0.4.1 has no counters.
    old = {name: value for name, value in state.items() if "num_batches" not in name}
    jax.tree.map(
        np.testing.assert_array_equal, variables_from_torch(old, small_variables()), variables
    )


def test_statistics_that_are_missing_or_too_many_are_named():
    state = numpy_state(small()[0])
    state["features.1.running_var"] = state["features.1.running_var"][:2]
    del state["features.4.running_mean"]
    state["classifier.0.num_batches_tracked"] = np.zeros((), np.int64)
    with pytest.raises(UserError) as caught:
        variables_from_torch(state, small_variables())
    message = str(caught.value)
    for part in (
        "features.1.running_var has shape [2], the model needs [4]",
        "features.4.running_mean is missing (shape [6])",
        "classifier.0.num_batches_tracked is not of this model (shape [])",
    ):
        assert part in message
    assert message.count(";") == 2, "nothing else is wrong"


# What lies around a state dict


def test_containers_and_prefixes():
    state = {"conv1.weight": np.zeros(3), "conv1.bias": np.ones(3)}
    wrapped = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    for found in (
        state,
        {"state_dict": state},
        {"epoch": 1, "model": {"state_dict": wrapped}},
        {f"module._orig_mod.{name}": value for name, value in state.items()},
    ):
        got = unwrap(found)
        assert got.keys() == state.keys()
        assert got["conv1.bias"] is state["conv1.bias"]
    # Layers that are numbered keep the name of what holds them.
    numbered = {f"features.{name}.weight": np.zeros(3) for name in (0, 3)}
    for found in (
        numbered,
        {f"backbone.{name}": value for name, value in numbered.items()},
        {f"0._orig_mod.{name}": value for name, value in numbered.items()},
    ):
        assert unwrap(found | {"n_averaged": np.int64(3), "note": "mine"}).keys() == numbered.keys()
    # Only where all names have it: a layer may be called `module`.
    mixed = {"module.weight": np.zeros(3), "fc.weight": np.zeros(3)}
    assert unwrap(mixed).keys() == mixed.keys()
    for nothing in ({}, {"a": 1}, [np.zeros(3)], np.zeros(3), {"model": {"lr": 1}}, None):
        with pytest.raises(UserError, match="no state dict"):
            unwrap(nothing)


def test_what_does_not_fit_is_named_in_a_line_of_reading_length():
    variables = small_variables()
    state = to_torch(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables["params"]))
    state |= numpy_state(small()[0])
    two = {f"{part}.{name}": value for part in ("net", "ema") for name, value in state.items()}
    for found, expected in (
        (two, "its weights lie under 'net.' and 'ema.', beside others (ema.features.0.weight"),
        (
            {f"model.{name}": value for name, value in state.items()} | {"loss.weight": np.ones(2)},
            "its weights lie under 'model.', beside others (loss.weight)",
        ),
        (
            {f"layer{k}.weight": np.ones(2) for k in range(200)},
            "features.0.weight is missing (shape [4, 3, 3, 3]); features.0.bias is missing",
        ),
    ):
        with pytest.raises(UserError) as caught:
            variables_from_torch(unwrap(found), variables)
        assert expected in str(caught.value)
        assert len(str(caught.value)) < 300
    assert str(caught.value).endswith("; and 210 more")
    variables_from_torch(state | {"loss": np.float32(1)}, variables)


def test_the_last_layer_is_the_one_of_the_logits():
    for name, layer in zip(NAMES, ("fc3", "fc4", "fc2"), strict=True):
        params = jax.eval_shape(parts_of(name)[0]).params
        assert entries({"params": params})[-1].name == f"{layer}.bias"
        assert entries({"params": params})[-1].shape == (10,)
    assert entries(small_variables())[-1].name == "classifier.0.bias"
