"""Many runs in one command: each is the run of its seed, and together they tell the spread."""

import concurrent.futures
import functools
import json
import os
import signal
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_data import SIZES, rows_of, small, states_of, summary_of, tiny, words

from cifar_jax import convert, evaluate, predict, recipes, train
from cifar_jax.parallel import programs
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import results, scheduler
from cifar_jax.reporting import predictions
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.training.setup import Run

__all__ = ["small", "tiny"]

# Dropout, momentum, validation and the best epoch: what a run draws and keeps.
RUN = [
    *words("--recipe dropout --model small --epochs 3 --batch-size 70 --learning-rate 0.005"),
    *words("--momentum 0.5 --log-every 3"),
]
SEEDS = (3, 4, 9)
# XLA may fuse the single run's program otherwise: after three epochs some weights differ by a few
# units in the last place.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def start(tiny, workdir, *extra, arguments=RUN):
    lines = []
    common = ["--data-dir", str(tiny), "--workdir", str(workdir)]
    summary = train.main([*arguments, *common, *extra], say=lines.append)
    return summary, "\n".join(lines)


@pytest.fixture(scope="module")
def group(tiny, small, tmp_path_factory):
    """(directory, summary, what was said) of three runs on two devices."""
    workdir = tmp_path_factory.mktemp("many") / "group"
    return workdir, *start(tiny, workdir, *words("--seeds 3:5,9 --devices 2"))


def assert_same_members(got, want, seeds=SEEDS, **tolerance):
    for seed in seeds:
        a, b = got / f"seed-{seed}", want / f"seed-{seed}"
        assert_same(a, b if b.exists() else want, **tolerance)


