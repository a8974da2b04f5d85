"""Rematerialisation: less memory, the same numbers, the same parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from cifar_jax import steps
from cifar_jax.models import MODELS, model_of
from cifar_jax.models.layers import BatchNorm, Dense, block
from cifar_jax.parallel import programs
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError

pytestmark = pytest.mark.extended


class Blocks(nn.Module):
    """Blocks of layers that hold far more inside than at their ends."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        def layers(module, x, first):
            for i in range(first, first + 4):
                x = jnp.tanh(nn.Dense(8, name=f"dense{i}", param_dtype=x.dtype)(x))
            return BatchNorm(name=f"norm{first}")(x, train)

        for first in (0, 4):
            x = block(self.remat, layers, self, x, first=first)
        return Dense(5, name="fc")(x.mean(axis=(1, 2)))


def test_rematerialising_saves_memory_and_changes_nothing():
    """In float64, where another order of sums shows in the last digits alone."""
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    mask = np.arange(16) < 11  # batch normalisation must see it inside a block too
    batch = {"image": images, "label": np.zeros(16, np.int32), "mask": mask}
    optimizer, found = optax.sgd(0.1), {}
    with jax.enable_x64(True):
        prepare = steps.make_preprocess(precision="float64")
        for remat in (False, True):
            model = Blocks(remat)
            create = functools.partial(
                steps.create_state, model, optimizer, image_shape=(16, 16, 3)
            )
            state = jit(create)(jax.random.key(0))
            wide = jax.tree.map(lambda x: x.astype("float64"), (state.params, state.batch_stats))
            state = state.replace(params=wide[0], batch_stats=wide[1])
            step = functools.partial(
                steps.train_step, model=model, optimizer=optimizer, preprocess=prepare
            )
            step = jax.jit(step, compiler_options=programs.compiler_options(remat))
            compiled = step.lower(state, batch).compile()
            after = compiled(state, batch)[0]
            memory = compiled.memory_analysis().temp_size_in_bytes
            found[remat] = (after.params, after.batch_stats), memory
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found[True][0], found[False][0])
    assert {leaf.dtype for leaf in jax.tree.leaves(found[True][0])} == {np.dtype("float64")}
    assert found[True][1] < 0.8 * found[False][1], "nothing is computed again"


@pytest.mark.parametrize("name", ["tutorial_cnn", "vgg16_bn"])
def test_models_rematerialise(name):
    """The same parameters by name, and as many convolutions again in the backward pass."""
    images = jnp.zeros((2, 32, 32, 3))
    counts, shapes = {}, {}
    for remat in (False, True):
        model = model_of(Recipe(model=name, remat=remat), 10, "lax")
        shapes[remat] = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(params, stats, model=model):
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0].sum()

        variables = shapes[remat]
        program = jax.make_jaxpr(jax.grad(loss))(
            variables["params"], variables.get("batch_stats", {})
        )
        counts[remat] = str(program).count("= conv_general_dilated[")
    assert jax.tree.map(jnp.shape, shapes[True]) == jax.tree.map(jnp.shape, shapes[False])
    layers = sum("conv" in layer or "features" in layer for layer in shapes[True]["params"])
    layers = 13 if name == "vgg16_bn" else layers
    assert counts[True] == counts[False] + layers


class Plain(nn.Module):
    """A model without blocks."""


def test_models_without_blocks_say_so(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", lambda num_classes, lowering: Plain())
    with pytest.raises(UserError, match="--remat: tiny has no blocks"):
        model_of(Recipe(model="tiny", remat=True), 5)
