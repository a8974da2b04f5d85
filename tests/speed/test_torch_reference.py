"""The PyTorch peers: same networks, same arithmetic in every peer, resumable results."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

pytestmark = pytest.mark.extended

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

from benchmarks import torch_reference, torch_trainers  # noqa: E402
from benchmarks.torch_models import MODELS, state_from_flax  # noqa: E402
from benchmarks.torch_published import PublishedTrainer  # noqa: E402
from cifar_jax.recipes import RECIPES  # noqa: E402
from cifar_jax.runtime.errors import UserError  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARAMETERS = {
    "tutorial_cnn": 62_006,
    "deep_cnn": 895_120,
    "dropout_cnn": 541_094,
    "vgg16": 134_301_514,
    "vgg11_bn": 9_231_114,
    "vgg16_bn": 14_728_266,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    """120 images whose labels can be learnt: each class has its own mean colour."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 120).astype(np.int32)
    colours = rng.integers(40, 216, (10, 1, 1, 3))
    noise = rng.integers(-40, 40, (120, 32, 32, 3))
    return (colours[labels] + noise).astype(np.uint8), labels


@pytest.mark.parametrize("name", [name for name in MODELS if ":" not in name])
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["tutorial_cnn", "deep_cnn", "dropout_cnn"])
def test_flax_weights_give_the_same_logits(name, small):
    import jax

    from cifar_jax.models import MODELS as FLAX_MODELS

    torch_model = MODELS[name]().eval()
    images = (small[0][:3] / 127.5 - 1).astype(np.float32)
    flax_model = FLAX_MODELS[name](lowering="lax")
    shapes = jax.eval_shape(flax_model.init, jax.random.key(3), images)
    rng = np.random.default_rng(3)
    variables = jax.tree.map(lambda s: rng.uniform(-0.1, 0.1, s.shape).astype(s.dtype), shapes)
    ours = jax.jit(flax_model.apply)(variables, images)
    torch_model.load_state_dict(state_from_flax(variables["params"]))
    with torch.no_grad():
        theirs = torch_model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def plain_loop(recipe, seed, images, labels, order):
    """The tutorial's loop with nothing around it, as the yardstick of the peers."""
    torch.manual_seed(seed)
    model = MODELS[recipe.model]()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[recipe.optimizer]
    extra = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    optimizer = kind(model.parameters(), lr=recipe.learning_rate, **extra)
    losses = []
    for indices in order:
        batch = torch.tensor(images[indices].transpose(0, 3, 1, 2) / 127.5 - 1).float()
        loss = torch.nn.functional.cross_entropy(model(batch), torch.tensor(labels[indices]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("peer", ["published", "eager", "eager_channels_last"])
@pytest.mark.parametrize(("name", "batch_size"), [("tutorial", 4), ("adam", 32)])
def test_every_peer_does_the_plain_loops_arithmetic(name, batch_size, peer, small, monkeypatch):
    monkeypatch.setattr(PublishedTrainer, "worker_counts", (0,))
    recipe = RECIPES[name].replace(batch_size=batch_size, learning_rate=0.01)
    order = torch_reference.epoch_order(len(small[0]), batch_size, seed=1, epoch=0)
    assert len(order[-1]) != batch_size or name == "tutorial"  # a short last batch is in it
    result = torch_reference.train_peer(recipe, peer, 5, *small, order=order)
    expected = plain_loop(recipe, 5, *small, order)
    assert abs(expected[0] - expected[-1]) > 1e-3  # it trains
    np.testing.assert_allclose(result["losses"], expected, rtol=1e-4)


WORKERS = """
import numpy as np
from benchmarks.torch_published import PublishedTrainer
from cifar_jax.recipes import RECIPES
import sys
assert "jax" not in sys.modules  # it does not survive the fork of a worker
images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
labels = np.arange(16) % 10
order = np.arange(16).reshape(4, 4)
for workers in (0, 2):
    trainer = PublishedTrainer(RECIPES["tutorial"], images, labels, workers=workers)
    print(trainer.run(order).tolist())
"""


def test_data_loader_workers_change_nothing():
    """In a process of its own: workers are forked, and this one has jax's threads."""
    run = subprocess.run(
        [sys.executable, "-c", WORKERS], check=True, capture_output=True, text=True, cwd=ROOT
    )
    alone, with_workers = run.stdout.splitlines()
    assert alone == with_workers
    assert len(json.loads(alone)) == 4


def test_initial_state_order_and_max_steps_are_obeyed(small):
    recipe = RECIPES["adam"].replace(batch_size=8)
    state = MODELS["tutorial_cnn"]().state_dict()
    order = torch_reference.epoch_order(120, 8, 0, 0)
    run = torch_reference.train_peer
    first = run(recipe, "eager", 0, *small, initial_state=state, order=order, max_steps=5)
    again = run(recipe, "eager", 9, *small, initial_state=state, order=order[:5])
    assert first["losses"].shape == (5,)
    np.testing.assert_array_equal(first["losses"], again["losses"])


def test_split_and_epochs_cover_every_image_once():
    kept, held_out = torch_reference.split_indices(100, 0.2, seed=3)
    assert (len(kept), len(held_out)) == (80, 20)
    assert sorted([*kept, *held_out]) == list(range(100))
    orders = [torch_reference.epoch_order(80, 12, 3, epoch) for epoch in (0, 1)]
    assert [len(part) for part in orders[0]] == [12] * 6 + [8]
    for order in orders:
        assert sorted(np.concatenate(order)) == list(range(80))
    assert not np.array_equal(orders[0][0], orders[1][0])


def test_the_best_epochs_weights_are_tested(small):
    # A rate at which the loss rises and falls, so that the last epoch is not the best.
    recipe = RECIPES["dropout"].replace(epochs=6, batch_size=4, learning_rate=0.3)
    result = torch_reference.train_peer(recipe, "eager", 0, *small, test=small)
    losses = [row["val_loss"] for row in result["epochs"]]
    best = int(np.nanargmin(losses)) + 1
    assert result["best_epoch"] == best < 6
    held_out = torch_reference.split_indices(120, 0.2, 0)[1]
    trainer = torch_trainers.EagerTrainer(
        recipe, *small, initial_state=result["model"].state_dict()
    )
    data = trainer.place(small[0][held_out], small[1][held_out])
    assert trainer.evaluate(data, 5)["loss"] == pytest.approx(losses[best - 1], rel=1e-5)


def test_evaluation_counts_every_image_once_at_any_batch(small):
    trainer = torch_trainers.EagerTrainer(RECIPES["dropout"], *small)
    results = [trainer.evaluate(trainer.training_data, size) for size in (1, 7, 120)]
    for result in results:
        assert result["correct"] == results[0]["correct"] == sum(result["per_class"])
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert result["accuracy"] == result["correct"] / 120


def test_peers_that_cannot_run_say_why(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch_trainers.shutil, "which", lambda name: None)
    for peer, reason in [("cudagraph", "GPU"), ("compile", "compiler")]:
        with pytest.raises(torch_trainers.NotRun, match=reason):
            torch_reference.train_peer("tutorial", peer, 0, *small)
    with pytest.raises(torch_trainers.NotRun, match="GPU"):
        torch_reference.train_peer("tutorial", "eager", 0, *small, device="cuda")


@pytest.mark.parametrize(
    ("change", "message"), [({"augment": ("flip",)}, "augment"), ({"clip_norm": 1.0}, "clip_norm")]
)
def test_recipes_beyond_the_reference_are_refused(change, message, small):
    with pytest.raises(UserError, match=message):
        torch_reference.train_peer(RECIPES["tutorial"].replace(**change), "eager", 0, *small)


@pytest.mark.parametrize("text", ["", "a", "3:3", "-1", "0:2:4", "5:1"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(UserError, match="--seeds"):
        torch_reference.seeds_from(text)


def test_command_line_appends_and_leaves_out_finished_seeds(small, tmp_path, monkeypatch):
    split = types.SimpleNamespace(images=small[0], labels=small[1])
    data = types.SimpleNamespace(
        name="cifar10", version="3.0.2", fingerprint="f", splits={"train": split, "test": split}
    )
    monkeypatch.setattr("cifar_jax.datasets.load_dataset", lambda name, **options: data)
    out = tmp_path / "runs" / "out.jsonl"

    def call(seeds, epochs):
        words = f"x --recipe adam --seeds {seeds} --epochs {epochs} --out {out}".split()
        monkeypatch.setattr(sys, "argv", words)
        torch_reference.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert [row["seed"] for row in call("0:2", 1)] == [0, 1]
    rows = call("0:3", 1)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert len(call("0:3", 2)) == 6  # other settings are other runs
    row = rows[2]
    assert row["test_correct"] == sum(row["per_class"])
    assert row["epochs"][0].keys() == {"epoch", "train_loss", "val_loss", "val_accuracy"}
    assert row["versions"]["torch"] == torch.__version__
    assert row["dataset"]["fingerprint"] == "f"
