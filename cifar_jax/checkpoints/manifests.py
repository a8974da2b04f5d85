"""The folders of a checkpoints directory and their manifests: what is complete, intact, best.

Standard library only, so that asking a directory for its newest step costs milliseconds. The layout
is described in `cifar_jax/checkpoints/saving.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import absolute, replacing

MANIFEST = "checkpoint.json"
_FOLDER = re.compile(r"(\d+)(?:\.(\d+))?")

Entry = tuple[Path, dict[str, Any]]  # a folder and the body of its manifest
Broken = tuple[int, Path, str]  # step, folder, what is wrong


class Damaged(Exception):
    """This checkpoint cannot be used; the message says why in a few words."""


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


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


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


def _file_digest(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file's content."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Reads every file of a checkpoint; raises `Damaged` where one is not as it was written."""
    for name, expected in manifest["files"].items():
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


def scan(directory: str | os.PathLike) -> tuple[list[Entry], list[Broken]]:
    """Complete checkpoints and the others, newest first; of a step saved again, each save."""
    complete: list[Entry] = []
    broken: list[Broken] = []
    for step, _, folder in folders(directory):
        try:
            complete.append((folder, read(folder)))
        except Damaged as damage:
            broken.append((step, folder, str(damage)))
    return complete, broken


def _rank(manifest: dict[str, Any]) -> tuple[float, int] | None:
    """The lowest is best: by metric, then the earlier step; None without a finite metric."""
    metric = manifest["metric"]
    return None if metric is None or not math.isfinite(metric) else (metric, manifest["step"])


def best_first(complete: list[Entry]) -> list[Entry]:
    """Those with a finite metric, the best in front."""
    # Sorting is stable and `complete` is newest first: of one step saved twice, the later leads.
    return sorted((c for c in complete if _rank(c[1])), key=lambda c: _rank(c[1]))


def check_fit(directory: Path, manifest: dict[str, Any], here: dict[str, str]) -> None:
    """Raises UserError, listing what differs, unless the saved leaves are those wanted `here`."""
    saved = manifest["leaves"]
    lines = [
        f"{name} is {saved.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError(
            f"checkpoint {manifest['step']} in {directory} is of another model or optimizer: "
            f"{len(lines)} of {len(saved.keys() | here.keys())} entries differ: "
            f"{'; '.join(lines[:4])}{more}"
        )


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the complete checkpoints, ascending. Files' contents are not verified here."""
    return sorted({manifest["step"] for _, manifest in scan(directory)[0]})


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest complete step, or None. Cheap; `restore` may still find it damaged."""
    return max(steps(directory), default=None)


def best_step(directory: str | os.PathLike) -> int | None:
    """The step of the lowest finite metric (the earliest of equals), or None."""
    best = best_first(scan(directory)[0])
    return best[0][1]["step"] if best else None


def candidates(directory: Path, which: str | int) -> tuple[list[Entry], list[Broken]]:
    """Complete checkpoints to try for `which`, in order, and the broken ones that might have been.

    Raises:
      UserError: `which` is not "latest", "best" or a step, or nothing in the directory answers it.
    """
    complete, broken = scan(directory)
    if not complete and not broken:
        raise UserError(f"no checkpoint in {directory}")
    if which == "latest":
        return complete, broken
    if which == "best":
        if complete and not best_first(complete):
            raise UserError(f"no checkpoint in {directory} has a metric yet; ask for the latest")
        return best_first(complete), broken
    if isinstance(which, bool) or not isinstance(which, int):
        raise UserError(f"checkpoint {which!r}: give latest, best or a step")
    chosen = [entry for entry in complete if entry[1]["step"] == which]
    broken = [entry for entry in broken if entry[0] == which]
    if not chosen and not broken:
        have = ", ".join(map(str, steps(directory))) or "none"
        raise UserError(f"no checkpoint of step {which} in {directory}; complete: {have}")
    return chosen, broken


def locate(path: str | os.PathLike, which: str | int = "latest") -> tuple[Path, str | int]:
    """Finds checkpoints from a run directory, a checkpoints directory or one step's folder.

    Returns:
      (directory, which) for `restore`; `which` becomes the step where `path` is a step's folder.

    Raises:
      UserError: there is no such path, or no checkpoint in it.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or a checkpoint in one")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a run directory or a checkpoint in one")
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


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that a kill half-way leaves no manifest over missing files."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
    except OSError:
        return  # not ours to delete: then it stays whole
    shutil.rmtree(folder, ignore_errors=True)


def prune(directory: Path, keep_latest: int, damaged: set[Path]) -> None:
    """Keeps the newest `keep_latest` steps and the best; `damaged` folders count as neither."""
    complete, broken = scan(directory)
    usable = [entry for entry in complete if entry[0] not in damaged]
    newest: dict[int, Path] = {}
    for folder, manifest in usable:
        newest.setdefault(manifest["step"], folder)
    keep = set(list(newest.values())[:keep_latest])
    keep.update(folder for folder, _ in best_first(usable)[:1])
    for folder in [folder for folder, _ in complete] + [folder for _, folder, _ in broken]:
        if folder not in keep:
            remove(folder)
