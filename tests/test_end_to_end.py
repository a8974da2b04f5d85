"""Whole commands timed from outside, and the least work of a step."""

import argparse
import json
import sys

import pytest

from benchmarks import cases, conv_shapes, end_to_end, roofline
from cifar_jax.reporting.console import epoch_line
from cifar_jax.runtime.errors import UserError

SCRIPT = """
import sys, time
print("Dry run    loss 2.3 on one batch; epoch 1 follows")
for line in sys.argv[1:]:
    time.sleep(0.2)
    print(line, file=sys.stderr if "seed" in line else sys.stdout)
"""


def lines():
    ours = epoch_line({"epoch": 1, "train_loss": 1.5, "train_accuracy": 0.4}, 12)
    torch = "adam seed 0 epoch 2: train_loss 1.2000  val_loss 1.3000"
    return [f"\r{ours}", torch]


def test_epochs_are_timed_as_their_lines_arrive():
    found = end_to_end.run([sys.executable, "-c", SCRIPT, *lines()], {})
    first, second = found["epochs"]
    assert 0.2 <= first < second <= found["seconds"] < 20
    assert second - first > 0.15
    assert found["peak_memory_bytes"] > 1e6


def test_a_failing_command_says_its_last_line():
    with pytest.raises(UserError, match="ended with 3: no such thing"):
        end_to_end.run([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], {})


def test_commands_name_the_side(tmp_path):
    def place(device, data_dir=None):
        return argparse.Namespace(device=device, dataset="cifar10", data_dir=data_dir)

    ours = end_to_end.command("ours-cold", "adam", 2, tmp_path, place("gpu", "data"))
    assert ours[2] == "cifar_jax.train"
    assert ours[-2:] == ["--data-dir", "data"]
    assert ours[ours.index("--device") + 1] == "gpu"
    peer = end_to_end.command("eager@1", "adam", 2, tmp_path, place("gpu"))
    assert peer[peer.index("--threads") + 1] == "1"
    assert peer[peer.index("--device") + 1] == "cuda"
    assert "--workers" not in peer
    published = end_to_end.command("published", "adam", 2, tmp_path, place("cpu"), workers=2)
    assert published[published.index("--workers") + 1] == "2"
    assert published[published.index("--device") + 1] == "cpu"


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [([1, 2], [2, 4], 1), ([3, 4, 5], [2, 4, 6], 3), ([3, 6], [2, 4], None), ([9], [10], 1)],
)
def test_ahead_after(mine, theirs, expected):
    assert end_to_end.ahead_after(mine, theirs) == expected


def test_table_holds_every_side(tmp_path):
    side = {"seconds": 8.0, "epochs": [5.0, 7.0], "peak_memory_bytes": 5e8}
    slow = {"seconds": 24.0, "epochs": [13.0, 23.0], "peak_memory_bytes": 6e8}
    result = {
        "machine": {"cpu": "a chip", "cores": 2}, "dataset": "cifar10", "commit": "c",
        "date": "2026-01-01", "rounds": 1, "not_run": ["adam: compile: no compiler"],
        "runs": [{"recipe": "adam", "epochs": 2, "sides": {
            "ours": end_to_end.summary([side]), "published": end_to_end.summary([slow])}}],
    }  # fmt: skip
    text = end_to_end.table(json.loads(json.dumps(result)))
    assert "| adam, 2 | ours | 8.0 | 5.0 | 2.0 | 0.50 |" in text
    assert "3.00x | 1 |" in text
    assert "Not run: adam: compile: no compiler." in text


@pytest.mark.parametrize("text", ["adam", "adam:0", "adam:x", "nothing:3"])
def test_bad_runs_are_refused(text):
    with pytest.raises(UserError):
        end_to_end.runs_from(text)


def test_least_work_of_a_step_by_hand():
    """tutorial_cnn: conv 3->6 on 28x28, 6->16 on 10x10, dense 400-120-84-10; 62,006 weights."""
    first = 2 * 28 * 28 * 75 * 6
    rest = 2 * (10 * 10 * 150 * 16 + 400 * 120 + 120 * 84 + 84 * 10)
    found = roofline.work(cases.parse("tutorial:4"))
    assert found["flops"] == 4 * (2 * first + 3 * rest)
    outputs = 28 * 28 * 6 + 10 * 10 * 16 + 120 + 84 + 10
    pooled = 14 * 14 * 6 + 5 * 5 * 16 + 120 + 84 + 10
    low, high = (4 * (3 * 4 * n + 8 * 62006) + 4 * 3072 for n in (pooled, outputs))
    assert low <= found["bytes"] <= high


def test_a_convolutions_forms_are_timed_and_the_fastest_marked():
    slow = conv_shapes.measure((3, 3, 4, 8, 1, True), 2, rounds=1, seconds=1e-9)
    assert slow["once"] == list(conv_shapes.FORMS)
    assert all(value > 0 for value in slow["milliseconds"].values())
    row = conv_shapes.measure((3, 3, 4, 8, 1, True), 2, rounds=1, seconds=0.001)
    assert set(row["milliseconds"]) == set(conv_shapes.FORMS)
    assert all(value > 0 for value in row["milliseconds"].values())
    row |= {"milliseconds": {"lax": 2.0, "gemm": 1.0, "winograd": 3.0}, "once": ["lax"]}
    machine = {"cpu": "a chip", "cores": 2}
    text = conv_shapes.table(
        {"machine": machine, "commit": "c", "date": "2026-01-01", "rows": [row]}
    )
    assert "| 3x3, 3 to 4, 8x8, padded, pool | 2 | 2 (once) | **1** | 3 | gemm |" in text
