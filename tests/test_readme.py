"""The README's Python examples run as they are printed."""

import re

import numpy as np
import pytest
from tiny_data import NAMES, ROOT, complete, python, tiny

from cifar_jax import export
from cifar_jax.recipes import settings_table
from cifar_jax.training import evaluation

__all__ = ["complete", "tiny"]

PAGES = "".join((ROOT / name).read_text() for name in ("README.md", "docs/scaling.md"))
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGES, re.M | re.S)


def test_there_is_an_example_of_ones_own_loop():
    assert any("train_step" in block and "eval_step" in block for block in BLOCKS)


SERVING = [block for block in BLOCKS if "deserialize" in block]
OTHERS = [block for block in BLOCKS if block not in SERVING]


def run(block, folder):
    return python(block, folder=folder, flags=("-W", "error"))


def test_the_example_of_serving_runs_on_what_export_writes(complete, tmp_path):
    (block,) = SERVING
    export.main([str(complete), str(tmp_path / "model.stablehlo")], say=id)
    lines = run(block, tmp_path).splitlines()
    (expected,) = np.asarray(evaluation.load(complete).logits(np.zeros((1, 32, 32, 3), np.uint8)))
    shares = np.exp(expected) / np.exp(expected).sum()
    assert len(lines) == 2
    for line in lines:
        name, share = line.rsplit(" ", 1)
        assert name == NAMES[shares.argmax()]
        assert float(share) == pytest.approx(shares.max(), rel=1e-5)


@pytest.mark.parametrize("block", OTHERS, ids=[str(i) for i in range(len(OTHERS))])
def test_example_runs(block, cifar10, tmp_path):
    """Where CIFAR-10 is prepared: the examples load it by name."""
    said = run(block, ROOT)
    if "take_batch" in block:
        found = re.search(r"loss ([\d.]+), (\d+) of (\d+) right", said)
        loss, right, count = map(float, found.groups())
        assert 1.0 < loss < 2.31, "below ln 10, the loss of a network that knows nothing"
        assert 0 < right < count == 500


def test_the_table_of_settings_is_that_of_the_recipe():
    page = (ROOT / "docs/recipes.md").read_text()
    assert settings_table() in page, "put what settings_table() returns into docs/recipes.md"
