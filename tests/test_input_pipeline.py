"""How batches reach a step: splits, orders, padding, and the two feeds' equality."""

import jax
import numpy as np
import pytest

from cifar_jax import input_pipeline
from cifar_jax.runtime.errors import UserError


def test_split_is_disjoint_and_exhaustive():
    key = input_pipeline.run_keys(42)["split"]
    train, held_out = input_pipeline.split_indices(key, 50_000, 0.2)
    assert (len(train), len(held_out)) == (40_000, 10_000)
    assert train.dtype == held_out.dtype == np.int32
    together = np.sort(np.concatenate([train, held_out]))
    np.testing.assert_array_equal(together, np.arange(50_000))
    # Random, not a block: about a fifth of every thousand images is held out.
    shares = np.histogram(held_out, bins=50, range=(0, 50_000))[0]
    assert shares.min() > 140
    assert shares.max() < 260


def test_split_depends_on_the_seed_alone():
    first, again, other = (
        input_pipeline.split_indices(input_pipeline.run_keys(seed)["split"], 1000, 0.2)[1]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_validation_takes_every_image():
    train, held_out = input_pipeline.split_indices(jax.random.key(0), 10, 0.0)
    np.testing.assert_array_equal(train, np.arange(10))
    assert len(held_out) == 0


@pytest.mark.parametrize(("size", "fraction"), [(10, 0.01), (10, 0.97), (2, 0.2)])
def test_an_empty_split_is_refused(size, fraction):
    with pytest.raises(UserError, match=r"--validation-fraction .* leaves an empty split"):
        input_pipeline.split_indices(jax.random.key(0), size, fraction)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_an_epoch_takes_every_image_once(batch_size):
    positions = np.arange(5, 105, dtype=np.int32)
    order = input_pipeline.epoch_order(jax.random.key(0), 3, positions, batch_size)
    assert order.dtype == np.int32
    assert order.shape == (-(-100 // batch_size), batch_size)
    flat = order.ravel()
    np.testing.assert_array_equal(np.sort(flat[flat >= 0]), positions)
    assert (flat[100:] == -1).all(), "padding stands at the end of the last batch only"
    assert not np.array_equal(flat[:100], positions)


def test_orders_differ_by_epoch_and_seed_and_repeat():
    positions = np.arange(1000, dtype=np.int32)
    key = input_pipeline.run_keys(0)["order"]
    orders = [input_pipeline.epoch_order(key, epoch, positions, 10) for epoch in (0, 1, 2)]
    orders.append(input_pipeline.epoch_order(input_pipeline.run_keys(1)["order"], 0, positions, 10))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02
    again = input_pipeline.epoch_order(input_pipeline.run_keys(0)["order"], 1, positions, 10)
    np.testing.assert_array_equal(again, orders[1])


def test_a_runs_keys_are_three_different_ones():
    keys = [
        jax.random.key_data(k).tolist() for s in (0, 1) for k in input_pipeline.run_keys(s).values()
    ]
    assert len({tuple(key) for key in keys}) == 6


def test_evaluation_order_pads_with_a_mask():
    order = input_pipeline.batches(np.arange(10, dtype=np.int32), 4)
    assert order.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    data = input_pipeline.to_device(images, np.arange(10) * 2)
    batch = jax.jit(input_pipeline.take_batch)(data, order[2])
    assert batch["image"][:2, 0, 0, 0].tolist() == [8, 9]
    assert batch["label"][:2].tolist() == [16, 18]
    assert batch["mask"].tolist() == [1, 1, 0, 0]
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert input_pipeline.take_batch(data, order[0])["mask"].tolist() == [1] * 4


def test_a_batch_larger_than_the_split_is_refused():
    input_pipeline.check_batch_size(10, 10)
    with pytest.raises(
        UserError, match=r"--batch-size 11 is larger than the training split \(10\)"
    ):
        input_pipeline.check_batch_size(11, 10)


class Fake:
    """A random-access source that counts what it was asked for."""

    def __init__(self, size):
        self.images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 3), np.uint8)
        self.labels = np.arange(size) % 10
        self.asked = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.asked.append(i)
        return {"image": self.images[i], "label": int(self.labels[i])}


def same_batches(source, images, labels, order, start, length):
    """Asserts that both feeds give steps start.. of an order the same batches, bit for bit."""
    resident = input_pipeline.to_device(images, labels)
    take = jax.jit(input_pipeline.take_batch)
    step, shapes = start, set()
    for data, rows, steps in input_pipeline.stream(source, order, start, length):
        shapes.add((data["image"].shape, rows.shape))
        assert 0 < steps <= length
        chunk = input_pipeline.to_device(data["image"], data["label"])
        for row in range(steps):
            got, want = take(chunk, rows[row]), take(resident, order[step])
            np.testing.assert_array_equal(got["mask"], want["mask"])
            real = np.asarray(want["mask"]) > 0
            for name in ("image", "label"):
                assert got[name].dtype == want[name].dtype
                np.testing.assert_array_equal(
                    np.asarray(got[name])[real], np.asarray(want[name])[real]
                )
            step += 1
        assert (rows[steps:] == -1).all()
    assert step == len(order)
    assert len(shapes) == 1, "a chunk of another shape would compile another program"


@pytest.mark.parametrize(("start", "length"), [(0, 4), (0, 100), (3, 4), (10, 1)])
def test_stream_equals_resident(start, length):
    source = Fake(43)
    order = input_pipeline.epoch_order(jax.random.key(0), 0, np.arange(43, dtype=np.int32), 4)
    assert order[-1, -1] == -1
    same_batches(source, source.images, source.labels, order, start, length)
    wanted = set(order[start:].ravel().tolist()) - {-1}
    assert wanted <= set(source.asked), "every example of the rest was read"


def test_stream_of_real_images_equals_resident(cifar10):
    from cifar_jax.input_pipeline import record_source

    split = cifar10.splits["train"]
    positions = input_pipeline.split_indices(jax.random.key(1), len(split), 0.2)[0]
    order = input_pipeline.epoch_order(jax.random.key(0), 2, positions, 20)[:7]
    same_batches(record_source(split), split.images, split.labels, order, 1, 4)
