"""A model that knows nothing of this package goes through every command."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image
from quick import jit
from tiny_data import copy_run, rows_of, tiny, words

from cifar_jax import convert, evaluate, export, predict, train
from cifar_jax.models import MODELS, model_of, plain
from cifar_jax.models.layers import Flattened
from cifar_jax.parallel import hardware
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas.programs import choose_lowering
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import create_state, eval_step, inference_variables, predict_step, train_step
from cifar_jax.training import evaluation
from cifar_jax.weights import files as weight_files
from cifar_jax.weights import init_from
from cifar_jax.weights.state_dict import layers_of, to_torch, variables_from_torch

__all__ = ["tiny"]

RUN = [
    *words("--recipe adam --model foreign --epochs 2 --batch-size 60 --learning-rate 0.01"),
    *words("--no-plots --devices 1"),
]
STEPS = 16  # two epochs of 480 images


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (5, 5), strides=4, use_bias=False, name="conv1")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))


class Foreign(nn.Module):
    """Flax's own layers, one module within another, and two collections of its own."""

    num_classes: int

    def setup(self):
        self.stem, self.dropout, self.head = Block(4), nn.Dropout(0.2), nn.Dense(self.num_classes)
        self.calls = self.variable("counters", "calls", jnp.zeros, (), jnp.int32)
        self.level = self.variable("levels", "mean", jnp.zeros, (3,))

    def __call__(self, images, train):
        if train:
            self.calls.value += 1
            self.level.value = 0.9 * self.level.value + 0.1 * images.mean((0, 1, 2))
        x = self.stem(images - self.level.value.reshape(1, 1, 1, -1), train)
        return self.head(self.dropout(x.reshape(x.shape[0], -1), deterministic=not train))


def run(command, *arguments):
    lines = []
    return command.main([str(argument) for argument in arguments], say=lines.append), lines


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(directory, summary, what was said) of a run of `Foreign`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "foreign", Foreign)
        folder = tmp_path_factory.mktemp("foreign") / "run"
        yield folder, *run(train, *RUN, "--seed", 3, "--data-dir", tiny, "--workdir", folder)


def assert_same(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, want)


EXACT = {"rtol": 0, "atol": 0}


def test_train_evaluate_and_predict(trained, tiny, tmp_path):
    folder, summary, said = trained
    assert summary["parameters"] == 3 * 25 * 4 + 2 * 4 + (8 * 8 * 4 + 1) * 10
    assert any("stem/conv1" in line for line in said)
    variables = evaluation.load(folder).variables
    assert variables["counters"]["calls"] == STEPS
    assert np.abs(variables["levels"]["mean"]).min() > 0.01
    assert np.abs(variables["batch_stats"]["stem"]["bn"]["mean"]).max() > 0.01
    assert summary["test_accuracy"] > 0.3
    found, _ = run(evaluate, folder, "--data-dir", tiny, "--json")
    assert found["test_correct"] == summary["test_correct"]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    _, lines = run(predict, folder, tmp_path / "black.png", "--json")
    expected = jax.nn.softmax(evaluation.load(folder).logits(np.zeros((1, 32, 32, 3), np.uint8)))
    found = json.loads(lines[-1])["predictions"][0]["probability"]
    assert found == pytest.approx(float(expected.max()), rel=1e-4)


