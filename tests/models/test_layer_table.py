"""The summary's numbers are checked against parameter trees, and FLOPs worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cifar_jax.models import MODELS, make_model
from cifar_jax.models.layer_table import format_table, summarise

PARAMETERS = {"tutorial_cnn": 62_006, "deep_cnn": 895_120, "dropout_cnn": 541_094}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_add_up_to_those_of_the_model(name):
    model = make_model(name)
    layers = summarise(model)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    by_name = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        layer = "/".join(key.key for key in path[:-1])
        by_name[layer] = by_name.get(layer, 0) + leaf.size
    assert {x.name: x.parameters for x in layers if x.parameters} == by_name
    if name in PARAMETERS:
        assert sum(x.parameters for x in layers) == PARAMETERS[name]
    assert layers[-1].output_shape == (10,)


def test_tutorial_layer_by_layer():
    layers = {x.name: x for x in summarise(make_model("tutorial_cnn"))}
    # 2 * outputs * (kernel area * input channels); the convolution's own output, before the pool.
    flops = {
        "conv1": 2 * 28 * 28 * 6 * 75,
        "conv2": 2 * 10 * 10 * 16 * 150,
        "fc1": 2 * 400 * 120,
        "fc2": 2 * 120 * 84,
        "fc3": 2 * 84 * 10,
    }
    assert {name: x.flops for name, x in layers.items() if x.flops} == flops
    assert [layers[name].output_shape for name in ("conv1", "conv2", "fc1")] == [
        (14, 14, 6),
        (5, 5, 16),
        (120,),
    ]


def test_flops_agree_with_xla_for_all_but_the_elementwise_work():
    model = make_model("deep_cnn")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    plain = model.clone(lowering="lax") if hasattr(model, "lowering") else model
    xla = jax.jit(plain.apply).lower(variables, image).cost_analysis()["flops"]
    ours = sum(x.flops for x in summarise(model))
    assert ours <= xla <= 1.02 * ours


def test_dropout_is_shown_in_training_mode_too():
    for train in (False, True):
        layers = {x.name: x for x in summarise(make_model("dropout_cnn"), train=train)}
        assert layers["dropout1"].kind == "Dropout"
        assert layers["dropout1"].output_shape == (1024,)


class _Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.features, (3, 3))(x))
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        return nn.relu(y) * scale.reshape(1, 1, 1, -1)


class _Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        block = _Block(8, name="block")
        x = _Block(3, name="first")(x, train)
        x = block(x, train)
        projection = self.param("projection", nn.initializers.ones, (8, 5))
        return x.mean((1, 2)) @ projection


@pytest.mark.parametrize("train", [False, True])
def test_nested_modules_batch_norm_and_the_models_own_parameters(train):
    layers = {x.name: x for x in summarise(_Nested(), (16, 8, 3), train=train)}
    assert list(layers) == [
        *(
            f"{block}{part}"
            for block in ("first", "block")
            for part in ("/Conv_0", "/BatchNorm_0", "")
        ),
        "",
    ]
    assert layers["block/Conv_0"].flops == 2 * 16 * 8 * 8 * 27
    assert layers["block/Conv_0"].parameters == 27 * 8 + 8
    assert layers["block/BatchNorm_0"].parameters == 16  # running statistics are not trained
    assert (layers["block"].parameters, layers["block"].output_shape) == (8, (16, 8, 8))
    assert (layers[""].parameters, layers[""].flops) == (40, 80)


class _Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        dense = nn.Dense(3, use_bias=False, name="shared")
        return dense(dense(x.mean((1, 2))))


def test_a_shared_layer_counts_its_work_twice_and_its_parameters_once():
    (layer,) = summarise(_Twice())
    assert (layer.name, layer.parameters, layer.flops) == ("shared", 9, 36)


def test_summary_compiles_nothing_and_leaks_no_tracer():
    model = make_model("tutorial_cnn")
    with jax.checking_leaks():
        first = summarise(model)
    with _NoCompilation():
        assert summarise(model) == first


class _NoCompilation:
    """Fails on any compilation inside the block."""

    def __enter__(self):
        self._events = []
        self._active = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        if self._active and "backend_compile" in event:
            self._events.append(event)

    def __exit__(self, *_):
        self._active = False
        assert not self._events


def test_table_lines_up_and_ends_with_the_totals():
    text = format_table(summarise(make_model("tutorial_cnn"))).splitlines()
    assert text[0].split() == ["layer", "kind", "output", "parameters", "FLOPs/image"]
    assert text[-1].split() == ["total", "62,006", "1,303,440"]
    conv = next(line for line in text if line.startswith("conv1"))
    assert conv.split() == ["conv1", "ConvRelu", "14x14x6", "456", "705,600"]
    assert len({len(line) for line in text}) == 1
