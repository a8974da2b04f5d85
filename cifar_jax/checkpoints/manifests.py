"""What is on disk: a checkpoints directory, its folders, manifests and digests.

One folder is one save of a step (`<step>`, or `<step>.<n>` when a step was saved again):

    1200/state/           the arrays, an ordinary Orbax (OCDBT) PyTree checkpoint
    1200/checkpoint.json  the manifest: step, metric, `extra`, every leaf's dtype and shape, and the
                          size and CRC-32 of every file under state/; itself under a CRC-32

The manifest is renamed into place last and unlinked first, so a folder with one is complete and a
folder without one is nothing. Standard library only, so that asking for the newest step costs
milliseconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import absolute, replacing

MANIFEST = "checkpoint.json"
_FOLDER = re.compile(r"(\d+)(?:\.(\d+))?")


class Damaged(Exception):
    """This checkpoint cannot be used; the message says why in a few words."""


class Save(NamedTuple):
    """A folder and the body of its manifest, None if it has no good one. Files' contents are
    another matter, for `verify`."""

    step: int
    folder: Path
    body: dict[str, Any] | None


def folders(directory: str | os.PathLike) -> list[tuple[int, int, Path]]:
    """(step, n, folder) of every checkpoint folder, complete or not, newest first."""
    try:
        found = [(_FOLDER.fullmatch(entry.name), entry) for entry in os.scandir(directory)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read checkpoints in {directory}: {error.strerror}") from error
    return sorted(
        ((int(m[1]), int(m[2] or 0), Path(e.path)) for m, e in found if m and e.is_dir()),
        reverse=True,
    )


def scan(directory: str | os.PathLike) -> list[Save]:
    """Every save, newest first."""
    found = []
    for step, _, folder in folders(directory):
        try:
            body = read(folder)
            found.append(Save(body["step"], folder, body))
        except Damaged:
            found.append(Save(step, folder, None))
    return found


def any_committed(directory: str | os.PathLike) -> bool:
    """Whether a save was ever completed here that is still there, damaged perhaps."""
    return any((folder / MANIFEST).exists() for _, _, folder in folders(directory))


# One folder


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _file_digest(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file's content."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def write(folder: Path, body: dict[str, Any]) -> None:
    """Commits a checkpoint: digests the files under `state/`, then renames the manifest in."""
    paths = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _file_digest(path) for path in paths}
    body = {"format": 1, **body, "files": files}
    with replacing(folder / MANIFEST) as part:
        part.write_text(json.dumps({"crc32": _checksum(body), "body": body}))


def read(folder: Path) -> dict[str, Any]:
    """The manifest's body. Raises `Damaged`, or UserError where a newer version wrote it."""
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        body = document["body"]
        intact = document["crc32"] == _checksum(body)
    except FileNotFoundError:
        raise Damaged("incomplete (it was being written or deleted)") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(f"{MANIFEST} is damaged")
    if body["format"] != 1:
        raise UserError(f"{folder} was written by a newer version of cifar_jax; update to read it")
    return body


def verify(folder: Path, body: dict[str, Any]) -> None:
    """Reads every file of a checkpoint; raises `Damaged` where one is not as it was written."""
    for name, expected in body["files"].items():
        try:
            found = _file_digest(folder / name)
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if found[0] != expected[0]:
            raise Damaged(f"{name} has {found[0]} bytes instead of {expected[0]}")
        if found != expected:
            raise Damaged(f"{name} is damaged (checksum mismatch)")


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that a kill half-way leaves no manifest over missing files."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
    except OSError:
        return  # not ours to delete: then it stays whole
    shutil.rmtree(folder, ignore_errors=True)


# Which are there, which are kept, which to read


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the complete checkpoints, ascending. Files' contents are not verified here."""
    return sorted({save.step for save in scan(directory) if save.body})


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest complete step, or None. Cheap; `restore` may still find it damaged."""
    return max(steps(directory), default=None)


def best_step(directory: str | os.PathLike) -> int | None:
    """The step of the lowest finite metric (the earliest of equals), or None."""
    return next((save.step for save in _best_first(scan(directory))), None)


def _best_first(found: list[Save]) -> list[Save]:
    """Those with a finite metric, the lowest in front, of equals the earliest step."""
    measured = [s for s in found if s.body and s.body["metric"] is not None]
    finite = [s for s in measured if math.isfinite(s.body["metric"])]
    # Of a step saved twice the later leads: sorting is stable.
    return sorted(finite, key=lambda s: (s.body["metric"], s.step))


def prune(directory: Path, keep_latest: int, bad: set[Path]) -> None:
    """Keeps the newest `keep_latest` steps and the best; `bad` folders count as neither."""
    found = scan(directory)
    usable = [save for save in found if save.body and save.folder not in bad]
    newest = list({save.step: save.folder for save in reversed(usable)}.values())
    keep = {*newest[-keep_latest:], *(save.folder for save in _best_first(usable)[:1])}
    for save in found:
        if save.folder not in keep:
            remove(save.folder)


def candidates(directory: Path, which: str | int) -> list[Path]:
    """The folders to try for `which`, in that order: those without a good manifest as well, which
    might have been it.

    Raises:
      UserError: `which` is not "latest", "best" or a step, or nothing in the directory answers it.
    """
    found = scan(directory)
    if not found:
        raise UserError(f"no checkpoint in {directory}")
    if which == "latest":
        return [save.folder for save in found]
    if which == "best":
        best = _best_first(found)
        if not best and any(save.body for save in found):
            raise UserError(f"no checkpoint in {directory} has a metric yet; ask for the latest")
        return [save.folder for save in found if not save.body] + [save.folder for save in best]
    if isinstance(which, bool) or not isinstance(which, int):
        raise UserError(f"checkpoint {which!r}: give latest, best or a step")
    chosen = [save.folder for save in found if save.step == which]
    if not chosen:
        have = ", ".join(map(str, steps(directory))) or "none"
        raise UserError(f"no checkpoint of step {which} in {directory}; complete: {have}")
    return chosen


def locate(path: str | os.PathLike, which: str | int = "latest") -> tuple[Path, str | int]:
    """Finds checkpoints from a run directory, a checkpoints directory or one step's folder.

    Returns:
      (directory, which) for `restore`; `which` becomes the step where `path` is a step's folder.

    Raises:
      UserError: there is no such path, or no checkpoint in it.
    """
    path = absolute(path)
    if not path.is_dir():
        wrong = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {wrong}; give a run directory or a checkpoint in one")
    match = _FOLDER.fullmatch(path.name)
    if match and ((path / MANIFEST).exists() or (path / "state").is_dir()):
        return path.parent, int(match[1])
    for directory in (path / "checkpoints", path):
        if folders(directory):
            return directory, which
    members = sorted(entry.name for entry in path.glob("seed-*"))
    if members:
        raise UserError(f"{path} holds {len(members)} runs; name one, as {path / members[0]}")
    raise UserError(f"no checkpoint in {path}; give a run directory, or train one first")
