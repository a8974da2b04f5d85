"""Makes `docs/tutorial.ipynb` of `docs/from_pytorch.md`, and runs it.

The page's words and PyTorch lines become cells to read, its JAX lines cells to run. Outputs are
kept, so that the notebook can be read without running it. Needs the extra `test`, and CIFAR-10
(`python -m cifar_jax.datasets prepare cifar10`, or `TFDS_DATA_DIR`).
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).resolve().parent
PAGE, NOTEBOOK = DOCS / "from_pytorch.md", DOCS / "tutorial.ipynb"

INSTALL = """\
# Where cifar_jax is not installed, as in Colab: put the wheel that `python -m build` makes beside
# this notebook, and this cell installs it.
import glob
import importlib.util

if importlib.util.find_spec("cifar_jax") is None:
    %pip install --quiet {glob.glob("cifar_jax-*.whl")[0]}"""

_FENCE = re.compile(r'^```python(?: title="(\w+)")?\n(.*?)^```\n?', re.M | re.S)


def cells(page: str) -> list:
    """Returns the page's cells, the installing one first."""
    found, end = [new_code_cell(INSTALL)], 0

    def prose(text: str) -> None:
        text = re.sub(r"</?div[^>]*>", "", text)
        # Links between pages of the site lead nowhere from a notebook.
        text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text).strip()
        if text:
            found.append(new_markdown_cell(re.sub(r"\n{3,}", "\n\n", text)))

    for block in _FENCE.finditer(page):
        prose(page[end : block.start()])
        title, code = block.groups()
        if title == "JAX":
            found.append(new_code_cell(code.rstrip()))
        else:
            found.append(new_markdown_cell(f"In {title}:\n\n```python\n{code}```"))
        end = block.end()
    prose(page[end:])
    for number, cell in enumerate(found):
        cell["id"] = f"cell-{number}"  # nbformat's own are random
    return found


def make(page: str) -> nbformat.NotebookNode:
    """Returns the notebook, not run yet."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells(page), metadata={"kernelspec": kernel})


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: float = 3600) -> None:
    """Runs the cells, in `folder`; raises `nbclient`'s error where one fails."""
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": folder}}).execute()


def main() -> None:
    import tempfile

    notebook = make(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # times
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
