"""Classifies image files: `python -m cifar_jax.predict runs/dropout-seed42 photo.jpg`.

Images may have any size and format Pillow reads: the middle square is cut out and resized.
"""

from __future__ import annotations

import glob
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_jax import cli
from cifar_jax.errors import UserError, run_command
from cifar_jax.streams import json_text


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.predict", description=__doc__)
    parser.add_argument("run", help="a run directory, its checkpoints, or one checkpoint")
    parser.add_argument("images", nargs="+", help="image files, folders, or quoted globs")
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--top-k", type=cli.positive, default=3, help="classes to show an image")
    parser.add_argument("--batch-size", type=cli.positive, default=256, help="images in a batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    cli.add_device_options(parser)
    return parser


def find_images(names: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders (searched to any depth) and globs name.

    Raises:
      UserError: a name that matches nothing, or a folder without images.
    """
    found: list[Path] = []
    for name in names:
        try:
            found += _matches(name)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise UserError(f"cannot look for the image {name}: {error.strerror}") from None
    return found


def _matches(name: str) -> list[Path]:
    from PIL import Image

    path = Path(name).expanduser()
    if path.is_dir():
        # Not every format that Pillow writes (PDF) can it read.
        endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if not inside:
            raise UserError(f"no images in the folder {name}")
        return inside
    if path.exists():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not any(match.is_file() for match in matches):
        raise UserError(f"no such image: {name}")
    return [match for match in matches if match.is_file()]


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """Returns the middle square of an image file as uint8 [height, width, 3] (RGB).

    The camera's orientation is applied; transparent parts become white; 16 bits become 8.

    Raises:
      UserError: no image, a damaged one, or pixels of no known range.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            image = _eight_bits(ImageOps.exif_transpose(opened))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UserError(f"cannot read the image {path}: {error or type(error).__name__}") from None


def _eight_bits(image):
    """Scales 16-bit grey to 8 bits, where Pillow's own conversion would cut it off at 255."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray((values // 256).astype(np.uint8))


def main(arguments: Sequence[str] | None = None, say=print) -> list[dict]:
    """Parses, classifies, prints. Returns a result for each image. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax import inference

    paths = find_images(options.images)
    cli.start_device(options)
    trained = inference.load(
        options.run, cli.checkpoint_name(options.checkpoint), lowering=options.conv
    )
    for line in trained.notices:
        print(f"warning: {line}", file=sys.stderr)
    height, width = trained.config.dataset["image_shape"][:2]
    size = min(options.batch_size, len(paths))
    _, predict = inference.programs(trained, options.devices, size)
    names, results = trained.class_names, []
    for start in range(0, len(paths), size):
        chosen = paths[start : start + size]
        batch = np.zeros((1, size, height, width, 3), np.uint8)
        for i, path in enumerate(chosen):
            batch[0, i] = read_image(path, height, width)
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
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
