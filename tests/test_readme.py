"""The Python examples of the README and docs/ run as they are printed, and the commands parse."""

import importlib
import json
import re
import shlex

import numpy as np
import pytest
from tiny_data import NAMES, ROOT, complete, python, tiny

from cifar_jax import export
from cifar_jax.settings import settings_table
from cifar_jax.training import evaluation

__all__ = ["complete", "tiny"]

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = "".join(path.read_text() for path in FILES)
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGES, re.M | re.S)


def test_there_is_an_example_of_ones_own_loop():
    assert any("train_step" in block and "eval_step" in block for block in BLOCKS)


SERVING = [block for block in BLOCKS if "deserialize" in block]
SAVED = [block for block in BLOCKS if "predictions.npz" in block]
OTHERS = [block for block in dict.fromkeys(BLOCKS) if block not in SERVING + SAVED]


def run(block, folder):
    return python(block, folder=folder, flags=("-W", "error"))


@pytest.mark.extended
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


def test_the_example_of_predictions_reads_what_a_run_writes(complete, tmp_path):
    (block,) = SAVED
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dropout-seed42").symlink_to(complete)
    right = json.loads((complete / "summary.json").read_text())["test_accuracy"]
    assert run(block, tmp_path) == f"{right:.2%} right\n"


def fenced(text):
    """What stands in fences that name no language."""
    parts = re.split(r"^```(.*)\n", text, flags=re.M)
    return [block for name, block in zip(parts[1::4], parts[2::4], strict=True) if not name]


COMMANDS = sorted(
    {
        found.groups()
        for path in FILES
        for block in fenced(path.read_text())
        for line in block.replace("\\\n", " ").splitlines()
        if (found := re.search(r"python -m cifar_jax\.(\w+)\b(.*)", line))
    }
)


def test_commands_are_found():
    assert {"train", "evaluate", "predict", "convert", "export", "report"} <= dict(COMMANDS).keys()


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=lambda text: text.strip())
def test_every_command_that_is_shown_is_one_that_there_is(command, words):
    module = importlib.import_module(f"cifar_jax.{command}")
    parser = module.make_parser() if command != "datasets" else None
    if parser:
        parser.parse(shlex.split(words, comments=True))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = FILES[0].read_text()
    assert len(text.splitlines()) <= 150
    for path in FILES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), (path, target)


@pytest.mark.parametrize(
    "block",
    [OTHERS[0], *(pytest.param(block, marks=pytest.mark.slow) for block in OTHERS[1:])],
    ids=[str(i) for i in range(len(OTHERS))],
)
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
