"""Lines a user reads, and the files of a run through crashes, full disks and odd values."""

import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.reporting import console, metrics_log
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.streams import printable

NAMES = ["cat", "ship", "airplane", "dog"]


# --- rates and results


def test_rates_divide_once_and_take_device_scalars():
    sums = {"loss": jnp.float32(6.0), "correct": jnp.float32(3.0), "count": jnp.float32(4.0)}
    assert console.rates(sums) == {"loss": 1.5, "accuracy": 0.75, "count": 4}


def test_rates_over_nothing_are_nan():
    means = console.rates({"loss": 0.0, "correct": 0, "count": 0})
    assert math.isnan(means["loss"])
    assert math.isnan(means["accuracy"])


def test_results_agree_with_counting_by_hand():
    # true 0 0 1 2 2 2, taken for 0 1 1 2 0 2; no image of the last class
    confusion = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]], np.int32)
    result = console.results({"loss": 3.0, "correct": 4, "count": 6}, confusion, NAMES)
    assert (result["test_loss"], result["test_correct"], result["test_count"]) == (0.5, 4, 6)
    assert result["test_accuracy"] == pytest.approx(4 / 6)
    assert result["per_class"][2] == {
        "class": "airplane", "correct": 2, "count": 3, "accuracy": pytest.approx(2 / 3),
    }  # fmt: skip
    assert math.isnan(result["per_class"][3]["accuracy"])  # no dog was tested


def test_best_epoch_is_the_first_lowest_finite_one():
    losses = [math.nan, 2.0, 1.0, None, 1.0, math.inf]
    rows = [
        {"kind": "epoch", "epoch": k + 1, "validation_loss": loss} for k, loss in enumerate(losses)
    ]
    rows.insert(0, {"kind": "window", "loss": 0.0})
    assert console.best_epoch(rows)["epoch"] == 3
    assert console.best_epoch([{"kind": "epoch", "epoch": 1}]) is None
    assert console.best_epoch(rows[:2]) is None


# --- lines


def test_window_line_counts_steps_within_the_epoch():
    row = {"kind": "window", "epoch": 1, "step": 2000, "loss": 2.1921}
    assert console.window_line(row, 12500) == "epoch 1  step  2000/12500      2.1921"
    row = {"kind": "window", "epoch": 2, "step": 24500, "loss": None}
    assert console.window_line(row, 12500) == "epoch 2  step 12000/12500         nan"


def test_epoch_line_with_and_without_validation():
    row = {
        "kind": "epoch", "epoch": 3, "step": 6000, "train_loss": 1.23456, "train_accuracy": 0.5512,
    }  # fmt: skip
    plain = "epoch  3/30      1.2346  55.12 %"
    assert console.epoch_line(row, 30) == plain
    row |= {"validation_loss": 1.1, "validation_accuracy": 0.6, "timing": {"seconds": 12.34}}
    assert console.epoch_line(row, 30, best=True) == (f"{plain}      1.1000  60.00 %     12.3  *")
    # As read back from a log: numbers that were not finite are None.
    row |= {"validation_loss": None, "validation_accuracy": None}
    assert "         nan    nan %" in console.epoch_line(row, 30)


@pytest.mark.parametrize(("runs", "columns"), [(1, 80), (32, 80), (32, 120)])
def test_the_table_stands_in_columns_and_fits(runs, columns):
    rows = [
        {
            "kind": "epoch", "epoch": 9, "step": 900, "train_loss": 1.2 + 0.01 * k,
            "train_accuracy": 0.5, "validation_loss": 1.1, "validation_accuracy": 0.6 + 0.001 * k,
            "timing": {"seconds": 1234.5},
        }
        for k in range(runs)
    ]  # fmt: skip
    width = console.label_width(30, 12500 if runs == 1 else 0)
    heading = console.header(width, validation=True, runs=runs, columns=columns)
    if runs == 1:
        window = {"kind": "window", "epoch": 9, "step": 102000, "loss": 1.5}
        lines = [
            console.window_line(window, 12500, width),
            console.epoch_line(rows[0], 30, best=True, width=width),
        ]
    else:
        lines = [console.epochs_line(rows, 30, width, columns)]
    assert max(map(len, [heading, *lines])) <= columns
    ends = [heading.index(name) + len(name) for name in ("train loss", "valid. loss", "seconds")]
    for line in lines:
        assert line[ends[0] - 1].isdigit()
        assert len(line) == ends[0] or line[ends[0]] == " "
    assert lines[-1][ends[1] - 1].isdigit()
    assert lines[-1][: ends[2]].endswith("1234.5")


def test_first_images_stand_under_each_other():
    text = console.first_images_lines([0, 1, 1, 2, 3], np.array([3, 1, 2, 2, 0]), NAMES)
    assert text == (
        "GroundTruth: cat ship ship     airplane\nPredicted:   dog ship airplane airplane"
    )


