"""`--seeds` in several processes over loopback: each trains its share of the runs."""

import shutil
import signal
import time

import pytest
from hosts_support import Processes, until_saved
from test_many import assert_same
from tiny_data import summary_of, tiny, words

from cifar_jax import hosts, train

__all__ = ["tiny"]

RUN = words("--recipe adam --conv lax --epochs 2 --batch-size 30 --no-plots --seeds 3:8")
SEEDS = range(3, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def alone(folder, workdir, arguments):
    """Trains the same runs in one process, in the groups of two; returns what it printed."""
    arguments = [*arguments, "--group-size", "3"]
    status, (said,) = Processes(folder, workdir, arguments, count=1, flags=False).wait()
    assert status == [0], said
    return said


def assert_same_runs(got, want):
    """Every run to the last bit, and what all of them tell together."""
    for seed in SEEDS:
        assert_same(got / f"seed-{seed}", want / f"seed-{seed}")
    mine, theirs = summary_of(got), summary_of(want)
    for name in ("test_accuracy", "test_loss", "per_class", "runs", "ensemble", "group_size"):
        assert mine[name] == theirs[name], name


def test_two_processes_train_their_shares(tiny, folder, tmp_path):
    arguments = [*RUN, "--data-dir", str(tiny)]
    workdir = tmp_path / "two"
    status, (said, other) = Processes(folder, workdir, arguments).wait()
    assert status == [0, 0], (said, other)
    assert other == [], "one process prints"
    assert any("5 runs, seeds 3:8, on 2 devices of each of 2 processes" in line for line in said)
    assert any("2 of up to 3 runs, dealt to 2 processes: " in line for line in said)
    assert any(line.startswith("Group 1 of 2: 3 runs") for line in said)
    assert not any(line.startswith("Group 2") for line in said), "the other process trained it"
    assert any(line.startswith("Ensemble of 5") for line in said)
    alone(folder, tmp_path / "one", arguments)
    assert_same_runs(workdir, tmp_path / "one")
    summary = summary_of(workdir)
    assert (summary["processes"], summary["devices"]) == (2, 4)
    # Complete, whatever processes ask for it.
    lines = []
    common = ["--workdir", str(workdir), "--devices", "2"]
    train.main([*arguments, *common], say=lines.append)
    assert "complete" in lines[0]
    assert summary_of(workdir) == summary


def test_a_workdir_that_not_all_see_is_refused(tiny, folder, tmp_path):
    places = {0: tmp_path / "a", 1: tmp_path / "b"}
    status, texts = Processes(folder, places, [*RUN, "--data-dir", str(tiny)]).wait()
    assert status == [2, 2]
    for lines in texts:
        said = f"process 1 does not see the run directory of process 0, {places[0]}, at {places[1]}"
        assert said in lines[-1]


def test_a_sweep_is_shared_too(tiny, folder, tmp_path):
    """Two programs, of which each process trains a part."""
    axes = "--learning-rate 1e-4,1e-3,1e-2,1000 --batch-size 30,60"
    arguments = words(f"--recipe tutorial --conv lax --epochs 1 {axes} --data-dir {tiny}")
    command = {"command": "experiments.sweep"}
    status, (said, other) = Processes(folder, tmp_path / "two", arguments, **command).wait()
    assert status == [0, 0], (said, other)
    for batch_size, line in zip((30, 60), other, strict=True):  # nothing else
        assert f"process 1: warning: batch_size {batch_size}, learning_rate 1000, seed 0" in line
    one = Processes(
        folder, tmp_path / "one", [*arguments, "--group-size", "2"], count=1, flags=False, **command
    )
    status, (said,) = one.wait()
    assert status == [0], said
    table, want = ((tmp_path / name / "results.csv").read_text() for name in ("two", "one"))
    assert table == want
    assert len(table.splitlines()) == 1 + 8
    assert (tmp_path / "two" / "plots" / "map.png").exists()


@pytest.fixture(scope="module")
def longer(tiny, folder, tmp_path_factory):
    """(arguments, directory) of runs that nothing disturbed."""
    arguments = [*RUN, "--epochs", "12", "--data-dir", str(tiny)]
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    alone(folder, workdir, arguments)
    return arguments, workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to"), [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0)]
)
def test_what_ends_one_ends_all_and_any_number_goes_on(sent, to, longer, folder, tmp_path):
    arguments, undisturbed = longer
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    processes = Processes(folder, workdir, arguments)
    for group in range(2):
        until_saved(workdir / "groups" / str(group), processes)
    processes.running[to].send_signal(sent)
    began = time.monotonic()
    status = processes.running[1 - to].wait(120)
    assert time.monotonic() - began < hosts.HEARTBEAT_SECONDS + 15
    said = processes.wait()[1][1 - to]
    if sent == signal.SIGTERM:
        assert status == 128 + sent
        assert any("Stopped by SIGTERM" in line and "all is saved" in line for line in said)
    else:
        assert status == 2
        assert said[-1].startswith("error: another process of this run ended")
    assert not (workdir / "summary.json").exists()
    shutil.copytree(workdir, copy)
    status, (said, _) = Processes(folder, workdir, arguments).wait()
    assert status == [0, 0], said
    said = alone(folder, copy, arguments)
    # Who is left after a kill may come to the end of its own runs before it knows.
    going_on = sum(line.startswith("Going on from step") for line in said)
    assert going_on == 2 if sent == signal.SIGTERM else going_on >= 1
    for finished in (workdir, copy):
        assert_same_runs(finished, undisturbed)
