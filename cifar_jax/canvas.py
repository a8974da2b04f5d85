"""What every picture is drawn on: style, colours, files, and images in a grid.

Figures are built on matplotlib's object interface: no pyplot state, no display. Colours are
from the palette of Okabe and Ito (2008), made for colour-blind readers too, but for the green
and red of right and wrong, which are told apart by a mark as well.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.runtime.errors import UserError, one_line

BLUE, ORANGE, GREEN, RED = "#0072B2", "#D55E00", "#007A55", "#C8200E"
INK, QUIET, FAINT = "#222222", "#6B6B6B", "#DDDDDD"
SERIES = (BLUE, ORANGE, GREEN, RED, INK, QUIET)  # of lines and points, in order

GRID_COLUMNS = 10
_DPI = 120

_STYLE = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib, and has the marks used below
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "standard",
}


def load_matplotlib() -> None:
    """Imports it, also where `MPLBACKEND` names what is not installed here, as in a command that a
    notebook starts: files need no display, and the name is for the caller's own figures."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        if backend:
            matplotlib.rcParams["backend"] = backend


def attempt(pictures: Mapping[Path, Callable[[Path], Any]], say: Callable[[str], None]) -> list:
    """Draws pictures, without which a result is a result: those that fail cost one line of warning
    for each reason.

    Args:
      pictures: {path: function that draws it there}.

    Returns:
      What the functions that did not fail returned.
    """
    drawn, missing = [], {}
    for path, draw in pictures.items():
        try:
            drawn.append(draw(path))
        except Exception as error:  # matplotlib raises nearly anything
            reason = getattr(error.__cause__, "strerror", None) or one_line(error)
            missing.setdefault(reason, []).append(str(path))
    for reason, paths in missing.items():
        say(f"warning: not drawn: {', '.join(paths)}: {reason}")
    return drawn


@contextlib.contextmanager
def drawing(path: str | Path, width: float, height: float, *, palette: int = 0) -> Iterator:
    """Yields a figure of that size in inches; writes it to `path` when the block ends.

    A `palette` of so many colours makes the files of drawings without photographs far smaller.
    """
    load_matplotlib()
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        canvas = FigureCanvasAgg(figure)
        yield figure
        with warnings.catch_warnings():
            # Class names in scripts that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        if palette:
            picture = picture.quantize(palette, dither=Image.Dither.NONE)
        save(picture, path)


def save(picture, path: str | Path) -> None:
    """Writes a Pillow image as a PNG. Raises `UserError` where the path cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error


def short(name: str, most: int) -> str:
    """Cuts the middle out of a long name: its end may be what tells it from the next."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return name[: most - 1 - tail].rstrip() + "\u2026" + name[len(name) - tail :].lstrip()


def grid(
    images: np.ndarray,
    titles: Sequence[str],
    colors: Sequence[str],
    heading: str,
    path: str | Path,
) -> str | Path:
    """Draws the images, ten in a row, each under its title (of one or two lines)."""
    count = len(images)
    if count == 0:
        raise UserError(f"no images to draw in {path}")
    columns = min(GRID_COLUMNS, count)
    rows = math.ceil(count / columns)
    lines = max(title.count("\n") + 1 for title in titles)
    side, gap, above, head = 1.2, 0.1, 0.05 + 0.14 * lines, 0.3  # inches
    # A narrow grid still leaves room for its heading.
    width = max(columns * (side + gap) + gap, 4.5)
    height = head + rows * (above + side + gap)
    with drawing(path, width, height) as figure:
        # Placed by hand on one axis, in inches: laying out and measuring 20 axes takes longer than
        # drawing them.
        figure.set_layout_engine("none")
        figure.text(gap / width, 1 - 0.08 / height, heading, fontsize=11, va="top")
        axis = figure.add_axes((0, 0, 1, 1), frameon=False)
        axis.set_axis_off()
        for k, (image, title, color) in enumerate(zip(images, titles, colors, strict=True)):
            row, column = divmod(k, columns)
            left, low = gap + column * (side + gap), height - head - (row + 1) * (above + side)
            low -= row * gap
            place = (left, left + side, low, low + side)
            axis.imshow(image, extent=place, interpolation="nearest", aspect="auto")
            middle, top = left + side / 2, low + side + 3 / 72
            axis.text(middle, top, title, color=color, fontsize=8.5, ha="center", va="bottom")
        axis.set(xlim=(0, width), ylim=(0, height))
    return path
