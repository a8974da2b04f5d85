"""Downloads one file: quick to fail offline, resumed when broken, checked when complete."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from cifar_jax.runtime.errors import UserError

_BLOCK = 1 << 18


class Unreachable(Exception):
    """The server cannot be reached or does not have the file; says which and why."""


def download(
    url: str,
    path: Path,
    *,
    size: int | None,
    sha256: str,
    remedy: str,
    progress: bool = True,
    probe_seconds: float = 8.0,
    stall_seconds: float = 60.0,
    attempts: int = 10,
    backoff_seconds: float = 1.0,
) -> Path:
    """Returns `path` once it holds the file at `url`.

    What has arrived is kept in `<path>.part` and continued by an HTTP Range request after a
    broken connection, in this call or a later one. A `path` that exists and matches is used.

    Args:
      url: http or https.
      size: the file's length in bytes, None to take what the server says.
      sha256: its digest in hexadecimal, or the beginning of it.
      remedy: what else the user may do, to end the messages with: `use --archive`.
      probe_seconds: how long the first answer may take, name look-up included.
      stall_seconds: how long the connection may stay silent later on.
      attempts: connections in a row that may bring nothing before it gives up.
      backoff_seconds: the first pause between attempts; each next one is twice as long, up to
        30 s.

    Raises:
      Unreachable: no answer within `probe_seconds`, or no such file.
      UserError: another size or hash, no space, or the connection breaks again and again.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"cannot download {url!r}: the address must start with http:// or https://")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if size in (None, path.stat().st_size) and matches(path, sha256):
                return path
            path.unlink()
        if size is None:
            size = _remote_size(url, probe_seconds, remedy)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        if _offset(part) < size:
            response = _probe(url, _offset(part), probe_seconds)
            limits = stall_seconds, attempts, backoff_seconds
            _receive(url, response, part, size, progress, limits, remedy)
        if not matches(part, sha256):
            part.unlink()
            raise UserError(
                f"{url} has another hash than expected (sha256 {sha256[:12]}...): the file was "
                f"altered or damaged on the way and has been removed; try again or {remedy}"
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"cannot store {path}: {error.strerror or error}; free some space or {remedy}"
        ) from error
    return path


def _receive(url, response, part, size, progress, limits, remedy):
    """Appends to `part` until it holds `size` bytes."""
    from tqdm import tqdm

    stall_seconds, attempts, backoff_seconds = limits
    failures, reason = 0, "the connection closed early"
    bar = tqdm(
        total=size, initial=_offset(part), unit="B", unit_scale=True, unit_divisor=1024,
        desc=part.name.removesuffix(".part"), disable=not progress or sys.stderr is None,
    )  # fmt: skip
    with bar:
        while _offset(part) < size:
            before = _offset(part)
            if response is None:
                pause = min(30.0, backoff_seconds * 2 ** (failures - 1)) if failures else 0.0
                time.sleep(pause)
                try:
                    response = _open(url, before, stall_seconds)
                except (OSError, http.client.HTTPException) as error:
                    reason = _reason(error)
            if response is not None:
                reason = _append(url, response, part, size, bar, remedy) or reason
                response = None
            failures = 0 if _offset(part) > before else failures + 1
            if failures >= attempts:
                raise UserError(
                    f"the download of {url} broke off at {_offset(part):,} of {size:,} bytes "
                    f"({reason}); run the same command to continue it, or {remedy}"
                )


def _append(url, response, part, size, bar, remedy) -> str:
    """Copies a response to `part`; returns why it ended early, or ""."""
    with response:
        resumed = response.status == 206
        start = _offset(part) if resumed else 0
        total = _total(response, start)
        if total is not None and total != size:
            raise UserError(
                f"{url} has another size than expected ({total:,} bytes, not {size:,}): it is not "
                f"the file; {remedy}"
            )
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise UserError(f"{url} answers another part than asked for; {remedy}")
        # A server that knows no ranges sends the file from its start.
        with open(part, "ab" if resumed else "wb") as file:
            bar.n = start
            while start < size:
                try:
                    block = response.read1(min(_BLOCK, size - start))
                except (OSError, http.client.HTTPException) as error:
                    return _reason(error)
                if not block:
                    return "the connection closed early"
                file.write(block)
                start += len(block)
                bar.update(len(block))
    return ""


def _total(response, start: int) -> int | None:
    """Returns the whole file's length as the server gives it, None where it does not."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status == 206 and total.isdigit():
        return int(total)
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _remote_size(url: str, seconds: float, remedy: str) -> int:
    with _probe(url, 0, seconds) as response:
        size = _total(response, 0)
    if size is None:
        raise UserError(f"{url} does not say how large the file is; {remedy}")
    return size


def _open(url: str, start: int, seconds: float):
    headers = {"User-Agent": "cifar_jax", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds)


def _probe(url: str, start: int, seconds: float):
    """Opens `url`, waiting `seconds` in all; a name look-up alone may take minutes otherwise."""
    answer: dict = {}

    def connect():
        try:
            answer["response"] = _open(url, start, seconds)
        except Exception as error:
            answer["error"] = error

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if "response" in answer:
        return answer["response"]
    error = answer.get("error")
    raise Unreachable(f"{url}: {_reason(error) if error else f'no answer in {seconds:g} s'}")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"HTTP status {error.code}"
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _offset(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def matches(path: Path, sha256: str) -> bool:
    """Returns whether the file's SHA-256 digest begins with the hexadecimal `sha256`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256)
