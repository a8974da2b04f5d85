"""The learning-rate range test: what it trains, what it reads off the losses, and its command."""

import csv
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_data import small, tiny, words

from cifar_jax import find_lr, input_pipeline, optimizers, steps
from cifar_jax.datasets import load_dataset
from cifar_jax.models import make_model
from cifar_jax.replicas import rate_ramp
from cifar_jax.runtime.errors import UserError, run_command

__all__ = ["small", "tiny"]

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
RAMP = rate_ramp.rates(1e-4, 10, 200)


def losses_with_lowest_at(rate, seeds=4, depth=0.5, noise=0.02):
    """Losses [seeds, 200] that fall to a lowest one at `rate` of `RAMP`, and rise after it."""
    decades = np.log10(RAMP / rate)
    dip = depth * np.exp(-0.5 * (decades / 0.4) ** 2)
    rise = np.where(decades > 0, 2 * decades**2, 0)
    return 2.3 - dip + rise + noise * np.random.default_rng(0).normal(size=(seeds, len(RAMP)))


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_a_tenth_of_the_rate_of_the_lowest_loss_is_suggested(rate):
    found = rate_ramp.read(losses_with_lowest_at(rate), RAMP)
    assert found.suggestion == pytest.approx(rate / 10, rel=0.25)
    assert found.first == pytest.approx(2.3, abs=0.01)
    assert found.lowest == pytest.approx(1.8, abs=0.05)


def test_images_learned_by_heart_do_not_move_the_suggestion():
    """Their loss stays at 0 however high the rate goes."""
    losses = losses_with_lowest_at(0.02, noise=0)
    learned = losses.copy()
    learned[:, RAMP > 0.02] = losses.mean(axis=0).min()
    kept, found = rate_ramp.read(losses, RAMP), rate_ramp.read(learned, RAMP)
    assert found.suggestion == pytest.approx(kept.suggestion, rel=0.3)


def test_nothing_is_suggested_where_nothing_is_seen():
    flat = rate_ramp.read(losses_with_lowest_at(0.02, depth=0)[:, :80], RAMP)
    assert flat.suggestion is None
    assert "--steps 400" in flat.why
    falling = 2.3 - 0.2 * np.arange(200) / 200 + np.zeros((4, 1))
    assert "larger --high" in rate_ramp.read(falling, RAMP).why
    with pytest.raises(UserError, match="smaller --low"):
        rate_ramp.read(np.full((4, 12), 2.3), RAMP)


def test_smoothing_keeps_a_line_inside_and_its_weights_sum_to_one():
    line = np.linspace(0, 1, 101)
    np.testing.assert_allclose(rate_ramp.smoothed(np.ones(101), 3), 1)
    np.testing.assert_allclose(rate_ramp.smoothed(line, 3)[15:86], line[15:86], atol=1e-6)


def test_steps_follow_the_batch_size():
    assert [rate_ramp.default_steps(size) for size in (4, 20, 128, 2000)] == [2000, 500, 100, 100]


@pytest.fixture(scope="module")
def found(tiny, small, tmp_path_factory):
    """(folder, summary, what was said) of the command, on a set of fewer steps than the ramp."""
    folder, said = tmp_path_factory.mktemp("ramp") / "run", []
    text = "--recipe tutorial --model small --batch-size 20 --seeds 0:2 --low 1e-4 --steps 100"
    given = [*words(text), "--conv", "gemm", "--data-dir", str(tiny), "--workdir", str(folder)]
    return folder, find_lr.main(given, say=said.append), "\n".join(said)


