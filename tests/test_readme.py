"""The README's Python examples run as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_there_is_an_example_of_ones_own_loop():
    assert any("train_step" in block and "eval_step" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_example_runs(block, cifar10, tmp_path):
    """Where CIFAR-10 is prepared: the examples load it by name."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "train_step" in block:
        found = re.search(r"loss ([\d.]+), (\d+) of (\d+) right", done.stdout)
        loss, right, count = map(float, found.groups())
        assert 1.0 < loss < 2.31, "below ln 10, the loss of a network that knows nothing"
        assert 0 < right < count == 500
