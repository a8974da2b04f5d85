"""Programs over several devices: a network with dropout whose batches do not divide."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from cifar_jax import input_pipeline
from cifar_jax.models.layers import Dense, Dropout
from cifar_jax.parallel import hardware, placement, programs
from cifar_jax.parallel.placement import Placement
from cifar_jax.runtime.timing import Clock, compile_seconds
from cifar_jax.steps import create_state, eval_step, predict_step, train_step


class Small(nn.Module):
    """Dense, dropout, dense."""

    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(Dense(16, name="fc1")(x.reshape(x.shape[0], -1)))
        return Dense(5, name="fc2")(Dropout(self.dropout_rate)(x, train))


SMALL = {"model": Small(), "optimizer": optax.sgd(0.1, momentum=0.9)}


@functools.cache
def epoch_over(devices, split=False):
    """State, record, evaluation's sums and logits of one epoch of batches of 13 (the last of 11)
    on so many devices, the data whole on each or split over them."""
    Clock()  # begins to count seconds of compiling
    mesh = hardware.data_mesh(devices)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 4, 4, 3), np.uint8), rng.integers(0, 5, 50)
    data, tested = (placement.put(images, labels, where) for where in (mesh, None))
    if split:
        tested = data = placement.put(images, labels, mesh, Placement.SPLIT)
        assert data.image.addressable_shards[0].data.shape == (-(-50 // devices), 4, 4, 3)
    order = input_pipeline.epoch_order(jax.random.key(0), 1, np.arange(50, dtype=np.int32), 13)
    program = programs.compile_training(functools.partial(train_step, **SMALL), mesh=mesh)
    state = create_state(
        SMALL["model"], SMALL["optimizer"], jax.random.key(1), image_shape=(4, 4, 3)
    )
    changing = placement.replicate((state, programs.empty_metrics(len(order))), mesh)
    batch_indices = placement.replicate(order, mesh)
    compiled = []
    for start, length in ((0, 1), (1, 3)):
        before = compile_seconds()
        changing = program(changing, data, batch_indices, start, start, length)
        compiled.append(compile_seconds() - before)
    assert compiled[0] > 0
    assert compiled[1] == 0, "a state that is on the mesh already is no second program"
    state, record = changing
    model = {"model": SMALL["model"]}
    variables = {"params": state.params}
    evaluate = programs.compile_evaluation(functools.partial(eval_step, **model), mesh)
    predict = programs.compile_prediction(functools.partial(predict_step, **model), mesh)
    found = evaluate(variables, tested, input_pipeline.batches(np.arange(50, dtype=np.int32), 7))
    logits = predict(variables, images.reshape(10, 5, 4, 4, 3))
    return jax.device_get((state.params, record, found, logits))


@pytest.mark.parametrize(("devices", "split"), [(2, False), (4, False), (8, False), (3, True)])
def test_a_run_is_the_same_on_any_number_of_devices(devices, split):
    """Also where a batch does not divide, and the last devices have nothing but padding."""
    params, record, found, logits = epoch_over(devices, split)
    want_params, want_record, want_found, want_logits = epoch_over(1)
    np.testing.assert_array_equal(record["count"], [13, 13, 13, 11])
    np.testing.assert_array_equal(record["correct"], want_record["correct"])
    np.testing.assert_allclose(record["loss"], want_record["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, want_params
    )
    assert found["count"] == 50
    np.testing.assert_array_equal(found["confusion"], want_found["confusion"])
    assert found["loss"] == pytest.approx(want_found["loss"], rel=1e-5)
    assert logits.shape == (10, 5, 5)
    np.testing.assert_allclose(logits, want_logits, atol=1e-5)


def test_where_the_training_images_lie():
    GB = 10**9
    assert placement.place_for(2 * GB, 4, 8 * GB) == ("resident", None)
    place, said = placement.place_for(7 * GB, 4, 8 * GB)
    assert place == "split"
    assert "7 GB" in said
    assert "4 devices" in said
    for size, devices in ((9 * GB, 4), (3 * GB, 1)):
        place, said = placement.place_for(size, devices, 8 * GB)
        assert place == "stream"
        assert "streamed from the host" in said
    assert 10**8 < placement.device_memory() < 10**14
