"""docs/tutorial.ipynb: the page's cells, and they run."""

import importlib.util
import re

import pytest
from tiny_data import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

_spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "docs/make_tutorial.py")
make_tutorial = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_tutorial)

PAGE = make_tutorial.PAGE.read_text(encoding="utf-8")
# A sixtieth of the training images: 210 steps an epoch, of which a line means 200.
CUT = """
import numpy as np
import cifar_jax
from cifar_jax.datasets import Dataset, Split
whole = cifar_jax.load_dataset("cifar10", progress=False)
splits = {}
for name, size in (("train", 840), ("test", 400)):
    split = whole.splits[name]
    splits[name] = Split(np.ascontiguousarray(split.images[:size]), split.labels[:size])
cifar_jax.load_dataset = lambda name: Dataset("cifar10", "", "", whole.class_names, "", splits)
"""


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_it_is_that_of_the_page_with_what_it_printed():
    notebook = nbformat.read(make_tutorial.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert sources(notebook) == sources(make_tutorial.make(PAGE)), "python docs/make_tutorial.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    losses = [float(x) for x in re.findall(r"\[[12], +\d+\] loss: ([\d.]+)", said)]
    assert len(losses) == 12
    assert losses[-1] < 1.5
    (accuracy,) = re.findall(r"on the 10000 test images: (\d+) %", said)
    assert int(accuracy) >= 45
    kinds = [key for cell in code for out in cell.outputs for key in out.get("data", {})]
    assert "image/png" in kinds


@pytest.mark.extended
def test_its_cells_run(cifar10, tmp_path):
    page = PAGE
    for printed_as, run_as in {"2000": "200", "1999": "199"}.items():
        page = page.replace(printed_as, run_as)
    notebook = make_tutorial.make(page)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(CUT))
    make_tutorial.run(notebook, tmp_path, timeout=300)
    said = "".join(out.get("text", "") for c in notebook.cells for out in c.get("outputs", []))
    assert re.search(r"\[2, +200\] loss: 2\.\d", said)
    assert "on the 400 test images" in said
