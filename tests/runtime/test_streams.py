"""Standard streams that are closed, full, left by their reader, or of a narrow encoding."""

import io
import json
import os
import subprocess
import sys

import pytest
from tiny_data import ROOT, command_environment, tiny, words

from cifar_jax import train
from cifar_jax.runtime.errors import run_command
from cifar_jax.runtime.streams import json_text

__all__ = ["tiny"]

COMMAND = """
import os, sys
from cifar_jax.runtime.errors import UserError, run_command
def main():
    for name in sys.argv[1:]:
        if name == "line":
            print("a line")
        elif name == "lines":
            print("a line\\n" * 100_000)
        elif name == "warning":
            print("a warning", file=sys.stderr)
        elif name == "help":
            raise SystemExit(0)
        elif name == "error":
            raise UserError("a mistake")
        else:  # what a file opened now must not get
            assert os.open("/dev/null", os.O_RDONLY) > 2
sys.exit(run_command(main))
"""
FULL = "error: cannot write to standard output: No space left on device\n"


def shell(line, *arguments, buffered=True):
    """Runs `line`, in which "$@" is a command; returns (status, stdout, stderr)."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "" if buffered else "1",
    }
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}", "bash", sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("line", "does", "expected"),
    [
        ('"$@" >&-', "line open", (0, "", "")),
        ('"$@" >&- 2>&- <&-', "line warning open", (0, "", "")),
        ('"$@" >&- 2>&-', "line error", (2, "", "")),
        ('"$@" >/dev/full', "line", (2, "", FULL)),
        ('"$@" >/dev/full', "lines", (2, "", FULL)),
        ('"$@" >/dev/full', "line help", (2, "", FULL)),
        ('"$@" >/dev/full', "error", (2, "", "error: a mistake\n")),
        ('"$@" 2>/dev/full', "warning line", (0, "a line\n", "")),
        ('"$@" 2>/dev/full', "line error", (2, "a line\n", "")),
        ('"$@" | head -1', "lines", (141, "a line\n", "")),
        ('"$@" | (exec <&-; sleep 1)', "line help", (141, "", "")),
        ('"$@" | head -1', "line", (0, "a line\n", "")),
    ],
)
def test_what_cannot_be_printed(line, does, expected, buffered):
    assert shell(line, "-c", COMMAND, *words(does), buffered=buffered) == expected


QUICK = words("-m cifar_jax.train --recipe adam --conv gemm --devices 1 --batch-size 60 --epochs 1")


@pytest.mark.parametrize(
    ("line", "status", "last"),
    [
        ('"$@" >&- 2>&-', 0, ""),
        ('"$@" >/dev/full', 2, FULL),
        (
            '"$@" | head -1',
            2,
            "error: cannot write to standard output: Broken pipe; the run is not complete: the "
            "same command goes on\n",
        ),
    ],
)
def test_a_run_completes_or_says_why_not(line, status, last, tiny, tmp_path, monkeypatch):
    for name, value in command_environment(tmp_path / "xla").items():
        monkeypatch.setenv(name, value)
    where = ["--data-dir", tiny, "--workdir", tmp_path / "run", "--no-plots"]
    found = shell(line, *QUICK, *map(str, where), buffered="head" not in line)
    assert found[::2] == (status, last)
    assert (tmp_path / "run" / "summary.json").exists() == (status == 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_can_be_printed_and_any_json_read(monkeypatch, encoding):
    name = "caf\udce9 é 고 \U0001f600"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command(lambda: (print(name), print(json_text({"image": name})))) == 0
    assert sys.stdout is stream
    line, text = stream.buffer.getvalue().decode(encoding).splitlines()
    assert line == name.encode(encoding, "backslashreplace").decode(encoding)
    assert json.loads(text) == {"image": name}


def test_help_says_no_default_twice_and_none_that_is_none():
    shown = " ".join(train.make_parser().format_help().split())
    assert "(default: runs/...)" in shown
    assert "(default: auto)" in shown
    assert "(default: None)" not in shown
    assert shown.count("(default: runs/...)") == 1