def test_the_losses_are_those_of_steps_at_these_rates(found, tiny, small):
    folder = found[0]
    rows = list(csv.DictReader((folder / "learning_rates.csv").read_text().splitlines()))
    rates = [float(row["learning_rate"]) for row in rows]
    np.testing.assert_allclose(rates, np.geomspace(1e-4, 10, 100)[: len(rates)])
    dataset = load_dataset("cifar10", data_dir=tiny)
    train = dataset.splits["train"]
    recipe = find_lr.cli.recipe_from(
        find_lr.make_parser().parse(words("--recipe tutorial --batch-size 20"))
    )[1]
    model = make_model("small", num_classes=10, lowering="gemm")

    @jax.jit
    def step(state, batch, rate):
        optimizer = optimizers.make_optimizer(recipe, 30, {"learning_rate": rate})
        preprocess = steps.make_preprocess("half")
        return steps.train_step(
            state, batch, model=model, optimizer=optimizer, preprocess=preprocess
        )

    keys = input_pipeline.run_keys(1)
    state = steps.create_state(
        model, optimizers.make_optimizer(recipe, 30), keys["state"], image_shape=(32, 32, 3)
    )
    # Past the end of the first epoch, of 30 steps, the second one's order goes on.
    epochs = [
        input_pipeline.epoch_order(keys["order"], epoch, np.arange(600), 20, False)
        for epoch in (0, 1)
    ]
    assert len(rates) > 45
    for i, positions in enumerate(np.concatenate(epochs)[:45]):
        batch = {"image": train.images[positions], "label": train.labels[positions]}
        state, sums = step(state, batch, np.float32(rates[i]))
        loss = float(sums["loss"] / sums["count"])
        assert float(rows[i]["seed 1"]) == pytest.approx(loss, rel=2e-4), f"step {i}"


def test_what_the_command_says_and_writes(found):
    folder, summary, said = found
    saved = json.loads((folder / "learning_rates.json").read_text())
    assert saved["suggestion"] == summary["suggestion"]
    assert summary["suggestion"] == pytest.approx(summary["lowest_at"] / 10, rel=0.06)
    assert 1e-3 < summary["lowest_at"] < 1, "of SGD with momentum on ten classes"
    assert f"Suggestion --learning-rate {summary['suggestion']:g}" in said
    assert "Device     cpu" in said
    assert "Data set   cifar10" in said
    assert (folder / "learning_rates.png").stat().st_size > 5000
    assert not (folder / "config.json").exists(), "no run directory"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--low 1 --high 0.1", "a ramp goes up"),
        ("--low 0", "from above 0"),
        ("--steps 9", "give 100 or more"),
        ("--replica-form both", "unknown --replica-form"),
        ("--recipe adm", "did you mean 'adam'"),
        ("--batch-size 5000", "batch"),
    ],
)
def test_bad_input(options, expected, tiny, tmp_path, capsys):
    given = [*words(options), "--data-dir", str(tiny), "--workdir", str(tmp_path / "run")]
    assert run_command(functools.partial(find_lr.main, given)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def accuracies(recipe):
    """{learning rate: mean test accuracy} of the committed sweeps, at the recipe's momentum."""
    momentum = {"tutorial": 0.9, "dropout": 0.0}.get(recipe)
    found = {}
    for name in (f"sweep_{recipe}.csv", f"sweep_{recipe}_near.csv"):
        for row in csv.DictReader((RESULTS / name).read_text().splitlines()):
            if float(row.get("momentum", momentum or 0)) == (momentum or 0):
                accuracy = float(row["test_accuracy"] or 0.1)  # diverged
                found.setdefault(float(row["learning_rate"]), []).append(accuracy)
    return {rate: np.mean(values) for rate, values in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tutorial", "adam", "dropout"])
def test_the_suggestion_lies_in_the_good_band_of_the_sweeps(recipe, cifar10, tmp_path):
    suggestion = find_lr.main(["--recipe", recipe, "--workdir", str(tmp_path)])["suggestion"]
    measured = accuracies(recipe)
    rates = sorted(measured)
    expected = np.interp(np.log(suggestion), np.log(rates), [measured[rate] for rate in rates])
    assert expected > max(measured.values()) - 0.025
