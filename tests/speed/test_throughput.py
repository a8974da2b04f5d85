"""The benchmark: both sides do the same work, take turns, and nothing is dropped in silence."""

import json
import sys

import numpy as np
import pytest
from tiny_data import tiny

pytestmark = pytest.mark.extended

torch = pytest.importorskip("torch", reason="the benchmark needs torch")

from benchmarks import cases, sides, statistics, throughput, torch_side, worker  # noqa: E402
from cifar_jax.datasets import Dataset, Split  # noqa: E402
from cifar_jax.runtime.errors import UserError  # noqa: E402

__all__ = ["tiny"]


def test_cases_are_parsed_and_named_back():
    for text in ("train/dropout:128", "eval/deep:512"):
        assert str(cases.parse(text)) == text
    assert str(cases.parse("adam:128")) == "train/adam:128"
    recipe = cases.parse("dropout:7").settings("bfloat16")
    assert (recipe.batch_size, recipe.eval_batch_size, recipe.precision) == (7, 7, "bfloat16")
    assert len(cases.cases_from("table")) == 9
    assert len(cases.cases_from("adam:4,eval/deep:2")) == 2


@pytest.mark.parametrize("text", ["adam", "adam:0", "adam:x", "fit/adam:4", "resnet:4", ""])
def test_bad_cases_are_refused(text):
    with pytest.raises(UserError):
        cases.cases_from(text)


def test_batches_hold_each_image_at_most_once():
    order = cases.full_batches(103, 10)
    assert order.shape == (10, 10)
    assert len(set(order.ravel().tolist())) == 100
    with pytest.raises(UserError, match="larger"):
        cases.full_batches(3, 4)


def test_paired_ratio_cancels_drift():
    theirs = np.array([100, 50, 200, 80, 120.0])
    found = statistics.paired_ratio(2 * theirs, theirs)
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    noisy = statistics.paired_ratio(theirs * [1, 2, 3, 2, 2], theirs)
    assert noisy["low"] <= noisy["ratio"] == 2 <= noisy["high"]
    assert noisy["low"] < noisy["high"]


class FakeWorker:
    """A side of a given speed, with the answers of a worker process."""

    log: list = []  # noqa: RUF012

    def __init__(self, side, speed=None, losses=(2.0, 1.0), not_run=None):
        self.side, self.speed, self.losses, self.not_run = side, speed, losses, not_run

    def ask(self, do, **_):
        FakeWorker.log.append((self.side, do))
        if do == "prepare" and self.not_run:
            return {"not_run": self.not_run}
        if do == "prepare":
            return {"losses": list(self.losses), "compile_seconds": 1.0, "data_seconds": 0.1}
        return {"images": 100, "seconds": 100 / self.speed} if do == "window" else {}


def run_case(peers, tmp_path, rounds=4, mine=None):
    FakeWorker.log = []
    return throughput.measure(
        cases.parse("adam:50"),
        [mine or FakeWorker("ours", 300)],
        peers,
        tmp_path,
        precision="float32",
        rounds=rounds,
        seconds=1.0,
    )


def test_the_headline_is_the_strongest_comparable_peer(tmp_path):
    peers = [
        FakeWorker("published", 10),
        FakeWorker("eager", 90),
        FakeWorker("compile", 100),
        FakeWorker("compile_channels_last", 20),
        FakeWorker("cheat", 900, losses=(2.0, 1.5)),
        FakeWorker("cudagraph", not_run="a CUDA graph needs a GPU"),
    ]
    peers_without = [peer for peer in peers if peer.side != "cheat"]
    row = run_case(peers_without, tmp_path)
    assert row["strongest"] == "compile"
    assert row["ratio"]["ratio"] == pytest.approx(3)
    assert row["ratio_to_published"]["ratio"] == pytest.approx(30)
    assert row["not_run"] == {"cudagraph": "a CUDA graph needs a GPU"}
    assert row["sides"]["compile_channels_last"]["screened"]
    assert len(row["sides"]["eager"]["rates"]) == 4
    assert row["sides"]["ours"]["steps_per_second"] == pytest.approx(6)
    row = run_case(peers, tmp_path)
    assert row["strongest"] == "compile"
    assert not row["sides"]["cheat"]["same_work"]


def test_sides_take_turns_and_each_leads(tmp_path):
    run_case([FakeWorker("published", 10), FakeWorker("eager", 90)], tmp_path, rounds=3)
    windows = [side for side, do in FakeWorker.log if do == "window"][3:]
    rounds = [windows[i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(one) == ["eager", "ours", "published"] for one in rounds)
    assert [one[0] for one in rounds] == ["ours", "published", "eager"]


def test_our_own_failure_is_an_error_and_no_peer_is_no_ratio(tmp_path):
    with pytest.raises(UserError, match="out of memory"):
        run_case([], tmp_path, mine=FakeWorker("ours", not_run="out of memory"))
    row = run_case([FakeWorker("eager", not_run="no torch")], tmp_path)
    assert row["strongest"] is row["ratio"] is None


def test_the_table_shows_ratios_and_reasons(tmp_path, capsys, monkeypatch):
    row = run_case([FakeWorker("eager", 100), FakeWorker("cudagraph", not_run="no GPU")], tmp_path)
    result = {
        "machine": {"cpu": "a processor", "cores": 2}, "device": "cpu", "ours": ["ours"],
        "precision": "float32", "dataset": "cifar10", "rounds": 4, "commit": "abc",
        "date": "2026-01-01", "cases": [row],
    }  # fmt: skip
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["x", "--show", str(file)])
    throughput.main()
    shown = capsys.readouterr().out
    assert "| train/adam:50 | 300 (300-300) | eager 100 (100-100) | 3.00 (3.00-3.00)" in shown
    assert "Not run: cudagraph: no GPU." in shown
    assert "not run" in shown  # the published loop was not asked for


