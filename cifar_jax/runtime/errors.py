"""Errors a user can cause and mend, and the one way names are looked up in registries."""

from __future__ import annotations

import contextlib
import difflib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import cifar_jax

T = TypeVar("T")


class UserError(Exception):
    """A mistake the user can mend.

    The message is one line that says what is wrong and what to do. Entry points print it to
    stderr as `error: <message>` and exit with status 2; library callers catch it.
    """


def notice(message: str) -> None:
    """Prints one line for the user on stderr."""
    print(f"cifar_jax: {message}", file=sys.stderr, flush=True)


class ReaderLeft(UserError):
    """The reader of a pipe (`| head`) has gone, and with it the use of printing more."""


def one_line(error: BaseException) -> str:
    """Returns an error's message, or its type where it has none, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `valid: a, b, c` with a `did you mean` in front where one name is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Returns `registry[name]`.

    Raises:
      UserError: the name is unknown; the message lists the valid names and the nearest one.
    """
    try:
        return registry[name]
    except KeyError:
        raise UserError(f"unknown {kind} {name!r}; {nearest(name, registry)}") from None


def check_batched(images: Any) -> None:
    """Raises `UserError` where an array of images is not [B, H, W, C]."""
    if images.ndim != 4:
        missing = ": a batch axis is missing, give images[None]" if images.ndim == 3 else ""
        raise UserError(f"images must be [B, H, W, C], these are {list(images.shape)}{missing}")


_running = False


def in_command() -> bool:
    """Whether this process runs a command of the package, which may change the process for good
    (hooks, log filters); a caller's process is the caller's."""
    return _running


@contextlib.contextmanager
def _quick_start() -> Iterator[None]:
    """Starts the garbage collector that `cifar_jax/__init__.py` stopped; what was imported until
    then stays out of its sight, and at the end everything does: that is a second of a run."""
    if gc.isenabled() or not cifar_jax.IS_COMMAND:
        yield
        return
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.freeze()


def run_command(main: Callable[[], None]) -> int:
    """Runs an entry point and returns its exit status: 0, or 2 with one line on stderr.

    Ctrl-C where nothing catches it ends in 130, and a reader that left (`| head`) in 141, as a
    shell has them, without a traceback. What was printed has reached stdout where it is 0.
    Anything that is not a `UserError` is a defect of ours and keeps its traceback.
    """
    from cifar_jax.runtime.streams import standard_streams

    global _running
    with standard_streams():
        _running = True
        try:
            with _quick_start():
                status = _status_of(main)
            return status or _status_of(sys.stdout.flush)
        finally:
            _running = False


def _out_of_memory(error: RuntimeError) -> str | None:
    """Returns what to say of JAX's error for a device without memory left, None of any other."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    reason = one_line(RuntimeError(text.strip().splitlines()[0]))
    return (
        f"the device is out of memory ({reason}); a smaller --batch-size, --accumulate 2 or more, "
        "or --remat needs less; what was saved is kept, and a run goes on from there"
    )


def _status_of(action: Callable[[], None]) -> int:
    try:
        action()
    except ReaderLeft:
        return 141
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        line = _out_of_memory(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # `--help`, a signal
        return stop.code or 0
    return 0
