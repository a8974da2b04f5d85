"""`--low-resolution`: the first share of the steps sees smaller images."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from tiny_data import assert_same_run, rows_of, tiny, words

from cifar_jax import train
from cifar_jax.models import MODELS, make_model
from cifar_jax.models.layers import Conv, Dense
from cifar_jax.ops import convolution
from cifar_jax.parallel import programs
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError
from cifar_jax.steps import make_preprocess, train_step
from cifar_jax.training import setup

__all__ = ["tiny"]

RUN = words("--recipe adam --model pooled --devices 1 --batch-size 14 --learning-rate 0.003")
RUN += words("--augment flip,translate --epochs 2 --low-resolution 20:0.7 --no-plots --log-every 5")


class Pooled(nn.Module):
    """A convolution and a global mean, which takes images of any size."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = convolution.to_images(Conv(4, 3, name="conv")(x))
        return Dense(self.num_classes, name="fc")(nn.relu(x).mean(axis=(1, 2)))


@pytest.fixture(scope="module", autouse=True)
def pooled():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "pooled", Pooled)
        yield


def run(tiny, workdir, *arguments):
    lines = []
    options = [*RUN, *arguments, "--data-dir", str(tiny), "--workdir", str(workdir)]
    return train.main(options, say=lines.append), lines


@pytest.fixture(scope="module")
def whole(tiny, pooled, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("low") / "run"
    run(tiny, workdir)
    return workdir


def test_a_step_sees_small_images_first_and_whole_ones_then():
    recipe = RECIPES["adam"].replace(model="pooled", epochs=2, low_resolution="20:0.25")
    model = make_model("pooled")
    state = setup.state_maker(recipe, model, 8, (32, 32, 3))(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (6, 32, 32, 3)), jnp.uint8),
        "label": jnp.arange(6, dtype=jnp.int32),
    }
    step = jit(setup.step_of(recipe, model, 8))
    optimizer = setup.optimizers.make_optimizer(recipe, 8)
    for number, side in ((0, 20), (3, 20), (4, 0), (15, 0)):
        at = state.replace(step=jnp.int32(number))
        plain = functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            preprocess=make_preprocess(recipe.normalize, recipe.augment, resize=side),
        )
        got, want = step(at, batch), jit(plain)(at, batch)
        np.testing.assert_allclose(got[1]["loss"], want[1]["loss"], rtol=1e-6)
        for x, y in zip(
            jax.tree.leaves(got[0].params), jax.tree.leaves(want[0].params), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=1e-6)


@contextlib.contextmanager
def stop_at_once():
    """In place of `train.stop_requests`: a SIGINT at every look."""
    yield lambda: 2


def test_stopped_after_every_few_steps_it_ends_the_same(whole, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "stop_requests", stop_at_once)
    monkeypatch.setattr(programs.Chunks, "next", lambda self, left: min(13, left))
    for _ in range(6):  # of 13 and 9 steps, of which the fourth has the switch
        with pytest.raises(SystemExit):
            run(tiny, tmp_path / "run", *words("--save-minutes 1e-6"))
    monkeypatch.undo()
    run(tiny, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_of_many_seeds_each_is_the_single_run(whole, tiny, tmp_path):
    run(tiny, tmp_path / "many", "--seeds", "42:44")
    one = [row["train_loss"] for row in rows_of(whole, "epoch")]
    (folder,) = (tmp_path / "many").glob("seed-42")
    np.testing.assert_allclose([r["train_loss"] for r in rows_of(folder, "epoch")], one, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--low-resolution 24", "takes a side in pixels and a share.*as 24:0.4.*got '24'"),
        ("--low-resolution 24:1", "between 0 and 1"),
        ("--low-resolution 32:0.5", "32:0.5 is not below the images' 32x32 pixels"),
        (
            "--model tutorial_cnn --low-resolution 24:0.4",
            "tutorial_cnn takes no images of 24 pixels",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments, said, tiny, tmp_path):
    with pytest.raises(UserError, match=said):
        run(tiny, tmp_path / "run", *words(arguments))


def test_more_epochs_would_move_the_switch(whole, tiny):
    with pytest.raises(UserError, match="a share of all its steps"):
        run(tiny, whole, *words("--epochs 3 --schedule constant"))
