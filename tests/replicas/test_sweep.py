"""Sweeps: axes as they are written, points that train together, and what comes of them."""

import csv
import functools
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_data import small, tiny, words

from cifar_jax import sweep, train
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import sweep as sweeps
from cifar_jax.runtime.errors import UserError, run_command

__all__ = ["small", "tiny"]

FIXED = "--recipe tutorial --model small --epochs 2 --batch-size 60 --validation-fraction 0.2"
# At the second rate the decay alone multiplies weights by thousands a step.
FIXED += " --weight-decay 5"
RATES = "--learning-rate 0.01,1000 --momentum 0,0.9"


def test_axes_are_lists_and_ranges():
    assert sweeps.parse("momentum", "0,0.9").values == (0.0, 0.9)
    assert sweeps.parse("batch_size", "4, 8").values == (4, 8)
    assert sweeps.parse("nesterov", "true,false").values == (True, False)
    assert sweeps.parse("augment", "flip,translate").values == (("flip", "translate"),)
    assert sweeps.parse("learning_rate", "log:1e-3:1:4").values == (0.001, 0.01, 0.1, 1.0)
    assert sweeps.parse("momentum", "lin:0:0.9:4").values == (0.0, 0.3, 0.6, 0.9)
    assert sweeps.parse("batch_size", "log:1:100:3").values == (1, 10, 100)
    assert [sweeps.parse(n, "1,2").is_traced for n in ("learning_rate", "epochs")] == [True, False]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("learning_rat", "1,2", "did you mean 'learning_rate'"),
        ("momentum", "0,high", "'high' is not a number"),
        ("momentum", "0,,1", "'' is not a number"),
        ("batch_size", "4,8.5", "'8.5' is not a whole number"),
        ("nesterov", "yes,no", "'yes' is not true or false"),
        ("momentum", "0.9,0.9", "names a value twice"),
        ("learning_rate", "log:1:2", "log:low:high:count"),
        ("learning_rate", "log:1:2:3:4", "log:low:high:count"),
        ("learning_rate", "log:0:1:3", "both above 0"),
        ("learning_rate", "lin:1:1:3", "low below high"),
        ("learning_rate", "lin:0:1:1", "count of at least 2"),
        ("optimizer", "log:1:2:3", "no number"),
    ],
)
def test_bad_axes(name, text, expected):
    with pytest.raises(UserError, match=expected):
        sweeps.parse(name, text)


def test_grids_and_points_by_chance():
    a, b = sweeps.parse("learning_rate", "log:1e-3:1:4"), sweeps.parse("momentum", "0,0.9")
    points = sweeps.grid([a, b])
    assert len(points) == 8
    assert points[:2] == [
        {"learning_rate": 0.001, "momentum": 0.0},
        {"learning_rate": 0.001, "momentum": 0.9},
    ]
    a = sweeps.parse("learning_rate", "log:1e-3:1", random=True)
    drawn = sweeps.by_chance([a, b], 400, seed=1)
    assert drawn == sweeps.by_chance([a, b], 400, seed=1)
    rates = np.log10([point["learning_rate"] for point in drawn])
    assert (rates.min() > -3, rates.max() < 0) == (True, True)
    assert abs(rates.mean() + 1.5) < 0.15, "uniform in the logarithm"
    assert {point["momentum"] for point in drawn} == {0.0, 0.9}


def test_points_share_a_program_where_they_can():
    given = [sweeps.parse("batch_size", "4,8"), sweeps.parse("clip_norm", "0,2")]
    points = sweeps.grid(given)
    assert sweeps.programs_of(points, given) == [
        ({"batch_size": 4}, [0, 1]),
        ({"batch_size": 8}, [2, 3]),
    ]
    base, numbers = sweeps.base_of(RECIPES["tutorial"], points[:2])
    assert base.clip_norm == 2, "switched on for all,"
    assert numbers["clip_norm"].tolist() == [math.inf, 2], "and without effect where it was off"


def start(tiny, workdir, text, say=id):
    options = [*words(text), "--data-dir", str(tiny), "--workdir", str(workdir)]
    return sweep.main(options, say=say)


@pytest.fixture(scope="module")
def done(tiny, small, tmp_path_factory):
    """(directory, summary, what was said) of four points, two of which diverge, and two seeds."""
    workdir, said = tmp_path_factory.mktemp("sweep") / "run", []
    summary = start(tiny, workdir, f"{FIXED} {RATES} --seeds 0:2 --devices 2", said.append)
    return workdir, summary, "\n".join(said)


def rows(workdir):
    return list(csv.DictReader((workdir / "results.csv").read_text().splitlines()))


