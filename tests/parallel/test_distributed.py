"""Several processes as one run: over loopback, for real, and what can go wrong before they meet."""

import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import signal
import threading
import time
import urllib.request

import jax
import numpy as np
import pytest
from hosts_support import Processes, free_port, until_saved
from jax.experimental import multihost_utils
from tiny_data import rows_of, states_of, tiny, words

from cifar_jax import input_pipeline, train
from cifar_jax.parallel import agreement, distributed, hardware, placement
from cifar_jax.runtime.errors import UserError

__all__ = ["tiny"]

pytestmark = pytest.mark.extended

RUN = words("--recipe adam --conv gemm --epochs 2 --batch-size 30 --select-best --no-plots")


def assert_equal_runs(workdir, reference):
    """Equal but for the order of sums: rows, states and the test."""
    got, want = rows_of(workdir), rows_of(reference)
    assert [row["kind"] for row in got] == [row["kind"] for row in want]
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"train_loss", "validation_loss", "loss", "test_loss"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert got[-1]["test_count"] == 200
    assert np.sum(got[-1]["confusion"], axis=1).tolist() == [20] * 10
    assert got[-1]["test_correct"] == want[-1]["test_correct"]
    got, want = states_of(workdir), states_of(reference)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run in one process, on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    arguments = [*RUN, "--data-dir", str(tiny), "--workdir", str(workdir), "--devices", "1"]
    train.main(arguments, say=id)
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def test_two_processes_are_one_run(alone, tiny, folder, tmp_path):
    workdir = tmp_path / "run"
    processes = Processes(folder, workdir, [*RUN, "--data-dir", str(tiny)])
    status, (said, other) = processes.wait()
    assert status == [0, 0], (said, other)
    assert other == [], "one process prints"
    assert any("4 devices share each batch" in line for line in said)
    assert_equal_runs(workdir, alone)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["device"]["processes"] == 2
    assert summary["devices_sharing_a_batch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(killed, tiny, folder, tmp_path):
    """Goes on in two processes and in one, and both end as the undisturbed run."""
    longer = [*RUN, "--epochs", "40", "--data-dir", str(tiny)]
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    train.main([*longer, "--workdir", str(reference), "--devices", "1"], say=id)
    processes = Processes(folder, workdir, longer)
    until_saved(workdir, processes)
    processes.running[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    left = processes.running[1 - killed]
    status = left.wait(120)
    assert time.monotonic() - began < distributed.HEARTBEAT_SECONDS + 15
    said = processes.wait()[1]
    assert any("the same commands to go on from the last checkpoint" in line for line in said[0])
    if status == -signal.SIGABRT:  # JAX was first to know; always where the coordinator is gone
        assert any("another task died" in line for line in said[1 - killed])
    else:
        assert status == 2
        assert said[1 - killed][-1].startswith("error: another process of this run ended")
    assert not (workdir / "summary.json").exists()

    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    status, (said, _) = Processes(folder, workdir, longer).wait()
    assert status == [0, 0], said
    assert any(line.startswith("Going on from step") for line in said)
    lines = []
    train.main([*longer, "--workdir", str(copy), "--devices", "2"], say=lines.append)
    assert any(line.startswith("Going on from step") for line in lines)
    for finished in (workdir, copy):
        rows, want = rows_of(finished, "epoch"), rows_of(reference, "epoch")
        assert len(rows) == len(want) == 40
        # Rounding grows over 640 steps; another order of batches would be far from this.
        for a, b in zip(rows[:10], want[:10], strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert rows_of(finished, "test")[0]["test_count"] == 200


@pytest.mark.slow
def test_sigterm_to_any_process_stops_all_and_all_is_saved(tiny, folder, tmp_path):
    workdir = tmp_path / "run"
    processes = Processes(folder, workdir, [*RUN, "--epochs", "500", "--data-dir", str(tiny)])
    until_saved(workdir, processes)
    processes.running[1].send_signal(signal.SIGTERM)
    status, (said, _) = processes.wait()
    assert status == [128 + signal.SIGTERM] * 2
    assert any("Stopped by SIGTERM" in line and "all is saved" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_message(failing, tiny, folder, tmp_path):
    """The leader cannot have the run directory; another finds no data."""
    workdir = tmp_path / "run"
    arguments = {i: [*RUN, "--data-dir", str(tiny)] for i in range(2)}
    if failing == 0:
        workdir.mkdir()
        (workdir / "thesis.tex").touch()
        want = f"--workdir {workdir} holds other files"
    else:
        arguments[1] = [*RUN, "--data-dir", str(tmp_path / "nowhere"), "--no-download"]
        want = "cifar10 is not prepared and must not be downloaded"
    began = time.monotonic()
    status, texts = Processes(folder, workdir, arguments).wait()
    assert status == [2, 2], texts
    assert time.monotonic() - began < 60
    assert texts[failing][-1].startswith("error: ")
    assert want in texts[failing][-1]
    told = texts[1 - failing][-1]
    assert told.startswith(f"error: process {failing} of 2 ended: ")
    assert want in told


@pytest.mark.slow
def test_each_process_streams_its_own_images(tiny, folder, tmp_path, alone):
    workdir = tmp_path / "run"
    arguments = [*RUN, "--feed", "stream", "--data-dir", str(tiny)]
    status, (said, _) = Processes(folder, workdir, arguments).wait()
    assert status == [0, 0], said
    assert_equal_runs(workdir, alone)


@pytest.mark.slow
def test_slurm_needs_no_flags(tiny, folder, tmp_path):
    port = free_port()
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }
    each = {i: step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)}
    arguments = [*RUN, "--epochs", "1", "--data-dir", str(tiny)]
    processes = Processes(folder, tmp_path / "run", arguments, environments=each, flags=False)
    status, (said, other) = processes.wait()
    assert status == [0, 0], said
    assert other == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"]["processes"] == 2


@pytest.mark.slow
def test_processes_with_different_recipes_are_refused(tiny, folder, tmp_path):
    common = [*RUN, "--data-dir", str(tiny)]
    arguments = {0: common, 1: [*common, "--learning-rate", "0.5"]}
    status, texts = Processes(folder, tmp_path / "run", arguments).wait()
    assert status == [2, 2]
    for lines in texts:
        assert "recipe.learning_rate: 0.001 in process 0, 0.5 in it" in lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_process_alone_gives_up_waiting_for_the_other(tiny, folder, tmp_path):
    began = time.monotonic()
    processes = Processes(folder, tmp_path / "run", [*RUN, "--data-dir", str(tiny)])
    port = processes.port
    processes.running[1].kill()
    assert processes.running[0].wait(120) == 2
    assert time.monotonic() - began < 60 + 10, "60 s and the start of Python"
    waiting, said = processes.wait()[1][0]
    where = f"(coordinator 127.0.0.1:{port})"
    assert waiting.startswith(
        f"Waiting up to {distributed.JOIN_SECONDS} s for all processes {where}; "
    )
    assert said.startswith(f"error: not all processes came together within 50 s {where}")


# Without other processes.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--coordinator a:1", "given without --num-processes and --process-id"),
        ("--num-processes 2 --process-id 0", "given without --coordinator"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "is not one of 0 to 1"),
        ("--coordinator a:1 --num-processes 2 --process-id -1", "is not one of 0 to 1"),
        ("--coordinator a --num-processes 2 --process-id 0", "must be HOST:PORT, got 'a'"),
        ("--coordinator a:99999 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "must be at least 1"),
    ],
)
def test_wrong_flags(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        train.main([*words(flags), "--workdir", str(tmp_path / "run")], say=id)
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer(monkeypatch):
    assert distributed.JOIN_SECONDS + 5 < 60
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.5)
    port = free_port()
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"no coordinator answers at 127.0.0.1:{port}: tried"),
        distributed.joined(f"127.0.0.1:{port}", 2, 1),
    ):
        pass
    assert time.monotonic() - began < 5