def assert_same(got, want, **tolerance):
    """Two complete run directories hold the same run: to the last bit, or to a tolerance."""
    mine, theirs = states_of(got), states_of(want)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        if tolerance:
            np.testing.assert_allclose(mine[name], theirs[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(mine[name], theirs[name], strict=True, err_msg=name)
    for row, other in zip(rows_of(got), rows_of(want), strict=True):
        if tolerance:
            assert row.keys() == other.keys()
            row = {k: v for k, v in row.items() if not isinstance(v, float)}
            other = {k: other[k] for k in row}
        assert row == other or (tolerance and row["kind"] == "test")
    together = {"runs_trained_together", "devices_sharing_a_batch"}
    mine, theirs = summary_of(got), summary_of(want)
    for name in theirs.keys() - together:
        if not tolerance or name in ("seed", "recipe", "steps", "test_count", "best_epoch"):
            assert mine[name] == theirs[name], name


def test_every_run_is_the_single_run_of_its_seed(group, tiny, tmp_path):
    start(tiny, tmp_path / "alone", *words("--seed 9 --devices 1 --no-plots"))
    assert_same(group[0] / "seed-9", tmp_path / "alone", **ROUNDING)
    config = json.loads((group[0] / "seed-9" / "config.json").read_text())
    assert config == json.loads((tmp_path / "alone" / "config.json").read_text())


@pytest.mark.slow
def test_with_augmentation_too(tiny, small, tmp_path):
    arguments = [*RUN, *words("--augment flip,translate --no-plots")]
    start(tiny, tmp_path / "many", *words("--seeds 3,4"), arguments=arguments)
    start(tiny, tmp_path / "one", *words("--seed 4 --devices 1"), arguments=arguments)
    assert_same(tmp_path / "many" / "seed-4", tmp_path / "one", **ROUNDING)


@pytest.mark.slow
def test_vmapped_runs_are_the_same_to_rounding(group, tiny, tmp_path):
    _, said = start(tiny, tmp_path / "v", *words("--seeds 3:5,9 --devices 2 --replica-form vmap"))
    assert "form vmap (together in every step)" in said
    assert_same_members(tmp_path / "v", group[0], rtol=2e-3, atol=2e-4)


def test_what_is_said_and_summed_up(group):
    workdir, summary, said = group
    for text in (
        "test images, seed of each of 3,4,9",
        "3 runs, seeds 3,4,9, on 2 devices, form map (one after another on each)",
        "3 runs ",
        "train loss",
        "epoch 1/3 ",
        " ± ",
        "Test accuracy ",
        "95 % interval",
        "Ensemble of 3",
    ):
        assert text in said, text
    assert "Groups" not in said
    runs = [json.loads((workdir / f"seed-{s}" / "summary.json").read_text()) for s in SEEDS]
    accuracies = [run["test_accuracy"] for run in runs]
    assert [run["test_accuracy"] for run in summary["runs"]] == accuracies
    found = summary["test_accuracy"]
    assert (found["n"], found["min"], found["max"]) == (3, min(accuracies), max(accuracies))
    assert found["min"] < found["mean"] < found["max"]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert summary["test_loss"]["mean"] == pytest.approx(np.mean([r["test_loss"] for r in runs]))
    cats = [run["per_class"][3]["accuracy"] for run in runs]
    assert summary["per_class"][3]["class"] == "cat"
    assert summary["per_class"][3]["mean"] == pytest.approx(np.mean(cats))
    # The ensemble, from the runs' own probabilities; labels go round in the tiny set.
    said = [predictions.read(workdir / f"seed-{seed}")[0] for seed in SEEDS]
    shares = [found.probabilities for found in said]
    right = np.mean(shares, axis=0).argmax(axis=1) == np.arange(SIZES["test"]) % 10
    assert summary["ensemble"]["test_correct"] == right.sum()
    assert summary["seeds"] == list(SEEDS)
    assert summary["diverged"] == summary["published_accuracy"] == []
    with Image.open(workdir / "plots" / "test_accuracy.png") as picture:
        assert picture.size[0] > 500
    assert not list(workdir.glob("groups/*/checkpoints"))


def test_a_run_of_the_group_serves_as_any_other(group, tmp_path):
    run = str(group[0] / "seed-4")
    said = []
    found = json.loads((group[0] / "seed-4" / "summary.json").read_text())
    convert.main([run, str(tmp_path / "w.safetensors")], say=said.append)
    assert (tmp_path / "w.safetensors").stat().st_size > 4 * found["parameters"]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    predict.main([run, str(tmp_path / "black.png")], say=said.append)
    assert "black.png" in "\n".join(said)


def test_evaluate_finds_what_the_group_found(group, tiny):
    run = group[0] / "seed-4"
    found = evaluate.main([str(run), "--data-dir", str(tiny), "--devices", "1"], say=id)
    assert found["test_correct"] == json.loads((run / "summary.json").read_text())["test_correct"]
    with pytest.raises(UserError, match=r"holds 3 runs; name one, as .*seed-3"):
        evaluate.main([str(group[0]), "--data-dir", str(tiny)], say=id)


class Killed(Exception):
    pass


@pytest.mark.extended
def test_killed_or_stopped_it_goes_on_to_the_same_bits(group, tiny, tmp_path, monkeypatch):
    """In the middle of an epoch; and in groups: here as many runs as a small memory holds."""
    monkeypatch.setattr(scheduler, "available_bytes", lambda processes: 0)
    workdir, said, looks = tmp_path / "again", [], []
    arguments = [*RUN, "--data-dir", str(tiny), "--workdir", str(workdir)]
    arguments += words("--seeds 3:5,9 --devices 2 --save-minutes 1e-9")

    def stop():
        looks.append(None)
        if len(looks) > 7:  # once at the start, 4 chunks and the end of epoch 1, a chunk of epoch 2
            raise Killed

    @contextmanager
    def killed_later():
        yield stop

    with monkeypatch.context() as patched:
        patched.setattr(train, "stop_requests", killed_later)
        # Few steps a chunk, so that there is a middle.
        patched.setattr(programs.Chunks, "next", lambda chunks, left: min(left, 2))
        with pytest.raises(Killed):
            train.main(arguments, say=said.append)
    assert any("2 of up to 2 runs, one after another" in line for line in said)
    # Its size was decided when it began.
    monkeypatch.setattr(scheduler, "available_bytes", lambda processes: None)
    lengths = []

    def asked_to_stop(chunks, left):
        lengths.append(min(left, 2))
        if len(lengths) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return lengths[-1]

    with monkeypatch.context() as patched:
        patched.setattr(programs.Chunks, "next", asked_to_stop)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments, say=said.append)
    assert "Going on from step 9 (epoch 2, step 2)" in said
    assert stopped.value.code == 128 + signal.SIGTERM
    assert said[-2] == "Stopped by SIGTERM after step 13; all is saved."
    assert said[-1].startswith("Go on with: python -m cifar_jax.train --recipe dropout")
    summary = train.main(arguments, say=said.append)
    assert "Going on from step 13 (epoch 2, step 6)" in said
    assert "Group 2 of 2: 1 run" in said
    assert_same_members(workdir, group[0])
    for name in ("test_accuracy", "test_loss", "per_class", "runs", "ensemble"):
        assert summary[name] == group[1][name]
    # Asked for again it is only shown; without its summary the runs are not trained again.
    said.clear()
    assert train.main(arguments, say=said.append) == summary
    assert "complete; --overwrite" in said[0]
    (workdir / "summary.json").unlink()
    said.clear()
    assert train.main(arguments, say=said.append)["runs"] == summary["runs"]
    assert not any(line.startswith("epoch") for line in said)


def test_a_run_that_diverges_is_frozen_and_disturbs_no_other(group, tiny, tmp_path, monkeypatch):
    create = Run.create

    bad = {4}

    def poisoned(run, **options):
        state = create(run, **options)
        if run.config.seed not in bad or run.config.seeds:  # the dry run is of the first
            return state
        return state.replace(params=jax.tree.map(lambda x: x * np.float32(1e20), state.params))

    monkeypatch.setattr(Run, "create", poisoned)
    workdir = tmp_path / "frozen"
    summary, said = start(tiny, workdir, *words("--seeds 3:5,9 --devices 2"))
    assert "warning: seed 4: loss not finite at step 1; frozen, the others go on" in said
    assert "Diverged: seed 4, at step 1; counts nowhere above" in said
    assert summary["diverged"] == [{"seed": 4, "step": 1}]
    assert [run["seed"] for run in summary["runs"]] == [3, 9]
    assert summary["test_accuracy"]["n"] == 2
    assert_same_members(workdir, group[0], seeds=(3, 9))
    assert not (workdir / "seed-4" / "summary.json").exists()
    bad |= set(SEEDS)
    with pytest.raises(UserError, match="all 3 runs diverged, the last at step 1; try --learning"):
        start(tiny, tmp_path / "none", *words("--seeds 3:5,9 --devices 2"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--seeds 4:4", "'4:4' is empty"),
        ("--seeds 0:4,2:6", "names seed 2 twice"),
        ("--seeds 3,3", "names seed 3 twice"),
        ("--seeds a:b", "'a:b' is no range of seeds"),
        ("--seeds 0:9:0", "must count up"),
        ("--seeds 0:1:2:3", "no range"),
        ("--seeds ,", "no range"),
        ("--seeds=-2:2", "'-2:2' is not between 0 and 2147483647"),
        ("--seeds 0:99999", "more than 10,000 seeds"),
        ("--seeds 0:2 --seed 1", "--seed is one run and --seeds are many"),
        ("--seeds 0:2 --feed stream", "leave --feed stream away"),
        ("--seeds 0:2 --tensorboard", "--tensorboard"),
        ("--seeds 0:2 --replica-form vamp", "did you mean 'vmap'"),
        ("--seeds 0:2 --group-size 0", "--group-size: 0 is not at least 1"),
        ("--seeds 0:2 --devices 99", "--devices 99: there are 8 here"),
        ("--group-size 3", "--group-size is about many runs"),
        ("--replica-form map", "--replica-form is about many runs"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, tiny, small, tmp_path, capsys):
    common = [*RUN, "--data-dir", str(tiny), "--workdir", str(tmp_path / "run")]
    code = run_command(functools.partial(train.main, [*common, *words(arguments)], say=id))
    error = capsys.readouterr().err.splitlines()[-1]
    assert (code, error[:7]) == (2, "error: ")
    assert expected in error
    assert not (tmp_path / "run").exists()


def test_other_seeds_are_another_run(group, tiny):
    with pytest.raises(UserError, match="seed: 3,4,9 -> 3:5"):
        start(tiny, group[0], *words("--seeds 3:5"))


def test_published_figures_are_those_of_the_unchanged_recipe():
    recipe = RECIPES["tutorial"]
    assert recipes.published_accuracies("tutorial", recipe, "cifar10") == [55.0, 54.0]
    assert recipes.published_accuracies("tutorial", recipe.replace(log_every=5), "cifar10") == [
        55.0,
        54.0,
    ]
    assert recipes.published_accuracies("tutorial", recipe.replace(epochs=3), "cifar10") == []
    assert recipes.published_accuracies("tutorial", recipe, "shapes10") == []
    assert recipes.published_accuracies("vgg11_bn", RECIPES["vgg11_bn"], "cifar10") == []


def test_in_a_thread_and_without_its_picture(group, tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cifar_jax.reporting.distribution.histogram", fail)
    arguments = (tiny, tmp_path / "group", *words("--seeds 3:5,9 --devices 2"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        summary, said = pool.submit(start, *arguments).result()
    assert_same_members(tmp_path / "group", group[0])
    assert (tmp_path / "group" / "summary.json").exists()
    assert summary["test_accuracy"] == group[1]["test_accuracy"]
    assert said.count("warning: not drawn: ") == 1


def test_the_lines_of_a_single_run_have_no_spread(group):
    summary = json.loads((group[0] / "summary.json").read_text())
    for name in ("std", "standard_error"):
        summary["test_loss"][name] = None
    summary["test_loss"]["interval_95"] = [None, None]
    assert "std -  standard error -  95 % interval - to -" in results.results_text(summary)
