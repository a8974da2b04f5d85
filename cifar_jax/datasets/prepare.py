"""Makes a prepared tfds directory where there is none."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from cifar_jax.datasets import BUILT_IN, locate
from cifar_jax.datasets.archives import ARCHIVES, Arrays, read_archive
from cifar_jax.datasets.cache import waiting
from cifar_jax.runtime.download import Unreachable
from cifar_jax.runtime.download import download as fetch
from cifar_jax.runtime.errors import UserError, lookup, notice
from cifar_jax.runtime.files import expanded, lock, make_folder


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    archive: str | os.PathLike | None = None,
    download: bool = True,
    url: str | None = None,
    progress: bool = True,
) -> Path:
    """Returns the directory of `name`, written in ArrayRecord format where it was absent.

    Args:
      name: `cifar10`, `cifar100` or `shapes10`.
      data_dir: the tfds data directory to write into; by default `$TFDS_DATA_DIR` if writable,
        then `~/tensorflow_datasets`.
      archive: see `archives.read_archive`.
      download: whether the archive may be downloaded (to `<data_dir>/downloads`).
      url: another address of the same archive.
      progress: whether to show progress.

    Raises:
      UserError: no data to be had, a damaged archive, no space, or a directory not writable.
    """
    lookup(dict.fromkeys(BUILT_IN), name, "data set")
    root = locate.prepare_dir(locate.search_dirs(data_dir))
    if archive is not None and name not in ARCHIVES:
        raise UserError(f"{name} is drawn, not read: leave --archive out")
    try:
        make_folder(root)
        with lock(root / f".{name}.lock", waiting=functools.partial(waiting, root)):
            existing = locate.find_prepared(name, [root])
            if existing is not None:
                return existing
            arrays = None
            if name in ARCHIVES:
                path = _archive(name, root, archive, download, url, progress)
                arrays = read_archive(path, ARCHIVES[name])
            return _write(name, root, arrays, progress)
    except (OSError, RuntimeError) as error:  # the ArrayRecord writer raises RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot prepare {name} in {root}: {reason}; free some space or use another --data-dir"
        ) from error


def _archive(name, root, archive, may_download, url, progress) -> Path:
    """Returns a local archive of the set."""
    if archive is not None:
        return Path(expanded(archive))
    spec = ARCHIVES[name]
    remedy = (
        f"give the archive with --archive ({spec.url.rsplit('/', 1)[1]}, its -python form or the "
        "extracted folder), a prepared set with --data-dir, or train on drawn images with "
        "--dataset shapes10"
    )
    if not may_download:
        raise UserError(f"{name} is not prepared and must not be downloaded: {remedy}")
    url = url or spec.url
    if progress:
        notice(f"downloading {spec.title} from {url}, {spec.size / 1e6:.0f} MB")
    try:
        return fetch(
            url,
            root / "downloads" / spec.url.rsplit("/", 1)[1],
            size=spec.size,
            sha256=spec.sha256,
            remedy="use --archive or another --data-dir",
            progress=progress,
        )
    except Unreachable as error:
        raise UserError(
            f"{name} is not prepared and cannot be downloaded ({error}): {remedy}"
        ) from error


def _write(name: str, root: Path, arrays: Arrays | None, progress: bool) -> Path:
    import tensorflow_datasets as tfds

    from cifar_jax.datasets.builders import BUILDERS

    # Written by a run that was killed; the lock is ours, so nobody is at work on them.
    for stale in (root / name).glob("incomplete.*"):
        shutil.rmtree(stale, ignore_errors=True)
    if progress:
        notice(f"preparing {name} in {root / name}")
    # tfds draws its bars wherever stderr goes, a log file too.
    if progress and sys.stderr.isatty():
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    builder = BUILDERS[name](arrays=arrays, data_dir=str(root), file_format="array_record")
    # tfds prints on stdout that it downloads, which it does not, and makes download folders.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as unused:
        builder.download_and_prepare(download_dir=unused)
    return Path(builder.data_dir)