@pytest.mark.slow
def test_a_point_is_the_single_run_of_its_settings(done, tiny, tmp_path):
    arguments = f"{FIXED} --learning-rate 0.01 --momentum 0.9 --seed 1 --devices 1 --no-plots"
    common = ["--data-dir", str(tiny), "--workdir", str(tmp_path / "alone")]
    alone = train.main([*words(arguments), *common], say=id)
    (mine,) = (
        row
        for row in rows(done[0])
        if (row["learning_rate"], row["momentum"], row["seed"]) == ("0.01", "0.9", "1")
    )
    assert float(mine["test_accuracy"]) == alone["test_accuracy"]
    assert float(mine["test_loss"]) == pytest.approx(alone["test_loss"], rel=1e-5)
    assert float(mine["validation_loss"]) == pytest.approx(alone["best_validation_loss"], rel=1e-5)


def test_what_a_sweep_writes(done):
    workdir, summary, said = done
    table = rows(workdir)
    assert len(table) == 8
    diverged = [row for row in table if row["diverged_at_step"]]
    assert {row["learning_rate"] for row in diverged} == {"1000.0"}
    assert len(diverged) == 4
    assert all(row["test_accuracy"] == "" for row in diverged)
    assert "warning: learning_rate 1000, momentum 0, seed 0: loss not finite at step" in said
    assert "8 runs, 4 diverged; the best points by validation accuracy:" in said
    assert summary["ranked_by"] == "validation_accuracy"
    assert [point["diverged"] for point in summary["points"]] == [0, 0, 2, 2]
    good = [float(row["test_accuracy"]) for row in table if row["point"] == "0"]
    assert summary["points"][0]["test_accuracy"]["mean"] == pytest.approx(np.mean(good))
    assert summary["points"][2]["test_accuracy"] is None
    for name in ("curves.png", "map.png"):
        with Image.open(workdir / "plots" / name) as picture:
            assert picture.size[0] > 500
    assert json.loads((workdir / "summary.json").read_text()) == summary


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_table(done, tiny, tmp_path):
    def kill(line):
        if line.startswith("epoch 2/2"):
            raise Killed

    text = f"{FIXED} {RATES} --seeds 0:2 --devices 2"
    with pytest.raises(Killed):
        start(tiny, tmp_path / "again", text, kill)
    said = []
    start(tiny, tmp_path / "again", text, said.append)
    assert any(line.startswith("Going on from step 8") for line in said)
    assert rows(tmp_path / "again") == rows(done[0])
    said.clear()
    start(tiny, tmp_path / "again", text, said.append)
    assert not any(line.startswith("epoch") for line in said), "nothing is trained twice"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--learning-rat 1,2", "unknown option --learning-rat; did you mean '--learning-rate'"),
        ("--learning-rate 0.1", "nothing to vary"),
        ("--momentum 0,2", "--momentum must be at least 0"),
        ("--recipe adam --momentum 0,0.9", "--momentum is an axis of sgd"),
        ("--recipe dropuot --momentum 0,0.9", "did you mean 'dropout'"),
        ("--model tutorial_cnn,depe_cnn", "did you mean 'deep_cnn'"),
        ("--momentum 0,0.9 --seeds 3:3", "'3:3' is empty"),
        ("--momentum lin:0:0.9:99999", "are more than 10,000"),
        ("--momentum 0,0.9 --dataset cifar10,shapes10", "--dataset is no axis"),
        ("--momentum 0,0.9 --devices 99", "there are 8 here"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, tiny, tmp_path, capsys):
    common = ["--data-dir", str(tiny), "--workdir", str(tmp_path / "run")]
    code = run_command(functools.partial(sweep.main, [*words(arguments), *common], say=id))
    error = capsys.readouterr().err.splitlines()[-1]
    assert (code, error[:7]) == (2, "error: ")
    assert expected in error


def test_traced_numbers_give_the_recipes_updates():
    """Every traced setting against the recipe's own, schedule and averaging included."""
    from cifar_jax import optimizers

    changes = {"momentum": 0.8, "weight_decay": 0.1, "clip_norm": 0.5, "schedule": "cosine"}
    recipe = RECIPES["tutorial"].replace(learning_rate=0.3, **changes)
    params = {"a": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}}
    values = {name: getattr(recipe, name) for name in optimizers.TRACED}
    numbers = {name: np.float32(value) for name, value in values.items()}
    other = recipe.replace(learning_rate=0.7, momentum=0.1, weight_decay=0.3, clip_norm=9.0)

    def three_updates(optimizer, state, params):
        for _ in range(3):
            updates, state = optimizer.update(params, state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
        return params

    own = optimizers.make_optimizer(recipe, 2)
    want = three_updates(own, own.init(params), params)

    @jax.jit
    def traced(numbers, state):
        return three_updates(optimizers.make_optimizer(other, 2, numbers), state, params)

    got = traced(numbers, own.init(params))
    np.testing.assert_allclose(got["a"]["kernel"], want["a"]["kernel"], rtol=1e-5)