def test_what_starts_several_processes_is_noticed(monkeypatch):
    assert distributed.cluster({}) is None
    assert distributed.cluster({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None, (
        "no step of srun"
    )
    assert distributed.cluster({"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed.cluster({"SLURM_STEP_NUM_TASKS": "8"}) == "SLURM"
    assert distributed.cluster({"OMPI_COMM_WORLD_SIZE": "2"}) == "Open MPI"
    assert distributed.cluster({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert distributed.cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert distributed.cluster({"TPU_WORKER_HOSTNAMES": "a,b"}) == "Cloud TPU"
    assert distributed.cluster({"MEGASCALE_NUM_SLICES": "2"}) == "Cloud TPU"

    # A machine with TPU chips asks its metadata server.
    def answer(request, timeout):
        assert request.get_header("Metadata-flavor") == "Google"
        assert request.full_url.startswith("http://10.0.0.1/computeMetadata/")
        return contextlib.closing(io.BytesIO(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"))

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)
    assert distributed.cluster({"GCE_METADATA_IP": "10.0.0.1"}) == "Cloud TPU"
    assert distributed.cluster({"GCE_METADATA_IP": "10.0.0.1", "JAX_PLATFORMS": "cpu"}) is None


def test_workers_of_a_tpu_do_not_train_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(UserError, match="one TPU worker: give it --num-processes 1"):
        train.main([*words("--seeds 0:4"), "--workdir", str(tmp_path / "run")], say=id)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environ", "flags", "want", "gpus"),
    [
        ({}, {}, (0, 1), None),
        ({}, {"processes": 3, "process": 2}, (2, 3), None),
        ({"JAX_LOCAL_DEVICE_IDS": "1,3"}, {"processes": 3, "process": 2}, (2, 3), "1,3"),
        ({"JAX_LOCAL_DEVICE_IDS": "1,3"}, {}, (0, 1), None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, {"processes": 1}, (0, 1), None),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
            *({}, (5, 8), "1"),
        ),
        (
            {
                **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
                **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "JAX_LOCAL_DEVICE_IDS": "0"},
            },
            *({}, (1, 2), "0"),
        ),
    ],
)
def test_processes_of_many_runs_know_their_number(environ, flags, want, gpus, monkeypatch):
    taken = {}
    monkeypatch.setattr(distributed.jax.config, "update", taken.__setitem__)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert distributed.numbered(**flags) == distributed.Process(*want)
    assert taken.get("jax_cuda_visible_devices") == gpus


def test_one_process_stays_alone_where_that_is_asked(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with distributed.joined(processes=1):
        assert not agreement.several()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("SLURM", "SLURM_STEP_NUM_TASKS=4"),
        ("Open MPI", "OMPI_COMM_WORLD_SIZE=4"),
        ("Cloud TPU", "TPU_WORKER_HOSTNAMES=a,b"),
        ("Cloud TPU", "TPU_PROCESS_ADDRESSES=a:1,b:2"),
        ("Cloud TPU", "MEGASCALE_NUM_SLICES=2"),
    ],
)
def test_a_variable_that_is_left_over_is_named_with_the_way_out(name, found, monkeypatch, capsys):
    def nobody_else(**_):
        time.sleep(0.2)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv(*found.split("="))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", nobody_else)
    with pytest.raises(UserError) as refused, distributed.joined():
        pass
    out = "start all of them, or give --num-processes 1 if this one is alone"
    why = f"{name}: {found}"
    expected = f"cannot join the other processes ({why}): coordinator_address should be defined"
    assert str(refused.value) == f"{expected}; {out}"
    assert f"for all processes ({why}); {out}. " in capsys.readouterr().err


def test_differences_are_named():
    a = {"recipe": {"epochs": 2, "augment": ["flip"]}, "versions": {"jax": "0.10.2"}, "seed": 1}
    b = {"recipe": {"epochs": 3, "augment": ["flip"]}, "versions": {"jax": "0.10.1"}, "seed": 1}
    assert agreement.differences(a, a) == []
    assert agreement.differences(a, b) == [
        "recipe.epochs: 2 in process 0, 3 in it",
        "versions.jax: 0.10.2 in process 0, 0.10.1 in it",
    ]


@pytest.fixture
def three(monkeypatch):
    """Plays three processes in threads: `three(function)` returns what `function(index)` returned
    or raised in each, and how many bytes went round in each collective."""
    here, barrier, rows, rounds = threading.local(), threading.Barrier(3, timeout=10), [0] * 3, []

    def gather(row):
        rows[here.index] = row
        barrier.wait()
        found = np.stack(rows)
        if barrier.wait() == 0:
            rounds.append(found.shape[1])
        return found

    def one(function, index):
        here.index = index
        try:
            return function(index)
        except UserError as error:
            return error

    def play(function):
        rounds.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, [function] * 3, range(3))), list(rounds)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed.jax, "process_index", lambda: here.index)
    return play


