"""The package as others get it: a wheel made from the sdist, used from a fresh environment."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest
from tiny_data import ROOT, words

BUILD = "import sys; from setuptools.build_meta import {0}; print({0}(sys.argv[1]))"


def build(source, what, target):
    """What a build front end does, in this environment: no network is asked."""
    command = [sys.executable, "-c", BUILD.format(what), str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from an sdist that was built from the files that git knows."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 to build")
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    sdist = build(source, "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (inside,) = (folder / "unpacked").iterdir()
    return build(inside, "build_wheel", folder)


@pytest.mark.extended
def test_the_wheel_holds_the_package_and_what_it_reads_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "cifar_jax").rglob("*.py")}
    assert package <= set(names)
    assert "cifar_jax/reporting/templates/report.html" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cifar_jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text


@pytest.mark.extended
def test_a_fresh_environment_trains_with_the_wheel_alone(wheel, tmp_path):
    """Its dependencies are those of this environment, which a line of `.pth` lends; this checkout
    is not on the path."""
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    python = fresh / "bin" / "python"
    target = sysconfig.get_path("purelib", vars={"base": str(fresh), "platbase": str(fresh)})
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    with open(os.path.join(target, "lent.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"TFDS_DATA_DIR": str(tmp_path / "data"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = words("--dataset shapes10 --recipe adam --epochs 1 --device cpu --workdir run")
    done = subprocess.run(
        [python, "-m", "cifar_jax.train", *options],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["commit"] is None, "not this checkout"
    assert summary["test_accuracy"] > 0.2
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000


def test_what_the_files_beside_the_package_say_agrees_with_it():
    import cifar_jax

    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {cifar_jax.__version__}\n" in citation
    license_text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in license_text
    assert "The cifar_jax authors" in license_text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text()
    ruff = next(line for line in pinned.splitlines() if line.startswith("ruff=="))[6:]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"## {cifar_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert project["license"] == "Apache-2.0"