def test_it_goes_on_where_it_was_stopped(trained, tiny, tmp_path):
    folder, summary, _ = trained
    copy_run(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    (tmp_path / "run" / "summary.json").unlink()
    again, _ = run(train, *RUN, "--seed", 3, "--data-dir", tiny, "--workdir", tmp_path / "run")
    assert again["test_loss"] == summary["test_loss"]
    assert rows_of(tmp_path / "run") == rows_of(folder)
    first, second = (evaluation.load(f).variables for f in (tmp_path / "run", folder))
    assert_same(first, second, **EXACT)


def test_many_seeds_in_one_command(trained, tiny, tmp_path):
    run(train, *RUN, "--seeds", "3,4", "--data-dir", tiny, "--workdir", tmp_path / "many")
    variables = [evaluation.load(tmp_path / "many" / f"seed-{seed}").variables for seed in (3, 4)]
    assert_same(variables[0], evaluation.load(trained[0]).variables, rtol=1e-3, atol=1e-5)
    assert variables[1]["counters"]["calls"] == STEPS
    first, second = (np.asarray(found["params"]["head"]["bias"]) for found in variables)
    assert np.abs(first - second).max() > 1e-3


def test_weights_go_out_and_come_back(trained, tiny, tmp_path):
    folder = trained[0]
    path = tmp_path / "foreign.safetensors"
    _, lines = run(convert, folder, path)
    assert lines[0].startswith("notice: Foreign states no torch_layers: the inputs of head.weight ")
    variables = evaluation.load(folder).variables
    state = weight_files.read(path).state
    assert {name: value.shape for name, value in state.items()} == {
        "stem.conv1.weight": (4, 3, 5, 5),
        **{f"stem.bn.{part}": (4,) for part in words("weight bias running_mean running_var")},
        "stem.bn.num_batches_tracked": (),
        "head.weight": (10, 256),
        "head.bias": (10,),
        "calls": (),
        "mean": (3,),
    }
    kernel = variables["params"]["stem"]["conv1"]["kernel"]
    np.testing.assert_array_equal(state["stem.conv1.weight"][1, 2], kernel[:, :, 2, 1])
    np.testing.assert_array_equal(state["head.weight"].T, variables["params"]["head"]["kernel"])
    model = evaluation.load(folder).model
    assert_same(init_from.load(path, model, (32, 32, 3)).variables, variables, **EXACT)
    start = ["--init-from", path, "--epochs", 1, "--learning-rate", 0]
    _, lines = run(train, *RUN, *start, "--data-dir", tiny, "--workdir", tmp_path / "run")
    assert any("states no torch_layers" in line for line in lines)
    after = evaluation.load(tmp_path / "run").variables
    assert_same(after["params"], variables["params"], **EXACT)
    assert after["counters"]["calls"] == STEPS + STEPS // 2
    # A head for another number of classes is drawn anew, alone.
    seven = {name: state[name][:7] for name in ("head.weight", "head.bias")}
    weight_files.write(tmp_path / "seven.safetensors", state | seven)
    found = init_from.load(tmp_path / "seven.safetensors", model, (32, 32, 3))
    assert found.record["redrawn"] == ["head"]
    assert set(found.variables["params"]) == {"stem"}


def test_export(trained, tmp_path):
    run(export, trained[0], tmp_path / "foreign.stablehlo")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    served = jax.export.deserialize((tmp_path / "foreign.stablehlo").read_bytes()).call(images)
    expected = jax.nn.softmax(evaluation.load(trained[0]).logits(images))
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-6)


# What a model may do without, and what it may state


