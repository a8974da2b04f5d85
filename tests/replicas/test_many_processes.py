"""`--seeds` in several processes over loopback: each trains its share of the runs."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal

import pytest
from hosts_support import Processes, until_saved
from test_many import assert_same
from tiny_data import summary_of, tiny, words

from cifar_jax import train
from cifar_jax.parallel.distributed import ALONE, Process
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas import shared_workdir
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import UserError
from cifar_jax.training.workdir import Config

__all__ = ["tiny"]

pytestmark = pytest.mark.extended

RUN = words("--recipe adam --conv gemm --epochs 2 --batch-size 30 --no-plots --seeds 3:8")
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


def config(**changes):
    data = {
        **{"name": "shapes10", "version": "1", "fingerprint": "f", "class_names": ["a"]},
        **{"image_shape": [32, 32, 3], "sizes": {"train": 100}},
    }
    recipe = RECIPES["adam"].replace(**changes)
    return Config("adam", recipe, 0, data, seeds=(0, 1))


def shared(workdir, index, settings, overwrite=False, **changes):
    return shared_workdir.open_shared(
        workdir, config(**changes), Process(index, 3), settings, overwrite=overwrite, seconds=0.5
    )


def test_who_may_train_in_a_shared_workdir(tmp_path):
    """What the others see of process 0, and what of one that has ended."""
    workdir, same = tmp_path / "run", {"a": {"b": (1, 2)}}
    unseen = rf"process 1 does not see process 0 in the run directory {workdir} after 0.5 s"
    with pytest.raises(UserError, match=unseen), shared(workdir, 1, same):
        pass
    with shared(workdir, 0, same) as resume:
        assert not resume
        for index in (1, 2, 1):
            with shared(workdir, index, same, overwrite=True) as complete:
                assert not complete
        different = (
            r"process 2 is set up otherwise than process 0: a.b: \[1, 2\] in process 0, 3 in"
        )
        with pytest.raises(UserError, match=different), shared(workdir, 2, {"a": {"b": 3}}):
            pass
        with shared(tmp_path / "other", 0, same):  # its own directory: it sees nobody there
            pass
    with pytest.raises(UserError, match=unseen), shared(workdir, 1, same):
        pass
    (workdir / "summary.json").touch()
    with shared(workdir, 1, same) as complete:
        assert complete, "process 0 may be through already"
    with (
        pytest.raises(UserError, match="10 epochs, which cannot become one of --epochs 3"),
        shared(workdir, 1, same, epochs=3),
    ):
        pass
    with pytest.raises(UserError, match=unseen), shared(workdir, 1, same, overwrite=True):
        pass
    with shared(workdir, 0, same) as resume:
        assert resume


def test_a_signal_of_one_reaches_all_until_process_0_starts_again(tmp_path):
    def stops(*mine):
        return [
            shared_workdir.relayed(lambda got=got: got, tmp_path, Process(i, 3))
            for i, got in enumerate(mine)
        ]

    before = stops(None, None, None)
    assert before[0]() is None, "there is no directory yet"
    with shared(tmp_path, 0, {}):
        assert [asked() for asked in before] == [None] * 3
        assert [asked() for asked in stops(None, 15, None)] == [None, 15, 15]
        assert [asked() for asked in before] == [15] * 3
    with shared(tmp_path, 0, {}):
        assert [asked() for asked in stops(None, None, None)] == [None] * 3
        assert [asked() for asked in before] == [15] * 3


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    two = Process(0, 2)
    for opened in (
        shared_workdir.group_lock(tmp_path / ".lock", two),
        shared_workdir.open_shared(tmp_path / "run", config(), two, {}, overwrite=False),
    ):
        with pytest.raises(UserError, match=r"cannot lock .*: no locks .*; name a"):
            opened.__enter__()
    # One process needs none.
    with shared_workdir.open_shared(tmp_path / "one", config(), ALONE, {}, overwrite=False):
        pass


def test_groups_go_to_whoever_is_free(tmp_path, monkeypatch):
    locks = [tmp_path / str(number) / ".lock" for number in range(5)]
    said = []

    def turns(index, count, stop=lambda: None):
        process = Process(index, count)
        return contextlib.closing(shared_workdir.turns(locks, process, stop, said.append))

    with turns(1, 2) as alone:
        assert list(alone) == [1, 3, 0, 2, 4], "its share first"
    with turns(0, 2) as one, turns(1, 2) as two:
        assert [next(one), next(two)] == [0, 1]
        assert [next(one), next(one)] == [2, 4]
        assert next(one) == 3, "1 is taken"
        assert next(two) == 0
    assert said == []
    with files.lock(tmp_path / "0" / ".lock") as mine, turns(0, 1, stop=lambda: 15) as stopped:
        assert mine
        assert list(stopped) == [1, 2, 3, 4]
    hold = contextlib.ExitStack()
    assert hold.enter_context(files.lock(tmp_path / "3" / ".lock"))
    monkeypatch.setattr(shared_workdir.time, "sleep", lambda seconds: seconds and hold.close())
    with turns(0, 1) as waiting:
        assert list(waiting) == [0, 1, 2, 4, 3], "that of a process that died"
    assert said == ["Waiting for other processes, which train group 4 of 5"]


@pytest.mark.slow
def test_a_sweep_is_shared_too(tiny, folder, tmp_path):
    """Two programs, of which each process trains a part."""
    axes = "--learning-rate 1e-4,1e-3,1e-2,1000 --batch-size 30,60"
    arguments = words(f"--recipe tutorial --conv gemm --epochs 1 {axes} --data-dir {tiny}")
    command = {"command": "cifar_jax.sweep"}
    status, (said, other) = Processes(folder, tmp_path / "two", arguments, **command).wait()
    assert status == [0, 0], (said, other)
    assert all("warning: batch_size" in line for line in other), "nothing else"
    for batch_size in (30, 60):  # by whoever trained it
        diverged = f"warning: batch_size {batch_size}, learning_rate 1000, seed 0"
        assert sum(diverged in line for line in said + other) == 1
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
def test_one_ends_and_any_number_goes_on(sent, to, longer, folder, tmp_path):
    """SIGTERM to one stops all; of one that was killed the other trains the rest."""
    arguments, undisturbed = longer
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    processes = Processes(folder, workdir, arguments)
    for group in range(2):
        until_saved(workdir / "groups" / str(group), processes)
    processes.running[to].send_signal(sent)
    _, texts = processes.wait()
    status, said = processes.running[1 - to].returncode, texts[1 - to]
    if sent == signal.SIGKILL:
        assert status == 0, said
        assert all((workdir / "groups" / str(i) / "complete.json").exists() for i in range(2))
        if to == 1:
            assert any(line.startswith("Going on from step") for line in said)
        else:
            assert not (workdir / "summary.json").exists(), "process 0 writes it"
            train.main([*arguments, "--workdir", str(workdir), "--devices", "2"], say=id)
        assert_same_runs(workdir, undisturbed)
        return
    assert status == 128 + sent
    assert any("Stopped by SIGTERM" in line and "all is saved" in line for line in said)
    assert not (workdir / "summary.json").exists()
    shutil.copytree(workdir, copy)
    status, (said, _) = Processes(folder, workdir, arguments).wait()
    assert status == [0, 0], said
    said = alone(folder, copy, arguments)
    assert sum(line.startswith("Going on from step") for line in said) == 2
    for finished in (workdir, copy):
        assert_same_runs(finished, undisturbed)
