"""A run directory that an earlier layout of the package wrote is still evaluated and gone on with.

`fixtures/run_before_the_move.tar.xz` was written by commit 6f6d2b2, before the modules moved:
`train --recipe tutorial --momentum 0 --epochs 2 --batch-size 16 --learning-rate 0.05 --devices 1
--no-plots` on the tiny set, without its first checkpoint. With `--epochs 3` that commit printed
what `THIRD` holds.
"""

import pathlib
import tarfile

import pytest
from tiny_data import rows_of, tiny, words

from cifar_jax import evaluate, train

__all__ = ["tiny"]

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "run_before_the_move.tar.xz"
OPTIONS = "--recipe tutorial --momentum 0 --batch-size 16 --learning-rate 0.05 --devices 1"
THIRD = {"train_loss": 2.159280349413554, "test_loss": 1.7524591064453126, "test_correct": 80}


@pytest.fixture
def former(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_is_evaluated_to_what_it_recorded(former, tiny):
    (recorded,) = rows_of(former, "test")
    found = evaluate.main([str(former), "--data-dir", str(tiny)], say=id)
    assert found["confusion"] == recorded["confusion"]
    assert found["test_loss"] == pytest.approx(recorded["test_loss"], rel=1e-5)


@pytest.mark.extended  # of optimised programs: what that commit printed is of such
def test_it_is_gone_on_with_as_by_the_commit_that_made_it(former, tiny):
    common = ["--data-dir", str(tiny), "--workdir", str(former), "--no-plots", "--no-report"]
    summary = train.main([*words(OPTIONS), "--epochs", "3", *common], say=id)
    assert summary["test_correct"] == THIRD["test_correct"]
    assert summary["test_loss"] == pytest.approx(THIRD["test_loss"], rel=1e-4)
    third = rows_of(former, "epoch")[2]
    assert third["train_loss"] == pytest.approx(THIRD["train_loss"], rel=1e-5)
