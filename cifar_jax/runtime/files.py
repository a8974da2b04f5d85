"""Paths as users write them, and files that other processes may use at the same time."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cifar_jax.runtime.errors import UserError, notice

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def expanded(path: str | os.PathLike) -> str:
    """Returns `path` with a home directory in place of `~` or `~name` at its start; as in a shell,
    the `~name` of nobody stays.

    Raises:
      UserError: it is empty, the address of something remote, or there is no home directory.
    """
    text = os.path.expanduser(path)
    if not text:
        raise UserError("the path is empty")
    if _ADDRESS.match(text):
        raise UserError(f"{text} is an address: only files and folders of this machine can be used")
    if text.split("/")[0] == "~":
        raise UserError(f"{text}: no home directory is known; set HOME or write the path in full")
    return text


def absolute(path: str | os.PathLike) -> Path:
    """Returns `expanded(path)` from the root on. Raises `UserError` where the current folder, which
    it takes, was deleted."""
    try:
        return Path(expanded(path)).absolute()
    except FileNotFoundError:
        raise UserError(
            f"{path} lies in the current folder, which was deleted; change to another"
        ) from None


def user_cache() -> Path | None:
    """Returns the user's folder of caches, `$XDG_CACHE_HOME` or `~/.cache`; None where there is no
    home directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return absolute(root)
    with contextlib.suppress(UserError):
        return absolute("~/.cache")
    return None


def make_folder(path: Path) -> None:
    """Makes a folder and those above it. Raises `OSError`, also of a link that points nowhere."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            what = f"{place} is a link to {os.readlink(place)}, which is not there"
            raise FileNotFoundError(errno.ENOENT, what)
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Deletes a file, a folder with what is in it, or a link, but not what that points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to. What is there at the end takes the place of `path`,
    so that a reader sees the old file or the whole new one. After an error nothing has changed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def lock(
    path: Path, *, waiting: Callable[[], None] | None = None, needed: bool = False
) -> Iterator[bool]:
    """Yields whether this process has the exclusive lock on the file `path`, which it makes; the
    system frees the lock of a process that dies.

    Where the system or the file system has no locks, it says so and goes on as if it had it.

    Args:
      waiting: called where another process has the lock, and then waited for; without it the
        result is False there.
      needed: without locks it is an `OSError`.
    """
    with open(path, "a") as file:
        try:
            held = _locked(file, waiting)
        except (ImportError, OSError) as error:
            if needed:
                raise OSError(errno.ENOTSUP, f"no locks ({error})") from None
            _say_unlocked(path.parent, getattr(error, "strerror", None) or "not on this system")
            held = True
        yield held


def _locked(file, waiting: Callable[[], None] | None) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        if waiting is None:
            return False
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


@functools.cache  # once
def _say_unlocked(folder: Path, reason: str) -> None:
    notice(f"no locks in {folder} ({reason}): see to it that no other process works there")


def write_json(path: Path, values: dict) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one.

    Raises:
      UserError: the disk is full or the file cannot be written.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        with replacing(path) as temporary:
            # What no encoding holds (bytes of a file's name) becomes a JSON escape.
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def new_file(path: str | os.PathLike, *, overwrite: bool = False):
    """Yields the path of a temporary file beside `path`, renamed to it when all went well.

    Raises:
      UserError: `path` is a directory, is there and may not be overwritten, or cannot be
        written.
    """
    path = Path(path)
    check_target(path, overwrite)
    try:
        with replacing(path) as temporary:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def check_target(path: str | os.PathLike, overwrite: bool) -> None:
    """Raises `UserError` where a file may not be written at `path`."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name a file")
        there = path.exists()
        has_folder = path.parent.is_dir()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    if there and not overwrite:
        raise UserError(f"{path} is there already; give --overwrite to replace it")
    if not has_folder:
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
