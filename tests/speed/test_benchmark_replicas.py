"""The benchmark of many runs: its sides do the work of the single run, its table says what ran."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.extended

torch = pytest.importorskip("torch", reason="the benchmark needs torch")

from benchmarks import cases, replica_sides, replicas, sides, throughput, worker  # noqa: E402
from benchmarks.torch_trainers import EagerTrainer  # noqa: E402
from cifar_jax.datasets import Dataset, Split  # noqa: E402

CASE = cases.parse("tutorial:4")


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    splits = {"train": Split(images, rng.integers(0, 10, 64).astype(np.int32))}
    return Dataset("drawn", "1.0.0", "test", tuple("abcdefghij"), "f", splits)


def test_pytorchs_replica_is_its_single_run(dataset, tmp_path, monkeypatch):
    """torch.func over stacked weights trains replica 0 as eager PyTorch trains it alone."""
    torch.manual_seed(0)
    split = dataset.splits["train"]
    alone = EagerTrainer(CASE.settings(), split.images, split.labels)
    state = {name: value.clone() for name, value in alone.model.state_dict().items()}
    monkeypatch.setattr(replica_sides, "read_weights", lambda path: state)
    side = replica_sides.TorchReplicas(3, "cpu")
    found = side.prepare(CASE, dataset, "float32", tmp_path / "w.npz", seconds=0.01)
    order = replica_sides.replica_orders(64, 4, 3)
    assert order.shape == (3, 16, 4)
    assert all(sorted(row) == sorted(order[0].reshape(-1)) for row in order.reshape(3, -1))
    want = alone.run(list(order[0])).tolist()
    assert len(found["losses"]) == 16
    assert found["losses"] == pytest.approx(want, rel=1e-4)
    images, seconds = side.window()
    assert images % (3 * 4) == 0
    assert seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["map", "vmap"])
def test_our_replica_is_our_single_run(dataset, tmp_path, form):
    single = sides.Ours()
    want = single.prepare(CASE, dataset, "float32", tmp_path / "w.npz", seconds=0.01)
    side = replica_sides.OurReplicas(form, 3)
    found = side.prepare(CASE, dataset, "float32", tmp_path / "w.npz", seconds=0.01)
    assert found["losses"] == pytest.approx(want["losses"], rel=1e-3)
    assert side.window()[0] % (3 * 4) == 0


def test_sides_are_asked_for_by_name():
    assert worker.make_side("map-16", "cpu").replicas == 16
    assert worker.make_side("vmap-4", "cpu").form == "vmap"
    assert worker.make_side("torch-vmap-4", "gpu").device == "cuda"
    assert [worker.is_ours(name) for name in ("ours-lax", "vmap-4", "torch-vmap-4")] == [
        True,
        True,
        False,
    ]


class FakeWorker:
    def __init__(self, side, speed, losses=(2.0, 1.0)):
        self.side, self.speed, self.losses = side, speed, losses

    def ask(self, do, **_):
        if do == "prepare":
            return {"losses": list(self.losses)} if self.speed else {"not_run": "no GPU"}
        return {"images": 100, "seconds": 100 / self.speed} if do == "window" else {}


def test_the_table(monkeypatch):
    workers = [
        FakeWorker("ours", 100),
        FakeWorker("eager", 50),
        FakeWorker("map-4", 250),
        FakeWorker("vmap-4", 90, losses=(2.0, 3.0)),
        FakeWorker("torch-vmap-4", 0),
    ]
    row = replicas.measure(workers, {"do": "prepare"}, 3, "float32")
    assert row["sides"]["map-4"]["ratio"]["ratio"] == pytest.approx(2.5)
    assert row["sides"]["vmap-4"]["same_work"] is False
    result = {
        "case": "train/tutorial:4", "machine": {"cpu": "a chip", "cores": 2}, "commit": "c" * 40,
        "date": "2026-11-22", "dataset": "cifar10", "precision": "float32", "rounds": 3,
        "replicas": [{"count": 4, **row, "workers": {w.side: {} for w in workers}}],
    }  # fmt: skip
    text = replicas.table(json.loads(json.dumps(result)))
    assert "| replicas | ours, one run | PyTorch eager, one run | map | vmap | torch-vmap |" in text
    assert "| 4 | 100 (100-100) | 50 (50-50) 0.50 (0.50-0.50)x | 250 (250-250) 2.50" in text
    assert "(first losses differ) | not run |" in text
    assert "Not run: torch-vmap-4: no GPU." in text
    assert throughput.prepare is replicas.prepare
