"""A device without memory left is one line that says what needs less."""

import os

import jax
import pytest

from cifar_jax.parallel import hardware
from cifar_jax.runtime.errors import run_command


def test_out_of_memory_is_one_line(capsys):
    def main():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 81604378624 bytes.\nmore"
        )

    assert run_command(main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the device is out of memory (")
    assert "81604378624" in line
    assert all(word in line for word in ("--batch-size", "--accumulate", "--remat"))


def test_other_errors_of_the_device_keep_their_traceback():
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run_command(main)


def test_deterministic_adds_to_the_users_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=elsewhere")
    hardware.deterministic()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=elsewhere", "--xla_gpu_deterministic_ops=true"]