def test_the_driver_knows_every_peer():
    from benchmarks import torch_reference

    assert {name.partition("@")[0] for name in throughput.PEERS} == set(torch_reference.PEERS)


def test_worker_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    client = worker.Worker("eager", dataset="no_such_set")
    try:
        with pytest.raises(UserError, match="no_such_set"):
            client.ask(do="window")
    finally:
        client.close()


def test_worker_says_that_there_is_no_device(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    client = worker.Worker("ours", device="gpu", data_dir=str(tiny))
    try:
        with pytest.raises(UserError, match="--device gpu: JAX finds no such device"):
            client.ask(do="prepare", case="tutorial:4", weights=str(tmp_path / "w"), seconds=0.1)
    finally:
        client.close()


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    splits = {
        name: Split(
            rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8),
            rng.integers(0, 10, size).astype(np.int32),
        )
        for name, size in (("train", 64), ("test", 30))
    }
    return Dataset("drawn", "1.0.0", "test", tuple("abcdefghij"), "f", splits)


@pytest.mark.parametrize(
    "text",
    ["train/adam:8", pytest.param("train/dropout:8", marks=pytest.mark.slow), "eval/tutorial:16"],
)
def test_both_sides_do_the_same_work(text, small, tmp_path):
    """Real sides: same weights, same batches, same losses; windows count what was done."""
    case, weights = cases.parse(text), tmp_path / "weights.npz"
    ours = sides.Ours(lowering="lax")
    found = ours.prepare(case, small, "float32", weights, 0.01)
    count = 8 if case.kind == "train" else 1
    assert len(found["losses"]) == count
    theirs = torch_side.PyTorch("eager", "cpu")
    expected = theirs.prepare(case, small, "float32", weights, 0.01)
    assert statistics.largest_difference(found["losses"], expected["losses"]) < 1e-3
    if case.kind == "train":
        assert found["losses"][0] != found["losses"][-1]
        # A step's work is in the window: the state has moved on by as many steps.
        before = int(ours.state.step)
        images, seconds = ours.window()
        assert images == 8 * (int(ours.state.step) - before) > 0
    else:
        images, seconds = ours.window()
        assert images == 30 * ours.dispatches
    assert seconds > 0
    assert theirs.window()[0] > 0


@pytest.mark.slow
def test_the_bare_step_does_the_work_of_the_chunks(small, tmp_path):
    case, found = cases.parse("train/dropout:8"), {}
    for name in ("ours-one-gemm", "ours-step-gemm"):
        side = worker.make_side(name, "cpu")
        found[name] = side.prepare(case, small, "float32", tmp_path / "weights.npz", 0.01)["losses"]
    assert statistics.largest_difference(*found.values()) < 1e-5
    assert isinstance(side, sides.OurStep)
    before = int(side.state.step)
    images, _ = side.window()
    assert images == 8 * (int(side.state.step) - before) > 0


# torch's own compiler imports parts of torch that torch calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "peer", ["published", "eager_channels_last", pytest.param("compile", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("text", ["train/dropout:8", "eval/dropout:8"])
def test_peers_start_from_the_weights_and_batches_given(text, peer, small, tmp_path, monkeypatch):
    """Each peer's losses are those of the eager one, whatever way the images take."""
    from benchmarks.torch_models import MODELS
    from benchmarks.torch_published import PublishedTrainer

    # Workers are forked, which jax's threads in this process would not survive.
    monkeypatch.setattr(PublishedTrainer, "worker_counts", (0,))
    flat = {}
    for name, value in MODELS["dropout_cnn"]().state_dict().items():
        layer, kind = name.split(".")
        value = value.numpy()
        if kind == "weight":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        flat[f"{layer}/{'kernel' if kind == 'weight' else 'bias'}"] = value
    np.savez(tmp_path / "weights.npz", **flat)
    case, found = cases.parse(text), []
    for name in ("eager", peer):
        side = torch_side.PyTorch(name, "cpu")
        found.append(side.prepare(case, small, "float32", tmp_path / "weights.npz", 0.01))
        images, seconds = side.window()
        assert images % (8 if case.kind == "train" else 30) == 0 < images
        assert seconds > 0
    assert len(found[0]["losses"]) == (8 if case.kind == "train" else 1)
    assert statistics.largest_difference(found[1]["losses"], found[0]["losses"]) < 1e-4


def test_what_cannot_run_gives_its_reason(small, tmp_path, monkeypatch):
    from benchmarks.torch_trainers import NotRun

    case, weights = cases.parse("adam:8"), tmp_path / "weights.npz"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    np.savez(weights)
    with pytest.raises(NotRun, match="GPU") as reason:
        torch_side.PyTorch("cudagraph", "cpu").prepare(case, small, "float32", weights, 0.01)
    assert worker.not_run(reason.value) == {"not_run": "a CUDA graph needs a GPU"}
