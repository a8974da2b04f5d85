"""A file of the user's and a folder of the user's, from nothing to tested, predicted weights."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_data import rows_of, snapshot, words

import cifar_jax
from cifar_jax import _cli as cli
from cifar_jax import convert, evaluate, export, predict, sweep, train
from cifar_jax.models import own
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.training import evaluation

LINEN = """
import flax.linen as nn
from beside import SIZE

class Net(nn.Module):
    num_classes: int
    width: int = 2

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.width, (SIZE, SIZE), strides=SIZE)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1)(x.reshape(x.shape[0], -1), deterministic=not train)
        return nn.Dense(self.num_classes)(x)

class Five(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(5)(images.reshape(images.shape[0], -1))

class Wrong(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Conv(3, (3, 3), feature_group_count=2, name="stem")(images)

class NotANumber(Five):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(2)(images.reshape(images.shape[0], -1)) / 0

def anything(num_classes):
    return "text"

value = 3
"""
NNX = """
import jax
from flax import nnx

class Net(nnx.Module):
    def __init__(self, num_classes, width=2, *, rngs):
        self.conv = nnx.Conv(3, width, (8, 8), strides=8, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width * 16, num_classes, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.norm(self.conv(images)))
        return self.head(self.dropout(x.reshape(x.shape[0], -1)))
"""
QUICK = "--recipe adam --epochs 2 --batch-size 16 --learning-rate 0.02 --no-plots --devices 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with networks in files and a folder of photos, the current one."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mynet.py").write_text(LINEN)
    (folder / "beside.py").write_text("SIZE = 8\n")
    (folder / "nnxnet.py").write_text(NNX)
    (folder / "broken.py").write_text("import flax\nno python here\n")
    (folder / "fails.py").write_text("\n1 / 0\n")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(60):
            pixels = rng.integers(150 * k, 100 + 150 * k, (24, 36, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patched.setenv("HOME", str(folder / "home"))
        yield folder


def run(command, *arguments):
    lines = []
    return command.main([str(argument) for argument in arguments], say=lines.append), lines


PHOTOS = "--dataset folder:photos --image-size 32"


@pytest.fixture(
    scope="module",
    params=["mynet.py:Net", pytest.param("nnxnet.py:Net", marks=pytest.mark.slow)],
)
def trained(place, request):
    name = request.param.partition(".")[0]
    options = f"{QUICK} {PHOTOS} --model {request.param} --model-option width=3"
    summary, _ = run(train, *words(options), "--workdir", place / name)
    return place / name, summary, options


def test_every_command_takes_it(trained, place, tmp_path):
    folder, summary, options = trained
    assert summary["test_accuracy"] == 1.0
    found, _ = run(evaluate, folder, "--json")
    assert found["test_correct"] == summary["test_correct"] == 24
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    _, lines = run(predict, folder, "photos/light/3.png", "--json")
    assert json.loads(lines[-1])["predictions"][0]["class"] == "light"
    run(convert, folder, tmp_path / "out.safetensors")
    run(export, folder, tmp_path / "out.stablehlo")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    served = jax.export.deserialize((tmp_path / "out.stablehlo").read_bytes()).call(images)
    expected = jax.nn.softmax(evaluation.load(folder).logits(images))
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-6)
    run(train, *words(options), "--seeds", "0:2", "--workdir", tmp_path / "many")
    again, _ = run(evaluate, tmp_path / "many" / "seed-1", "--json")
    assert again["test_correct"] == 24


@pytest.mark.extended
def test_python_and_batched_replicas_train_the_same(trained, tmp_path):
    """`fit` and `--replica-form vmap` give what the command gave, in plain layers."""
    folder, summary, options = trained
    run(
        *(train, *words(options), "--seeds", "42,43"),
        *("--replica-form", "vmap", "--workdir", tmp_path / "many"),
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    logits = evaluation.load(folder).logits(images)
    # Losses, not weights: where nothing is left to learn, Adam scales rounding up to whole steps.
    epochs = [rows_of(run, "epoch") for run in (folder, tmp_path / "many" / "seed-42")]
    for alone, batched in zip(*epochs, strict=True):
        assert batched["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    result = cifar_jax.fit(
        "adam",
        model=summary["recipe"]["model"],
        model_option=["width=3"],
        data="folder:photos",
        **{"epochs": 2, "batch_size": 16, "learning_rate": 0.02, "verbose": False},
    )
    assert result.summary["test_loss"] == summary["test_loss"]
    np.testing.assert_allclose(result.predict(images), jax.nn.softmax(logits), rtol=1e-5, atol=1e-9)


def test_its_file_is_imported_on_the_device_asked_for(place, tmp_path):
    """At `--batch-size 4` a network is sized before the device is taken."""
    (tmp_path / "early.py").write_text(f"import jax\nSEEN = jax.config.jax_platforms\n{LINEN}")
    given = words(f"--model {tmp_path}/early.py:Five --batch-size 4 --device cpu")
    shutil.copy(place / "beside.py", tmp_path)
    options = train.make_parser().parse(given)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        cli.start_device(options, cli.recipe_from(options)[1])
        assert own._module_of(options.model).SEEN == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_a_sweep_varies_its_settings(place, tmp_path):
    options = f"--recipe adam --epochs 1 --batch-size 16 {PHOTOS} --model mynet.py:Net"
    summary, _ = run(
        sweep, *words(options), "--learning-rate", "0.001,0.02", "--workdir", tmp_path / "sweep"
    )
    assert len(summary["points"]) == 2


def test_a_changed_or_lost_file_needs_trust(place, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(LINEN.replace("from beside import SIZE", "SIZE = 8"))
    folder = tmp_path / "run"
    options = f"{QUICK} {PHOTOS} --model {source}:Net --workdir {folder}"
    summary, _ = run(train, *words(options))
    assert (folder / "code" / "mine.py").read_text() == source.read_text()
    source.write_text(source.read_text().replace("nn.relu", "nn.gelu"))
    with pytest.raises(UserError, match=r"another run; the file of .*mine.py:Net has changed"):
        run(train, *words(options))
    for what in ("has changed since", "is gone"):
        for command in (evaluate, predict, convert, export):
            target = {
                predict: ["photos/light/3.png"],
                convert: [tmp_path / "w.safetensors"],
                export: [tmp_path / "w.stablehlo"],
            }.get(command, [])
            with pytest.raises(UserError, match=rf"mine.py {what}.*--trust-code"):
                run(command, folder, *target)
        found, lines = run(evaluate, folder, "--trust-code")
        assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
        assert any(f"network from {folder}" in line for line in lines)
        source.unlink(missing_ok=True)
    (folder / "code" / "mine.py").write_text("raise SystemExit(9)")
    with pytest.raises(UserError, match="is not the copy that the run recorded"):
        run(evaluate, folder, "--trust-code")


def test_a_file_inside_the_run_directory_is_never_trusted(place, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(place / "mynet", folder) if (place / "mynet").exists() else run(
        train, *words(f"{QUICK} {PHOTOS} --model mynet.py:Net"), "--workdir", folder
    )
    config = json.loads((folder / "config.json").read_text())
    config["code"]["file"] = str(folder / "code" / "mynet.py")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not a file of your own"):
        run(evaluate, folder)
    # Nor is what Python itself brings.
    stdlib = own.code_of("subprocess:call")
    with pytest.raises(UserError, match="is not a file of your own"):
        own.resolve("subprocess:call", stdlib, folder, trust=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model none.py:Net", "cannot read | none.py"),
        ("--model nowhere.net:Net", "there is no module nowhere.net"),
        ("--model mynet.py:", "FILE.py:NAME"),
        ("--model mynet.py:Nett", "has no 'Nett'; did you mean 'Net'?"),
        ("--model mynet.py:value", "value is of type int"),
        ("--model mynet.py:anything", "an object of type str"),
        ("--model broken.py:Net", "SyntaxError | broken.py line 2"),
        ("--model fails.py:Net", "ZeroDivisionError | fails.py line 2"),
        ("--model mynet.py:Five", "gives [batch, 5]; the data set needs [batch, 2]"),
        ("--model mynet.py:Wrong", "images of 32x32x3 in stem of [2, 32, 32, 3] | mynet.py line"),
        ("--model mynet.py:NotANumber", "non-finite values before training"),
        ("--model mynet.py:Net --model-option widht=3", "did you mean 'width'?"),
        ("--model mynet.py:Net --model-option width", "takes name=value"),
        ("--model mynet.py:Net --model-option width=a", "mynet.py line"),
        ("--model mynet.py:Net --feed stream", "--feed stream reads prepared sets"),
        ("--model tutorial_cnn --model-option depth=3", "takes no 'depth'"),
    ],
)
def test_bad_input_is_one_line(place, capsys, tmp_path, options, message):
    before = snapshot(place)
    arguments = [*words(f"{QUICK} {PHOTOS} {options}"), "--workdir", str(tmp_path / "run")]
    code = run_command(functools.partial(train.main, arguments))
    out, err = capsys.readouterr()
    assert code == 2, out + err
    (line,) = [line for line in err.splitlines() if not line.startswith("cifar_jax: ")]
    for part in message.split(" | "):
        assert part in line, line
    after = snapshot(place)
    assert all(after.get(name) == content for name, content in before.items())


PLAIN = """
import flax.linen as nn

class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="conv1")(x)), (2, 2), (2, 2))
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = nn.max_pool(nn.Conv(8, (1, 1), name="conv3")(x), (2, 2), (2, 2))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
"""
FORMS = {"convolution": {"gemm": 1, "patches": 2}, "pool": {"windows": 1}}


def test_plain_layers_are_computed_fast_and_conv_lax_leaves_them(place):
    (place / "plain.py").write_text(PLAIN)
    options = f"{QUICK} {PHOTOS} --model plain.py:Net"
    found, lines = run(train, *words(options), "--workdir", place / "fast")
    assert found["plain_layers"] == FORMS
    said = "Layers     3 plain convolutions: 1 by gemm, 2 by patches; 1 plain pool: 1 by windows"
    assert f"{said} (--conv lax leaves them as they are)" in lines
    plainly, lines = run(train, *words(options), "--conv", "lax", "--workdir", place / "lax")
    assert "plain_layers" not in plainly
    assert not any(line.startswith("Layers") for line in lines)
    halves = options.replace("--devices 1", "--devices 2")
    shared, _ = run(train, *words(halves), "--workdir", place / "two")
    assert shared["devices_sharing_a_batch"] == 2
    assert shared["plain_layers"] == FORMS
    assert found["test_loss"] == pytest.approx(plainly["test_loss"], rel=1e-3)
    first, second = (evaluation.load(place / name).variables for name in ("fast", "lax"))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for got, want in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
    again, _ = run(evaluate, place / "fast", "--conv", "lax", "--json")
    assert again["test_correct"] == found["test_correct"]
