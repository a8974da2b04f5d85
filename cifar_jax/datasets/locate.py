"""Finds prepared tfds directories and says what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.runtime.errors import UserError, notice
from cifar_jax.runtime.files import absolute

_NAME = re.compile(
    r"(?P<name>[a-z][a-z0-9_]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """What a prepared directory declares.

    Attributes:
      directory: `<data_dir>/<name>[/<config>]/<version>`.
      file_format: `array_record` or `tfrecord`.
      counts: images in each split.
      keys: the features named `image`, `label` and, or None, `id`.
      class_names: one for each label value.
      encoding: `png`, `jpeg` or "" where the set does not fix it.
    """

    directory: Path
    name: str
    version: str
    file_format: str
    counts: dict[str, int]
    keys: dict[str, str | None]
    class_names: tuple[str, ...]
    encoding: str


def search_dirs(data_dir: str | os.PathLike | None) -> list[Path]:
    """Returns where prepared sets are looked for: in `data_dir` alone where one is given, else in
    TFDS_DATA_DIR and the user's own.

    Raises:
      UserError: one of them is remote, or there is none: no home directory is known.
    """
    if data_dir is not None:
        return [absolute(data_dir)]
    named = os.environ.get("TFDS_DATA_DIR")
    try:
        own = [absolute("~/tensorflow_datasets")]
    except UserError:
        if not named:
            raise
        own = []
    return list(dict.fromkeys([*([absolute(named)] if named else []), *own]))


def writable(directory: Path) -> bool:
    """Whether files can be made in `directory`, or in its nearest parent that exists.

    A directory with every write bit off is taken as read-only, for root too.
    """
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return (
        directory.is_dir()
        and bool(directory.stat().st_mode & 0o222)
        and os.access(directory, os.W_OK | os.X_OK)
    )


def prepare_dir(dirs: list[Path]) -> Path:
    """Returns where a new set is prepared: the first of `dirs` that is writable.

    Raises:
      UserError: each of them is a file or not writable.
    """
    for path in dirs:
        if writable(path):
            return path
    raise UserError(
        f"cannot write a data set in {', '.join(map(str, dirs))}; "
        "name a writable folder with --data-dir"
    )


def valid_name(name: str) -> bool:
    """Whether `name` reads as a tfds name: `name`, `name/config`, with or without `:1.2.3`."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def find_prepared(name: str, dirs: list[Path]) -> Path | None:
    """Returns the newest prepared version of `name` in the first of `dirs` that has one.

    A directory in ArrayRecord format is preferred to one that only TensorFlow reads.

    Raises:
      UserError: the set has several configurations and `name` picks none.
    """
    match = _NAME.fullmatch(name)
    found = []
    for base in dirs:
        itself = _itself(base, match)
        if itself is not None:
            notice(f"{base} is {match['name']} itself, no folder of sets: using {itself}")
            found.append(itself)
            continue
        root = base / match["name"]
        if match["config"]:
            root = root / match["config"]
        versions = _versions(root, match["version"])
        if not versions and not match["config"]:
            configs = [path for path in _folders(root) if _versions(path, match["version"])]
            if len(configs) > 1:
                names = ", ".join(f"{name}/{path.name}" for path in configs)
                raise UserError(f"{name} has several configurations in {root}: pick one of {names}")
            versions = _versions(configs[0], match["version"]) if configs else []
        if versions:
            found.append(versions[-1])
    found.sort(key=lambda path: file_format_of(path) != "array_record")
    return found[0] if found else None


def _itself(folder: Path, match: re.Match) -> Path | None:
    """Returns the prepared set where `folder` is one, or holds its versions.

    Raises:
      UserError: it is another one.
    """
    is_set, held = (folder / "dataset_info.json").exists(), []
    wanted = [match["name"], match["config"], match["version"]]
    for path in [folder] if is_set else reversed(_versions(folder, None)):
        held = [_info(path).get(key) for key in ("name", "configName", "version")]
        if all(want in (None, have) for want, have in zip(wanted, held, strict=True)):
            return path
    if held:
        raise UserError(f"{folder} holds {' '.join(filter(None, held))}, not {match[0]}")
    return None


def list_prepared(dirs: list[Path]) -> Iterator[Path]:
    """Yields the directory of every prepared version of every set in `dirs`."""
    for base in dirs:
        for root in _folders(base):
            yield from _versions(root, None)
            for config in _folders(root):
                if not _VERSION.fullmatch(config.name):
                    yield from _versions(config, None)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


def _versions(root: Path, version: str | None) -> list[Path]:
    """Returns the complete version folders in `root`, oldest first."""
    found = [
        path
        for path in _folders(root)
        if _VERSION.fullmatch(path.name)
        and (version is None or path.name == version)
        and (path / "dataset_info.json").exists()
    ]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def file_format_of(directory: Path) -> str:
    """Returns the file format a prepared directory declares (`tfrecord` when it does not say)."""
    return _info(directory).get("fileFormat") or "tfrecord"


def split_names(directory: Path) -> list[str]:
    """Returns the splits that a prepared directory declares."""
    return [split["name"] for split in _info(directory).get("splits", [])]


def _info(directory: Path) -> dict:
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
        return dict(info)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot read {directory / 'dataset_info.json'} ({error}); "
            "delete that folder and prepare the set again"
        ) from None


def set_key(directory: Path) -> str:
    """Returns a digest that changes when the prepared set does, in milliseconds.

    It covers the metadata's content and each file's name, size and modification time.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            if path.suffix in (".json", ".txt"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def inspect(directory: Path) -> PreparedSet:
    """Reads a prepared directory's metadata through tensorflow-datasets (imports it, 0.5 s).

    Raises:
      UserError: the metadata is broken, the format needs a TensorFlow that is not installed,
        or the features are not one image with one class label.
    """
    file_format = file_format_of(directory)
    if file_format != "array_record" and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{directory} is in {file_format} format, which only TensorFlow reads: pip install "
            "tensorflow, or use another --data-dir, where cifar_jax prepares it as ArrayRecord "
            "(with tfds itself: file_format='array_record')"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        features, splits = dict(builder.info.features), builder.info.splits
        counts = {name: splits[name].num_examples for name in splits}
    except Exception as error:  # protobuf, JSON and tfds each raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read the description of the set in {directory} ({reason}); "
            "delete that folder and prepare the set again"
        ) from error
    supervised = builder.info.supervised_keys
    image = _feature(supervised, 0, features, tfds.features.Image)
    label = _feature(supervised, 1, features, tfds.features.ClassLabel)
    if image is None or label is None:
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in features.items())
        raise UserError(
            f"{builder.info.full_name} is not a classification set of one image and one class "
            f"label (its features are {kinds})"
        )
    names = features[label].names or map(str, range(features[label].num_classes))
    identity = "id" if isinstance(features.get("id"), tfds.features.Text) else None
    return PreparedSet(
        directory=directory,
        name="/".join(filter(None, (builder.name, builder.info.config_name))),
        version=str(builder.info.version),
        file_format=file_format,
        counts=counts,
        keys={"image": image, "label": label, "id": identity},
        class_names=tuple(names),
        encoding=features[image].encoding_format or "",
    )


def _feature(supervised, position, features, kind) -> str | None:
    """Returns the feature of `kind` that the set names as its input or target, or its only one."""
    named = supervised[position] if supervised and len(supervised) == 2 else None
    if isinstance(named, str) and isinstance(features.get(named), kind):
        return named
    found = [key for key, value in features.items() if isinstance(value, kind)]
    return found[0] if len(found) == 1 else None
