"""The compare command: variants with the same seeds, and finished runs side by side."""

import csv
import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from tiny_data import complete, prepare_tiny, small, tiny, words

from cifar_jax import compare, train
from cifar_jax.parallel import programs
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import variants
from cifar_jax.runtime.errors import UserError, run_command

__all__ = ["complete", "small", "tiny"]

FIXED = words(
    "--recipe adam --model small --conv gemm --epochs 2 --batch-size 70 --learning-rate 0.003"
)
VARIANTS = ["--variants", "", "label_smoothing=0.1", "learning_rate=0.0003"]


def start(tiny, workdir, *extra, say=id, what=VARIANTS):
    common = ["--data-dir", str(tiny), "--workdir", str(workdir)]
    return compare.main([*what, *FIXED, *common, *extra], say=say)


@pytest.fixture(scope="module")
def done(tiny, small, tmp_path_factory):
    """(directory, summary, what was said) of three variants with five seeds."""
    workdir, said = tmp_path_factory.mktemp("compare") / "run", []
    summary = start(tiny, workdir, "--seeds", "0:5", say=said.append)
    return workdir, summary, "\n".join(said)


@pytest.fixture(scope="module")
def runs(tiny, small, tmp_path_factory):
    """Directories of runs of two settings with five seeds each, and of two of these seeds."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*FIXED, "--data-dir", str(tiny), "--no-plots"]
    for name, extra in (("a", []), ("b", words("--learning-rate 0.0003"))):
        workdir = ["--workdir", str(folder / name)]
        train.main([*common, *extra, "--seeds", "0:5", *workdir], say=id)
    train.main([*common, "--seed", "3", "--workdir", str(folder / "alone")], say=id)
    return folder


def test_every_run_is_the_run_of_its_settings_and_seed(done, runs):
    rows = list(csv.DictReader((done[0] / "results.csv").read_text().splitlines()))
    assert len(rows) == 15
    for name, variant in (("a", "adam"), ("b", "learning_rate=0.0003")):
        for seed in range(5):
            alone = json.loads((runs / name / f"seed-{seed}" / "summary.json").read_text())
            (mine,) = (r for r in rows if (r["variant"], r["seed"]) == (variant, str(seed)))
            assert float(mine["test_accuracy"]) == alone["test_accuracy"]
            assert float(mine["test_loss"]) == pytest.approx(alone["test_loss"], rel=1e-5)
            for found in alone["per_class"]:
                assert float(mine[f"accuracy of {found['class']}"]) == found["accuracy"]


def test_all_variants_share_a_program_and_are_told_apart_in_words(done):
    _, summary, said = done
    assert "15 runs: 3 points, 5 seeds each, in 1 program" in said
    smoothed, slow = summary["comparisons"]
    assert "cannot be told apart with 5 seeds" in smoothed["in_words"]
    assert "'learning_rate=0.0003' is worse than 'adam' by" in slow["in_words"]
    assert slow["in_words"] in said
    accuracies = np.array(
        [
            [100 * row["test_accuracy"] for row in summary["runs"] if row["point"] == place]
            for place in range(3)
        ]
    )
    assert slow["test_accuracy"]["mean"] == pytest.approx((accuracies[2] - accuracies[0]).mean())
    assert sum(row["mean"] for row in slow["per_class"]) / 10 == pytest.approx(
        slow["test_accuracy"]["mean"]
    )
    assert [variant["parameters"] for variant in summary["variants"]] == [8154] * 3
    assert "p below 0.025" in said


def test_it_leaves_a_picture_and_nothing_to_do_again(done, tiny):
    workdir, summary, _ = done
    for place in (1, 2):
        with Image.open(workdir / "plots" / f"difference-{place}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    said = []
    again = start(tiny, workdir, "--seeds", "0:5", "--json", say=said.append)
    assert json.loads(said[0]) == again
    assert again["comparisons"] == summary["comparisons"]
    assert again["seconds"]["training"] == summary["seconds"]["training"]
    with pytest.raises(UserError, match=r"holds another run; .*variants"):
        start(tiny, workdir, "--seeds", "0:5", what=[*VARIANTS[:3]])


@pytest.mark.extended
def test_stopped_in_the_middle_it_goes_on_to_the_same_figures(done, tiny, tmp_path, monkeypatch):
    chunk, taken, said = programs.Chunks.next, [], []

    def asked_to_stop(chunks, left):
        taken.append(left)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return min(chunk(chunks, left), 3)

    with monkeypatch.context() as patched:
        patched.setattr(programs.Chunks, "next", asked_to_stop)
        with pytest.raises(SystemExit) as stopped:
            start(tiny, tmp_path / "run", "--seeds", "0:5", say=said.append)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert said[-1].startswith("Go on with: python -m cifar_jax.compare ")
    assert not (tmp_path / "run" / "results.csv").exists()
    again = start(tiny, tmp_path / "run", "--seeds", "0:5")
    assert again["comparisons"] == done[1]["comparisons"]
    tables = [(folder / "results.csv").read_text() for folder in (done[0], tmp_path / "run")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_it_looks_until_the_interval_is_narrow(done, tiny, tmp_path):
    said, what = [], ["--variants", "", "learning_rate=0.0003"]
    words = ["--seeds", "0:12", "--look", "5", "--until", "50"]
    summary = start(tiny, tmp_path / "run", *words, say=said.append, what=what)
    (found,) = summary["comparisons"]
    assert found["sequential"]["looks"] == [5]
    assert summary["seeds_trained"] == 5
    fixed = done[1]["comparisons"][1]
    assert found["test_accuracy"]["mean"] == pytest.approx(fixed["test_accuracy"]["mean"])
    assert found["sequential"]["reach"] > fixed["test_accuracy"]["reach"]
    assert "arXiv:2310.03722" in "\n".join(said)


def test_recipes_are_variants_too():
    given = {"epochs": 3}
    first, second = variants.parse(
        ["", "deep"], "tutorial", RECIPES["tutorial"].replace(**given), given
    )
    assert (first.name, second.name) == ("tutorial", "deep")
    assert second.recipe == RECIPES["deep"].replace(epochs=3)
    axes, points = variants.points_of([first, second])
    assert {axis.name for axis in axes} >= {"model", "batch_size", "momentum"}
    assert RECIPES["tutorial"].replace(**given).replace(**points[1]) == second.recipe


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("label_smoothing=0.1", {"label_smoothing": 0.1}),
        (
            "augment=flip,translate,momentum=0.9",
            {"augment": ("flip", "translate"), "momentum": 0.9},
        ),
        ("--learning-rate=0.1  epochs=3", {"learning_rate": 0.1, "epochs": 3}),
        ("rate_scale=fc1=0.1,fc2=0.2", {"rate_scale": ("fc1=0.1", "fc2=0.2")}),
        ("nesterov=true", {"nesterov": True}),
        ("", {}),
    ],
)
def test_a_variant_is_pairs_of_settings(text, found):
    assert variants.changes_of(text) == found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variants", "", "", "--seeds", "0:4"], "do not differ"),
        (["--variants", "", "momentum=0.5", "--seeds", "0:4", "--recipe", "adam"], "do not differ"),
        (["--variants", "", "log_every=7", "--seeds", "0:4"], "do not differ"),
        (["--variants", "", "momentun=0.5", "--seeds", "0:4"], "did you mean 'momentum'"),
        (["--variants", "", "momentum=high", "--seeds", "0:4"], "'high' is not a number"),
        (["--variants", "", "adm", "--seeds", "0:4"], "did you mean 'adam'"),
        (["--variants", "", "model=tutorial_cn", "--seeds", "0:4"], "did you mean 'tutorial_cnn'"),
        (["--variants", "", "dataset=cifar100", "--seeds", "0:4"], "same dataset"),
        (["--variants", "", "epochs=3", "--seeds", "4"], "from two seeds on"),
        (["--variants", "", "--seeds", "0:4"], "needs two variants"),
        (["adam", "deep"], "give --seeds too"),
        (["--variants", "", "epochs=3"], "give them"),
        (["adam", "deep", "--seeds", "0:4", "--until", "0"], "above 0 points"),
        (["adam", "deep", "--seeds", "0:4", "--look", "4"], "give both"),
        (["nowhere", "neither"], "is not a run directory"),
        ([], "two or more finished run directories"),
        (["adam", "deep", "--json", "--csv"], "give one"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, capsys):
    assert run_command(lambda: compare.main(arguments)) == 2
    assert expected in capsys.readouterr().err


def test_finished_runs_are_one_table(runs, tiny):
    said = []
    folders = [str(runs / name) for name in ("a", "b")]
    found = compare.main(folders, say=said.append)
    (answer,) = found["comparisons"]
    assert "'b' is worse than 'a' by" in answer["in_words"]
    assert [row["learning_rate"] for row in found["runs"]] == [0.003, 0.0003]
    assert said[0].splitlines()[0].split()[:2] == ["run", "learning_rate"]
    said = []
    compare.main([*folders, str(runs / "alone"), "--csv"], say=said.append)
    rows = list(csv.DictReader(io.StringIO(said[0])))
    assert [row["seed"] for row in rows] == ["0:5", "0:5", "3"]
    assert [row["n"] for row in rows] == ["5", "5", "1"]


def test_two_runs_are_told_apart_by_their_images(runs, tiny):
    said, data = [], ["--data-dir", str(tiny)]
    same = [str(runs / "a" / "seed-3"), str(runs / "alone")]
    found = compare.main([*same, *data], say=said.append)
    assert found["mcnemar"]["p"] == 1
    assert found["mcnemar"]["only_first"] == found["mcnemar"]["only_second"] == 0
    assert "cannot be told apart" in said[0]
    other = compare.main([str(runs / "b" / "seed-3"), *same[1:], *data], say=id)
    good = json.loads((runs / "alone" / "summary.json").read_text())["test_correct"]
    assert other["mcnemar"]["both"] + other["mcnemar"]["only_second"] == good
    assert other["mcnemar"]["p"] < 0.05


def test_runs_that_cannot_be_compared_are_refused(runs, tiny, tmp_path, done):
    other, alone = tmp_path / "other", str(runs / "alone")
    prepare_tiny(tmp_path / "data", seed=1)
    arguments = [*FIXED, "--seed", "1", "--no-plots", "--data-dir", str(tmp_path / "data")]
    train.main([*arguments, "--workdir", str(other)], say=id)
    with pytest.raises(UserError, match="not tested on the same images"):
        compare.main([alone, str(other)])
    (other / "summary.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        compare.main([alone, str(other)])
    with pytest.raises(UserError, match="named twice"):
        compare.main([alone, alone])
    with pytest.raises(UserError, match="holds many settings"):
        compare.main([alone, str(done[0])])
    copied = tmp_path / "copied"
    shutil.copytree(runs / "alone", copied)
    (copied / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        compare.main([alone, str(copied)])
