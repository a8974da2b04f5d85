"""The compilation cache: a damaged one costs a compilation and one line, and is whole again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, signal, sys, warnings
import jax, jax.numpy as jnp
from cifar_jax.runtime import compilation_cache
from cifar_jax.runtime.errors import run_command
run_command(compilation_cache.enable)
folder = jax.config.jax_compilation_cache_dir
if len(sys.argv) > 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
assert jax.jit(lambda x: jnp.sin(x) + 1)(jnp.zeros(3)).tolist() == [1, 1, 1]
warnings.warn("of another kind")
print(folder)
"""


def run(home, *arguments):
    """Returns the entries in the cache and the lines on stderr."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**kept, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(home, "cifar_jax", "xla")
    assert done.stdout.strip() == str(folder)
    said = done.stderr.splitlines()
    # From 3.13 on Python shows the line of a `-c` program beside the warning it makes.
    assert sum("UserWarning: of another kind" in line for line in said) == 1
    said = [line for line in said if "of another kind" not in line]
    return {path.name: path.read_bytes() for path in folder.glob("*-cache")}, said


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    home = tmp_path_factory.mktemp("cache")
    entries, said = run(home)
    assert len(entries) >= 2
    assert said == []
    return home, entries


@pytest.mark.parametrize("left", [0, 0.5])
def test_damaged_programs_are_compiled_again(filled, left):
    home, entries = filled
    for name, content in entries.items():
        (home / "cifar_jax" / "xla" / name).write_bytes(content[: int(left * len(content))])
    mended, said = run(home)
    assert mended.keys() == entries.keys()
    assert all(len(content) > 100 for content in mended.values())
    (line,) = said
    assert "removed damaged programs from the cache" in line
    assert str(home) in line
    assert run(home) == (mended, [])


def test_a_full_disk_leaves_no_half_program(filled, tmp_path):
    entries, said = run(tmp_path, 200)
    assert entries == {}
    (line,) = said
    assert "cannot keep compiled programs" in line
    assert "File too large" in line
    entries, said = run(tmp_path)
    assert len(entries) == len(filled[1])
    assert said == []


def test_no_place_for_a_cache_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    entries, (line,) = run(tmp_path / "file")
    assert entries == {}
    assert "cannot keep compiled programs" in line
    assert "Not a directory" in line
