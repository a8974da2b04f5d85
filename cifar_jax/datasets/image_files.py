"""Image files of any size and format that Pillow reads, as the square arrays a network reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from cifar_jax.datasets.decode import open_image
from cifar_jax.runtime.errors import UserError


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """Returns the middle square of an image file as uint8 [height, width, 3] (RGB).

    The camera's orientation is applied; transparent parts become white; 16 bits become 8.

    Raises:
      UserError: no image, a damaged one, or pixels of no known range.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, and of what is broken beside the pixels
            opened = open_image(path.read_bytes())
            image = _eight_bits(_upright(opened), opened.format)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UserError(f"cannot read the image {path}: {error or type(error).__name__}") from None


def _upright(image):
    """Turns an image as its EXIF says, where that can be read; nothing else in there counts."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(0x0112))
    except Exception:  # damage makes Pillow raise nearly anything
        turn = None
    return image if turn is None else image.transpose(turn)


# What Pillow opens as 32-bit integers (mode I) although it has 16 bits.
_SIXTEEN_BITS = ("PNG", "PPM")


def _eight_bits(image, kind: str):
    """Scales 16-bit grey to 8 bits, where Pillow's own conversion would cut it off at 255.

    Args:
      kind: Pillow's name of the file's format.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and kind not in _SIXTEEN_BITS):
        numbers = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {numbers} of no known range; save it with 8 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    return Image.fromarray((values // 256).astype(np.uint8))