def test_results_lines_give_counts_and_columns_for_many_classes():
    confusion = np.diag([816, 88, 0, 0])
    confusion[0, 1], confusion[1, 0] = 184, 912
    sums = {"loss": 1507.58, "correct": 904, "count": 2000}
    lines = console.results_lines(console.results(sums, confusion, NAMES)).splitlines()
    assert lines[0] == "Test loss 0.753790"
    assert lines[1] == "Test accuracy 45.20 % (904/2000)"
    assert lines[2] == "  cat        81.6 % ( 816/1000)"
    assert lines[3] == "  ship        8.8 % (  88/1000)"
    assert lines[5].split() == ["dog", "-", "(", "0/0)"]
    names = [f"class{k}" for k in range(100)]
    many = console.results(
        {"loss": 1.0, "correct": 100, "count": 100}, np.eye(100, dtype=int), names
    )
    lines = console.results_lines(many, split="Validation").splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 104
    assert all("\n".join(lines).count(f"{name} ") == 1 for name in names)
    assert lines[0].startswith("Validation loss")


def test_timing_line():
    line = console.timing_line({"data": 0.84, "compile": 2.06, "training": 65.0}, 24300.4)
    assert line == "Time: data 0.8 s, compile 2.1 s, training 65.0 s; 24,300 training images/s"


def test_names_that_the_terminal_cannot_show_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printable("고 cat", stream) == "\\uace0 cat"
    assert printable("고 cat", io.StringIO()) == "고 cat"


def test_one_is_no_plural():
    assert console.counted(1, "epoch") == "1 epoch"
    assert console.counted(2, "entry", "entries") == "2 entries"


# --- metrics.jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back_as_written(path):
    with metrics_log.MetricsLog(path) as log:
        row = log.append("window", epoch=1, step=np.int32(5), loss=jnp.float32(1.5), name="고양이")
        log.append("epoch", epoch=1, loss=math.nan, values=np.array([1.0, math.inf]))
        log.append("test", text="\u2028 and \udcff", timing={"seconds": 1.0})
    assert row["kind"] == "window"
    rows = metrics_log.read_metrics(path)
    assert rows[0] == {"kind": "window", "epoch": 1, "step": 5, "loss": 1.5, "name": "고양이"}
    assert rows[1] == {"kind": "epoch", "epoch": 1, "loss": None, "values": [1.0, None]}
    assert rows[2]["text"] == "\u2028 and \udcff"
    assert metrics_log.read_metrics(path, "epoch") == [rows[1]]
    assert metrics_log.read_metrics(path, timing=False)[2].keys() == {"kind", "text"}
    assert "고양이" in path.read_text(encoding="utf-8")


def test_floats_are_exact(path):
    values = [0.1, 1 / 3, 2**-1074, 1.7976931348623157e308, float(np.float32(0.1))]
    with metrics_log.MetricsLog(path) as log:
        log.append("window", values=values)
    assert metrics_log.read_metrics(path)[0]["values"] == values


def test_a_resumed_log_is_byte_identical_to_an_unbroken_one(path, tmp_path):
    def write(log, steps):
        for step in steps:
            log.append("window", step=step, loss=1 / (step + 1))

    with metrics_log.MetricsLog(tmp_path / "unbroken.jsonl") as log:
        write(log, range(10))
    with metrics_log.MetricsLog(path) as log:
        write(log, range(4))
        log.sync()
        checkpoint = log.offset()
        write(log, range(4, 7))
    with metrics_log.MetricsLog(path) as log:
        assert log.truncate(checkpoint) == 0
        assert log.offset() == checkpoint
        write(log, range(4, 10))
    assert path.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_a_crash_at_any_byte_leaves_a_readable_log(path):
    with metrics_log.MetricsLog(path) as log:
        for step in range(3):
            log.append("window", step=step, name="고")
    whole = path.read_bytes()
    ends = [0, *(k + 1 for k, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends) - 1
        assert [row["step"] for row in metrics_log.read_metrics(path)] == list(range(complete))
        with metrics_log.MetricsLog(path) as log:
            assert log.offset() == ends[complete]
            log.append("window", step=99)
        steps = [row["step"] for row in metrics_log.read_metrics(path)]
        assert steps == [*range(complete), 99]


def test_truncate_says_when_rows_are_missing_and_never_cuts_a_row_in_two(path):
    with metrics_log.MetricsLog(path) as log:
        log.append("window", step=0)
        end = log.offset()
        log.append("window", step=1)
        assert log.truncate(end + 3) == 3
        assert log.offset() == end
        assert log.truncate(end + 1000) == 1000
        log.append("window", step=2)
    assert [row["step"] for row in metrics_log.read_metrics(path)] == [0, 2]


def test_a_last_line_of_zeros_is_left_out_but_a_broken_middle_is_an_error(path):
    path.parent.mkdir()
    path.write_bytes(b'{"kind":"window","step":1}\n\0\0\0\n')
    assert [row["step"] for row in metrics_log.read_metrics(path)] == [1]
    path.write_bytes(b'{"kind":"window"}\ngarbage\n{"kind":"window"}\n')
    with pytest.raises(UserError, match="line 2"):
        metrics_log.read_metrics(path)
    with pytest.raises(UserError, match="cannot read"):
        metrics_log.read_metrics(path.with_name("absent"))


def test_a_full_disk_takes_the_row_back(tmp_path):
    # RLIMIT_FSIZE stops a write in the middle, as a full disk does.
    script = """
import resource, signal, sys
from cifar_jax.reporting.metrics_log import MetricsLog
from cifar_jax.runtime.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(sys.argv[1])
log.append("window", step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.offset() + 10, resource.RLIM_INFINITY))
try:
    log.append("window", step=1)
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("window", step=2)
"""
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert str(path) in done.stdout
    assert [row["step"] for row in metrics_log.read_metrics(path)] == [0, 2]


def test_a_log_that_cannot_be_opened_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "metrics.jsonl"):
        with pytest.raises(UserError, match="cannot open"):
            metrics_log.MetricsLog(bad)