def test_what_goes_round_comes_back_whatever_its_length(three):
    values = [[1, 2], None, {"a": "short"}]
    assert three(lambda i: distributed.exchange(values[i])) == ([values] * 3, [1024])
    values[1] = "é" * 3000
    found, rounds = three(lambda i: distributed.exchange(values[i]))
    assert found == [values] * 3
    assert len(rounds) == 2
    assert three(lambda i: agreement.broadcast(f"{i}"))[0] == ["0"] * 3
    assert three(lambda i: agreement.by_leader(lambda: 7 + i))[0] == [7] * 3
    found, _ = three(lambda i: agreement.allgather(i, i == 2).tolist())
    assert found == [[[0, 0], [1, 0], [2, 1]]] * 3
    assert three(lambda i: agreement.any_of(lambda: 15 if i == 1 else None)())[0] == [15] * 3


def test_an_error_of_one_is_told_at_the_next_exchange(three, monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(distributed, "_wait_for_coordinator", lambda _: None)
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)

    def process(index, failing, at_end):
        with distributed.joined("a:1", 3, index):
            if index == failing:
                raise UserError("the disk is full")
            for _ in range(not at_end):
                distributed.exchange(index)

    for failing, at_end in ((0, False), (2, False), (1, True)):
        found, _ = three(lambda i: process(i, failing, at_end))  # noqa: B023 - called here
        texts = [str(error) for error in found]
        told = f"process {failing} of 3 ended: the disk is full"
        assert texts == ["the disk is full" if i == failing else told for i in range(3)]


