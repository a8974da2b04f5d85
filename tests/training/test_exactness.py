"""A run that is killed, stopped, damaged or out of space, and goes on, ends as if nothing had
happened: equal checkpoints to the last bit, equal rows, equal results."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from tiny_data import (
    RICH_SMALL,
    Launcher,
    assert_same_run,
    copy_run,
    rows_of,
    small,
    snapshot,
    tiny,
    words,
)

from cifar_jax.checkpoints import manifests

__all__ = ["small", "tiny"]

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.extended]

# A save after every chunk, so that kills fall into and between saves within an epoch too.
OFTEN = words("--save-minutes 1e-6 --no-plots")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def reference(launcher, tiny, tmp_path_factory):
    """(an uninterrupted run, the seconds it takes with compiled programs in the cache)."""
    workdir = tmp_path_factory.mktemp("reference")
    for name in ("first", "run"):
        start = time.monotonic()
        code, said = launcher.run(command(tiny, workdir / name))
        seconds = time.monotonic() - start
        assert code == 0, said
    assert_same_run(workdir / "first", workdir / "run")
    return workdir / "run", seconds


def command(tiny, workdir, *more):
    return [*RICH_SMALL, *OFTEN, "--data-dir", str(tiny), "--workdir", str(workdir), *more]


# What a kill can wait for: each looks at a run directory and says whether the moment is there.


def saving(workdir):
    """A checkpoint is being written or deleted."""
    found = manifests.folders(workdir / "checkpoints")
    return any(not (folder / manifests.MANIFEST).exists() for _, _, folder in found)


def committed(workdir):
    """A checkpoint has just been completed; older ones are about to be deleted."""
    found = manifests.folders(workdir / "checkpoints")
    return any((folder / manifests.MANIFEST).exists() for _, _, folder in found[:1])


def row(kind):
    """A row of this kind has just been written; the checkpoint that goes with it has not."""

    def written(workdir):
        try:
            return (workdir / "metrics.jsonl").read_bytes().count(b'{"kind": "%b"' % kind)
        except OSError:
            return 0

    return written


def configured(workdir):
    """The run directory has just been claimed."""
    return (workdir / "config.json").exists()


class Moment:
    """Holds when `look(workdir)` has risen `times` times since the start, or `seconds` are over."""

    def __init__(self, workdir, look=None, times=1, seconds=600.0):
        self.workdir, self.look, self.left = workdir, look, times
        self.last = look(workdir) if look else 0
        self.until = time.monotonic() + seconds

    def __call__(self):
        if time.monotonic() > self.until:
            return True
        if self.look:
            now = self.look(self.workdir)
            self.left -= now > self.last
            self.last = now
        return self.left <= 0


def kill_often(launcher, tiny, folder, reference, kills, seed):
    """Kills runs at random until `kills` were hit, completing and comparing each; returns how
    many kills found a run directory in which state."""
    path, seconds = reference
    rng = random.Random(seed)
    looks = [saving, saving, committed, row(b"epoch"), row(b"window"), row(b"test"), configured]
    hits, runs = [], 0
    while len(hits) < kills:
        workdir, runs = folder / f"run{runs}", runs + 1
        while True:
            # Half of the kills at a random time of the whole run, the others at an event.
            timed = rng.random() < 0.5
            look, times = (None, 1) if timed else (rng.choice(looks), rng.randint(1, 4))
            limit = rng.uniform(0, seconds) if timed else 600.0
            final = len(hits) >= kills
            moment = Moment(workdir, look, times, limit)
            signal_number = None if final else signal.SIGKILL
            code, said = launcher.run(command(tiny, workdir), signal_number, moment)
            if code == 0:
                break
            assert code == -signal.SIGKILL, said
            hits.append(where(workdir))
        assert_same_run(workdir, path)
    return hits


def where(workdir):
    """What a kill left, in a word."""
    if not (workdir / "config.json").exists():
        return "nothing"
    if rows_of_any(workdir, b"test"):
        return "testing"
    folders = manifests.folders(workdir / "checkpoints")
    if not folders:
        return "starting"
    return "saving" if saving(workdir) else "training"


def rows_of_any(workdir, kind):
    return row(kind)(workdir) > 0


def test_killed_at_any_moment_a_run_ends_the_same(launcher, tiny, reference, tmp_path):
    hits = kill_often(launcher, tiny, tmp_path, reference, kills=22, seed=0)
    assert len(hits) >= 20
    # The kills were spread over the run, not all before it began.
    assert {"saving", "training"} <= set(hits), hits


@pytest.mark.slow
def test_killed_on_two_devices_a_run_ends_the_same(launcher, tiny, reference, tmp_path):
    """Which differs from one device in the order of sums, and says so."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, said = launcher.run(command(tiny, whole, "--devices", "2"))
    assert code == 0, said
    assert "2 devices share each batch" in said
    moment = Moment(cut, row(b"window"), 3)
    code, said = launcher.run(command(tiny, cut, "--devices", "2"), signal.SIGKILL, moment)
    assert code == -signal.SIGKILL, said
    code, said = launcher.run(command(tiny, cut, "--devices", "2"))
    assert code == 0, said
    assert_same_run(cut, whole)
    one, two = (
        json.loads((folder / "summary.json").read_text()) for folder in (reference[0], whole)
    )
    assert (one["devices_sharing_a_batch"], two["devices_sharing_a_batch"]) == (1, 2)
    # Other batches or draws would be far off from the first steps on; rounding grows with them.
    for kind, name, bound in (
        ("window", "loss", 1e-5),
        ("epoch", "train_loss", 1e-3),
        ("epoch", "validation_loss", 1e-3),
    ):
        got, want = (rows_of(folder, kind)[0][name] for folder in (whole, reference[0]))
        assert got == pytest.approx(want, rel=bound), name
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_many_times(launcher, tiny, reference, tmp_path, seed):
    kill_often(launcher, tiny, tmp_path, reference, kills=60, seed=seed)


