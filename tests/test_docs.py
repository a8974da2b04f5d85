"""The site of docs/ is built without a warning, where mkdocs is installed (extra `docs`)."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from tiny_data import ROOT


def builder():
    """The words that start mkdocs: this environment's, or what MKDOCS names."""
    if os.environ.get("MKDOCS"):
        return [os.environ["MKDOCS"]]
    needed = ("mkdocs", "material", "mkdocstrings")
    if all(importlib.util.find_spec(name) for name in needed):
        return [sys.executable, "-m", "mkdocs"]
    pytest.skip("needs mkdocs: pip install -e '.[docs]'")


@pytest.mark.extended
def test_the_site_is_built_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "cifar_jax").symlink_to(ROOT / "cifar_jax")
    done = subprocess.run(
        [*builder(), "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "build" / "site"
    api = (site / "api.html").read_text()
    for name in ("train_step", "load_dataset", "wilson_interval"):
        assert name in api
    columns = (site / "from_pytorch.html").read_text()
    assert columns.count('class="grid"') == 11


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"- {path.name}\n" in listed, path.name
