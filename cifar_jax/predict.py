"""Classifies image files: `python -m cifar_jax.predict runs/dropout-seed42 photo.jpg`.

Images may have any size and format Pillow reads: the middle square is cut out and resized.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from cifar_jax import _cli as cli
from cifar_jax.datasets.image_files import read_image
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.runtime.streams import json_text


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.predict", description=__doc__)
    parser.add_argument(
        "run", type=cli.path, help="a run directory, its checkpoints, or one checkpoint"
    )
    parser.add_argument(
        "images", type=cli.path, nargs="+", help="image files, folders, or quoted globs"
    )
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--top-k", type=cli.positive, default=3, help="classes to show an image")
    parser.add_argument("--batch-size", type=cli.positive, default=256, help="images in a batch")
    cli.add_tta(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    cli.add_device_options(parser)
    cli.add_trust_option(parser)
    return parser


def find_images(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Returns the files that paths, folders (searched to any depth, through links too) and globs
    name, hidden ones only by themselves; and a line for each name that gives nothing, and each
    folder that cannot be entered."""
    found: list[Path] = []
    bad: list[str] = []
    for name in names:
        try:
            found += _matches(name, bad)
        except UserError as error:
            bad.append(str(error))
        except OSError as error:  # a name too long, a folder that may not be entered
            bad.append(f"cannot look for the image {name}: {error.strerror}")
    return found, bad


def _matches(name: str, bad: list[str]) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        inside = _images_in(path, bad)
        if not inside:
            raise UserError(f"no images in the folder {name}")
        return inside
    if path.exists():
        return [path]
    folder = next(parent for parent in path.parents if parent.is_dir())  # [ is itself in its name
    matches = _expand(str(folder), path.relative_to(folder).parts, bad)
    matches = [Path(match) for match in sorted(set(matches)) if os.path.isfile(match)]
    if not matches:
        raise UserError(f"no such image: {name}")
    return matches


def _expand(folder: str, parts: Sequence[str], bad: list[str]) -> list[str]:
    """Returns what the parts of a glob match in a folder. Python's own `**` would follow links in
    circles."""
    if "**" not in parts:
        return glob.glob(os.path.join(glob.escape(folder), *parts))
    at = parts.index("**")
    rest = parts[at + 1 :] or ["*"]
    starts = _expand(folder, parts[:at], bad) if at else [folder]
    places = [place for start in starts for place, _ in _walk(start, bad)]
    return [match for place in places for match in _expand(place, rest, bad)]


def _images_in(folder: Path, bad: list[str]) -> list[Path]:
    from PIL import Image

    # Not every format that Pillow writes (PDF) can it read.
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = [Path(place, name) for place, names in _walk(folder, bad) for name in names]
    return sorted(path for path in paths if path.suffix.lower() in endings and path.is_file())


def _walk(folder: str | Path, bad: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder and its files, but nothing hidden; what links lead to again, once."""

    def refused(error: OSError) -> None:
        bad.append(f"cannot look for images in {error.filename}: {error.strerror}")

    searched = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refused):
        real = os.path.realpath(place)
        if real in searched:
            folders.clear()
            continue
        searched.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))
        yield place, [name for name in files if not name.startswith(".")]


def main(arguments: Sequence[str] | None = None, say=print) -> list[dict]:
    """Parses, classifies, prints. Returns a result for each image.

    Raises:
      UserError: an image could not be found or read; the others have been classified.
    """
    options = make_parser().parse(arguments)
    from cifar_jax.training import evaluation

    paths, bad = find_images(options.images)
    if not paths:
        _refuse(bad)
    cli.start_device(options)
    trained = evaluation.load(
        options.run,
        cli.checkpoint_name(options.checkpoint),
        lowering=options.conv,
        trust_code=options.trust_code,
    )
    for line in trained.notices:
        print(f"warning: {line}", file=sys.stderr)
    height, width = trained.config.dataset["image_shape"][:2]
    size = min(options.batch_size, len(paths))
    _, predict = evaluation.programs(trained, options.devices, size, options.tta)
    names, results = trained.class_names, []
    for start in range(0, len(paths), size):
        chosen = []
        batch = np.zeros((1, size, height, width, 3), np.uint8)
        for path in paths[start : start + size]:
            try:
                batch[0, len(chosen)] = read_image(path, height, width)
            except UserError as error:
                bad.append(str(error))
            else:
                chosen.append(path)
        if not chosen:
            continue
        logits = np.asarray(predict(trained.variables, batch), np.float64)[0, : len(chosen)]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        for path, share in zip(chosen, shares, strict=True):
            top = np.argsort(-share, kind="stable")[: options.top_k]
            classes = [{"class": names[k], "probability": float(share[k])} for k in top]
            results.append({"image": str(path), "predictions": classes})
            if options.json:
                say(json_text(results[-1]))
            else:
                shown = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in classes)
                say(f"{path}: {shown}")
    if bad:
        _refuse(bad)
    return results


def _refuse(bad: Sequence[str]) -> NoReturn:
    """Says what could not be used, at the end, where it is seen. Raises `UserError`."""
    for line in bad[:-1]:
        print(f"warning: {line}", file=sys.stderr)
    more = f"; {len(bad)} in all could not be read" if len(bad) > 1 else ""
    raise UserError(f"{bad[-1]}{more}")


if __name__ == "__main__":
    sys.exit(run_command(main))