def test_values_without_a_json_form_are_refused(path):
    with metrics_log.MetricsLog(path) as log:
        with pytest.raises(TypeError, match="no JSON form"):
            log.append("window", loss=object())
        assert log.offset() == 0


# --- summary.json, environment, TensorBoard


def test_bytes_of_a_files_name_survive_json(tmp_path):
    metrics_log.write_summary(tmp_path / "summary.json", {"source": "caf\udce9 고"})
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == {"source": "caf\udce9 고"}


def test_summary_is_whole_or_as_before(tmp_path):
    path = tmp_path / "summary.json"
    metrics_log.write_summary(
        path, {"test_loss": np.float32(0.5), "best": math.nan, "name": "고양이"}
    )
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "test_loss": 0.5, "best": None, "name": "고양이",
    }  # fmt: skip
    with pytest.raises(TypeError, match="no JSON form"):
        metrics_log.write_summary(path, {"x": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["test_loss"] == 0.5
    assert os.listdir(tmp_path) == ["summary.json"]


def test_environment_names_versions_device_and_processor_but_not_the_machine():
    found = environment()
    assert found["versions"]["jax"].count(".") >= 2
    assert all(found["versions"].values())
    assert found["device"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert 1 <= found["cpu"]["usable"] <= found["cpu"]["cores"]
    text = json.dumps(found)
    assert os.uname().nodename not in text
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def scalars(directory):
    """Returns {(tag, step): value} from the event files in `directory`."""
    return {
        (value.tag, event.step): value.simple_value
        for file in events(directory)
        for event in file
        for value in event.summary.value
    }


def events(directory):
    """Returns the events of each file in `directory`, the oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        found.append([])
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found[-1].append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4  # length, its checksum, the event, its checksum
    return found


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    with metrics_log.TensorBoardLog(tmp_path) as log:
        log.append({"kind": "window", "epoch": 1, "step": 100, "loss": 2.0})
        timing = {"images_per_second": 5.0}
        log.append({"kind": "epoch", "epoch": 1, "step": 200, "train_loss": 1.5, "timing": timing})
        log.append({"kind": "epoch", "epoch": 2, "step": 300, "train_loss": None, "best": True})
    assert scalars(tmp_path) == {
        ("window/loss", 100): 2.0,
        ("epoch/train_loss", 200): 1.5,
        ("epoch/images_per_second", 200): 5.0,
    }


def test_tensorboard_files_that_cannot_be_written_are_one_error(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    row = {"kind": "epoch", "epoch": 1, "step": 1, "train_loss": 1.0}
    with metrics_log.TensorBoardLog(tmp_path) as log:
        good = log._writer._py_recordio_writer._writer
        log._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot write TensorBoard files to .*: No space left"):
            log.append(row)
        with contextlib.suppress(OSError):
            log._writer._py_recordio_writer._writer.close()
        log._writer._py_recordio_writer._writer = good
    with pytest.raises(UserError, match="cannot write TensorBoard files"):
        metrics_log.TensorBoardLog("/proc/nosuch")


def test_tensorboard_absent_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install"):
        metrics_log.TensorBoardLog(tmp_path)


def test_importing_the_report_loads_nothing_heavy():
    script = (
        "import sys, cifar_jax.reporting.console, cifar_jax.reporting.metrics_log\n"
        "import cifar_jax.reporting.plots\n"
        "heavy = {'matplotlib', 'PIL', 'tqdm', 'tensorboardX', 'tensorflow', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