def test_one_process_gives_itself_what_it_asks():
    assert agreement.is_leader()
    assert not agreement.several()
    assert agreement.broadcast({"a": 1}) == {"a": 1}
    assert agreement.allgather(3, 4).tolist() == [[3, 4]]
    assert agreement.any_of(lambda: None)() is None
    assert agreement.any_of(lambda: 15)() == 15


def test_a_process_reads_its_own_columns_of_an_order():
    order = input_pipeline.batches(np.arange(25, dtype=np.int32), 10)
    parts = [input_pipeline.columns(order, process, 2, 4) for process in range(2)]
    assert [part.shape for part in parts] == [(3, 6), (3, 6)]
    assert np.concatenate(parts, axis=1)[:, :10].tolist() == order.tolist()
    assert (np.concatenate(parts, axis=1)[:, 10:] == -1).all()
    # Each device finds in its own part of the chunk what its own positions ask for.
    mesh = hardware.data_mesh(3)
    rows = np.where(parts[0] >= 0, np.arange(18, dtype=np.int32).reshape(3, 6), -1)
    labels = parts[0].reshape(-1)
    chunk = {"image": labels, "label": labels}
    data, positions = placement.put_chunk(chunk, rows.astype(np.int32), mesh)
    for i, (held, asked) in enumerate(
        zip(data.label.addressable_shards, positions.addressable_shards, strict=True)
    ):
        asked = np.asarray(asked.data)
        found = np.where(asked >= 0, np.asarray(held.data)[asked], -1)
        assert found.tolist() == parts[0][:, 2 * i : 2 * i + 2].tolist()
