"""What a command prints to: any text can be printed, and none is lost without a word."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from cifar_jax.runtime.errors import ReaderLeft, UserError


def printable(text: str, stream: TextIO | None) -> str:
    """Returns `text` with what the stream's encoding cannot hold written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def bold(text: str) -> str:
    """Returns `text` in bold where stdout is a terminal that has it; https://no-color.org is
    respected."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    try:
        terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):
        terminal = False
    return f"\x1b[1m{text}\x1b[0m" if terminal and not plain else text


def json_text(values: Any) -> str:
    """Returns one line of JSON for stdout, in ASCII where its encoding would need escapes: those
    of `printable` are not JSON's."""
    text = json.dumps(values, ensure_ascii=False)
    return text if printable(text, sys.stdout) == text else json.dumps(values)


class Stream:
    """Stands for `sys.stdout` or `sys.stderr`: escapes what the encoding cannot hold, and tells a
    failed write from every other OSError.

    Args:
      stream: what it writes to.
      name: what a `UserError` calls it; without a name failed writes are of no account (stderr:
        there is nowhere to report them).
    """

    def __init__(self, stream: TextIO, name: str = ""):
        self._stream, self._name, self.failed = stream, name, False

    def _try(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.failed = True
            if self._name:
                kind = ReaderLeft if isinstance(error, BrokenPipeError) else UserError
                raise kind(f"cannot write to {self._name}: {error.strerror}") from None

    def write(self, text: str) -> int:
        self._try(self._stream.write, printable(text, self._stream))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Puts a `Stream` in the place of stdout and stderr; what was closed swallows what it gets."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Or the next file opened had the number, and in it what C++ libraries print.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    former = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in former)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err = Stream(out, "standard output"), Stream(err)
    try:
        yield
    finally:
        with contextlib.suppress(UserError):
            out.flush()
        # Python flushes what stands there at its exit, and would print what fails once more.
        sys.stdout = None if out.failed else former[0]
        sys.stderr = None if err.failed else former[1]