def test_killed_while_testing_and_drawing(launcher, tiny, reference, tmp_path):
    path, _ = reference
    workdir = copy_run(path, tmp_path / "run")
    (workdir / "summary.json").unlink()
    arguments = [word for word in command(tiny, workdir) if word != "--no-plots"]
    for pictures in (0, 1, 4):

        def drawn(folder, pictures=pictures):
            return len(list((folder / "plots").glob("*"))) > pictures

        shutil.rmtree(workdir / "plots", ignore_errors=True)
        code, said = launcher.run(arguments, signal.SIGKILL, Moment(workdir, drawn))
        assert code == -signal.SIGKILL, said
        assert not (workdir / "summary.json").exists()
    code, said = launcher.run(arguments)
    assert code == 0, said
    assert len(list((workdir / "plots").glob("*.png"))) == 6
    assert_same_run(workdir, path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *itertools.product([b"window", b"epoch"], ["SIGINT", "SIGTERM"]),
        (b"window", "SIGUSR1"),
    ],
)
def test_a_stopped_run_says_how_to_go_on(launcher, tiny, reference, tmp_path, name, kind):
    path, _ = reference
    workdir = tmp_path / "run with space"
    number = getattr(signal, name)
    times = 2 if kind == b"window" else 4  # the fourth epoch is the last
    moment = Moment(workdir, row(kind), times)
    arguments = [*command(tiny, workdir), "--overwrite"]
    code, said = launcher.run(arguments, number, moment)
    assert code == 128 + number, said
    *_, stopped, on = said.splitlines()
    assert stopped.startswith(f"Stopped by {name} after step ")
    step = int(stopped.split("step ")[1].split(";")[0])
    assert manifests.latest_step(workdir / "checkpoints") == step
    assert "--overwrite" not in on
    again = on.removeprefix("Go on with: python -m cifar_jax.train ")
    assert again != on
    code, said = launcher.run(split_in_a_shell(again))
    assert code == 0, said
    assert f"Going on from step {step} " in said
    assert_same_run(workdir, path)