class Bare(nn.Module):
    """Neither `train` nor `num_classes`; it keeps an image's mean and how many pixels are lit."""

    @nn.compact
    def __call__(self, images):
        mean = self.variable("seen", "mean", jnp.zeros, ())
        lit = self.variable("seen", "lit", jnp.zeros, (), jnp.int32)
        if self.is_mutable_collection("seen") and not self.is_initializing():
            mean.value, lit.value = images.mean(), lit.value + (images > 0).sum(dtype=jnp.int32)
        return nn.Dense(5)(images.reshape(images.shape[0], -1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_collections_over_devices_and_microbatches(accumulate):
    """Floats are averaged over devices, integers the first one's; parts come one after another."""
    images = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype(np.float32)
    batch = {"image": images, "label": np.zeros(8, np.int32)}
    options = {"model": Bare(), "optimizer": optax.sgd(0.1), "accumulate": accumulate}
    options["preprocess"] = lambda images, key=None, first_example=0: images
    state = create_state(Bare(), options["optimizer"], jax.random.key(0), image_shape=(2, 2, 3))
    step = functools.partial(train_step, **options)
    one, _ = jit(step)(state, batch)
    last = images[-(8 // accumulate) :]
    assert one.collections["seen"]["lit"] == (images > 0).sum()
    np.testing.assert_allclose(one.collections["seen"]["mean"], last.mean(), rtol=1e-5)
    mesh = hardware.mesh_over(jax.local_devices()[:2])
    split = functools.partial(step, axis_name=hardware.AXIS)
    split = jax.shard_map(split, mesh=mesh, in_specs=(P(), P(hardware.AXIS)), out_specs=(P(), P()))
    two, _ = jit(split)(state, batch)
    size = 4 // accumulate
    last = np.concatenate([images[4 - size : 4], images[8 - size :]])
    assert two.collections["seen"]["lit"] == (images[:4] > 0).sum()
    np.testing.assert_allclose(two.collections["seen"]["mean"], last.mean(), rtol=1e-5)
    assert_same(two.params, one.params, rtol=1e-5, atol=1e-6)
    variables = inference_variables(two)
    assert variables["seen"] is two.collections["seen"]
    preprocess = options["preprocess"]
    logits = predict_step(variables, images, model=Bare(), preprocess=preprocess)
    assert logits.shape == (8, 5)
    assert eval_step(variables, batch, model=Bare(), preprocess=preprocess)["count"] == 8


def test_a_constructor_gets_what_it_takes(monkeypatch):
    monkeypatch.setitem(MODELS, "bare", Bare)
    recipe = RECIPES["adam"].replace(model="bare")
    assert model_of(recipe, 7) == plain.fast(Bare())
    assert isinstance(model_of(recipe, 7), Bare)
    assert model_of(recipe, 7, "gemm").lowering == "gemm"
    assert choose_lowering("vmap", "auto", "bare") == "auto"
    assert choose_lowering("vmap", "auto", "dropout_cnn") == "gemm"
    with pytest.raises(UserError, match="--remat: bare has no blocks"):
        model_of(recipe.replace(remat=True), 7)


def test_a_model_states_which_layer_reads_a_flattened_feature_map():
    rng = np.random.default_rng(0)
    stem = {"kernel": rng.normal(size=(3, 3, 3, 2))}
    params = {
        "head": {"kernel": rng.normal(size=(8, 6))},
        "aside": {"fc": {"kernel": rng.normal(size=(3, 8)), "bias": np.zeros(8)}},
        "stem": {"conv": stem},
    }
    stated = ("aside.fc", "stem.conv", Flattened("head"))
    state = to_torch(params, torch_layers=stated)
    assert list(state) == ["aside.fc.weight", "aside.fc.bias", "stem.conv.weight", "head.weight"]
    np.testing.assert_array_equal(
        state["head.weight"].reshape(6, 2, 2, 2),
        params["head"]["kernel"].reshape(2, 2, 2, 6).transpose(3, 2, 0, 1),
    )
    back = variables_from_torch(state, {"params": params}, stated)["params"]
    assert_same(back, params, **EXACT)

    class Stating(nn.Module):
        torch_layers: tuple = stated

    variables = {"params": params}
    assert layers_of(Stating(), variables) == (stated, [])
    for wrong, message in (
        (("stem.cnv",), "no layer 'stem.cnv'; did you mean 'stem.conv'"),
        ((Flattened("aside.fc"), "stem.conv"), "no convolution stands before aside.fc"),
    ):
        with pytest.raises(UserError, match=message):
            layers_of(Stating(wrong), variables)
    with pytest.raises(UserError, match="two of the model's variables would be a"):
        to_torch(params, one={"a": {"mean": np.ones(1)}}, two={"a": {"mean": np.ones(1)}})
