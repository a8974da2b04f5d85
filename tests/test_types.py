"""The examples of README.md and docs/ are right by the types of what they import (`py.typed`)."""

import os
import re
import subprocess
import sys

import pytest
from tiny_data import ROOT

pytest.importorskip("mypy")


@pytest.mark.slow
def test_the_examples_have_the_types_that_the_package_says(tmp_path):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files = []
    for page in pages:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            files.append(tmp_path / f"{page.stem}_{len(files)}.py")
            files[-1].write_text(block)
    assert len(files) >= 5
    wrong = tmp_path / "wrong.py"  # so that nothing is passed by not being looked at
    wrong.write_text("from cifar_jax import train_step\ntrain_step(1, 2, model='x')\n")
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull]
    mypy += ["--ignore-missing-imports", "--follow-imports", "silent"]
    done = subprocess.run(
        [*mypy, *map(str, [*files, wrong])],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line for line in errors if "wrong.py" not in line] == [], done.stderr
    assert any("wrong.py" in line and "train_step" in line for line in errors)