def split_in_a_shell(text):
    """The arguments as a shell would pass them."""
    done = subprocess.run(
        ["sh", "-c", f'for word in {text}; do printf "%s\\0" "$word"; done'],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def partial(launcher, tiny, workdir):
    """A run stopped in its third epoch; returns its checkpoint folders, newest first."""
    moment = Moment(workdir, row(b"epoch"), 2)
    code, said = launcher.run(command(tiny, workdir), signal.SIGTERM, moment)
    assert code == 143, said
    return [folder for _, _, folder in manifests.folders(workdir / "checkpoints")]


def damage(folder, how):
    files = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    if how == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    else:
        for path in files[::2]:
            path.unlink()


@pytest.fixture(scope="module")
def stopped(launcher, tiny, reference, tmp_path_factory):
    """A run directory stopped early in its third epoch."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    assert len(partial(launcher, tiny, workdir)) >= 2
    return workdir


@pytest.mark.parametrize("how", ["truncated", "flipped", "half deleted"])
def test_a_damaged_newest_checkpoint_is_named_and_made_up_for(
    launcher, tiny, reference, stopped, tmp_path, how
):
    path, _ = reference
    workdir = copy_run(stopped, tmp_path / "run")
    newest, *_ = (folder for _, _, folder in manifests.folders(workdir / "checkpoints"))
    damage(newest, how)
    code, said = launcher.run(command(tiny, workdir))
    assert code == 0, said
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: checkpoint")]
    assert newest.name in warning
    assert_same_run(workdir, path)


def test_no_good_checkpoint_is_an_error_that_loses_nothing(launcher, tiny, stopped, tmp_path):
    workdir = copy_run(stopped, tmp_path / "run")
    for k, (_, _, folder) in enumerate(manifests.folders(workdir / "checkpoints")):
        if k == 0:
            (folder / manifests.MANIFEST).write_text("{}")
        else:
            damage(folder, "flipped")
    before = snapshot(workdir)
    code, said = launcher.run(command(tiny, workdir))
    assert code == 2
    *_, error = said.splitlines()
    assert error.startswith("error: no usable checkpoint")
    for _, _, folder in manifests.folders(workdir / "checkpoints"):
        assert f"{folder.name}:" in error
    assert "--overwrite" in error
    assert snapshot(workdir) == before


def test_manifests_alone_damaged_do_not_start_the_run_anew(launcher, tiny, stopped, tmp_path):
    workdir = copy_run(stopped, tmp_path / "run")
    for _, _, folder in manifests.folders(workdir / "checkpoints"):
        os.truncate(folder / manifests.MANIFEST, 10)
    before = snapshot(workdir)
    code, said = launcher.run(command(tiny, workdir))
    assert code == 2, said
    assert snapshot(workdir) == before


def test_what_a_kill_leaves_beside_the_run_does_not_stop_it(launcher, tiny, reference, tmp_path):
    path, _ = reference
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".config.json.4242").write_text('{"format"')
    (workdir / ".write-4242").touch()
    (workdir / ".lock").touch()
    code, said = launcher.run(command(tiny, workdir))
    assert code == 0, said
    assert not list(workdir.glob(".*4242"))
    assert_same_run(workdir, path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    except OSError:
        made = 1
    if made:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(
    launcher, tiny, reference, stopped, small_disk
):
    path, _ = reference
    workdir = copy_run(stopped, small_disk / "run")
    kept = manifests.latest_step(workdir / "checkpoints")
    free = shutil.disk_usage(small_disk).free
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (free - 50_000))
    code, said = launcher.run(command(tiny, workdir))
    assert code == 2, said
    *_, error = said.splitlines()
    assert error.startswith("error: ")
    assert "No space left" in error
    assert "Traceback" not in said
    assert manifests.latest_step(workdir / "checkpoints") >= kept
    ballast.unlink()
    code, said = launcher.run(command(tiny, workdir))
    assert code == 0, said
    assert_same_run(workdir, path)
