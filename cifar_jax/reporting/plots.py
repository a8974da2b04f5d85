"""Pictures of a run: arrays and a path in, a PNG on disk out, the path returned."""

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

GRID_IMAGES = 20


def training_grid(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    heading: str = "Training images",
) -> str | Path:
    """Draws the first 20 images in a 2x10 grid, each titled with its class.

    Args:
      images: uint8 [N, H, W, 3], N at least 1; fewer than 20 make a smaller grid.
      labels: int [N].
      class_names: one a class, in label order.
      path: where the PNG goes; its folder is made if need be.

    Returns:
      `path`, as every function here does.

    Raises:
      UserError: no images, or the file cannot be written.
    """
    images, labels = images[:GRID_IMAGES], labels[:GRID_IMAGES]
    titles = [short(class_names[label], 16) for label in labels]
    return grid(images, titles, [INK] * len(titles), heading, path)


def _pair_titles(firsts: Sequence[str], seconds: Sequence[str]) -> list[str]:
    """Returns "first (second)" for each pair, in two lines where one of them would not fit."""
    joined = [f"{first} ({second})" for first, second in zip(firsts, seconds, strict=True)]
    if all(len(title) <= 18 for title in joined):
        return joined
    return [
        f"{short(first, 17)}\n({short(second, 15)})"
        for first, second in zip(firsts, seconds, strict=True)
    ]


def predictions(
    images: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    sure: np.ndarray | None = None,
    heading: str = "Test images",
) -> str | Path:
    """Draws the first 20 images titled "predicted (true)", green if right and red if wrong.

    Args:
      images: uint8 [N, H, W, 3], N at least 1.
      true, predicted: int [N].
      class_names: one a class, in label order.
      path: where the PNG goes.
      sure: float [N], the probability of the class predicted, written beside it.
      heading: what images these are.
    """
    images, true, predicted = (x[:GRID_IMAGES] for x in (images, true, predicted))
    right = np.asarray(true) == np.asarray(predicted)
    marks = ["\u2713" if ok else "\u2717" for ok in right]
    names = [class_names[k] for k in predicted]
    if sure is not None:
        named = zip(names, sure[:GRID_IMAGES], strict=True)
        # Rounded down, as below; without digits, or long names would not fit.
        names = [f"{short(name, 10)} {math.floor(100 * p)} %" for name, p in named]
    titles = _pair_titles(
        [f"{mark} {name}" for mark, name in zip(marks, names, strict=True)],
        [class_names[k] for k in true],
    )
    colors = [GREEN if ok else RED for ok in right]
    heading = f"{heading}: predicted (true), {right.sum()} of {len(right)} right"
    return grid(images, titles, colors, heading, path)


def mistakes(
    images: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
) -> str | Path:
    """Draws the (at most 20) wrongly classified images the model was surest of.

    Args:
      images: uint8 [N, H, W, 3].
      true, predicted: int [N].
      probabilities: float [N, C] of each class, in [0, 1].
      class_names: C names.
      path: where the PNG goes. Without any mistake the picture says so.
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    sure = np.take_along_axis(np.asarray(probabilities), predicted[:, None], axis=1)[:, 0]
    wrong = np.flatnonzero(true != predicted)
    # A stable sort: equal probabilities keep the order of the data set.
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:GRID_IMAGES]
    if len(worst) == 0:
        with drawing(path, 6, 1) as figure:
            figure.text(0.5, 0.5, f"No mistakes in {len(true):,} images", ha="center", va="center")
        return path
    own = np.asarray(probabilities)[worst, true[worst]]
    titles = [
        f"#{i}\n{short(class_names[predicted[i]], 11)} {_percent(sure[i])}"
        f"\n({short(class_names[true[i]], 10)} {_percent(p)})"
        for i, p in zip(worst, own, strict=True)
    ]
    heading = (
        f"Most confident mistakes, of {len(wrong):,}: index, predicted, (true), probabilities"
        if len(worst) > 4
        else "Most confident mistakes"
    )
    return grid(images[worst], titles, [RED] * len(worst), heading, path)


def _percent(probability: float) -> str:
    # Rounded down, so that only certainty reads 100 %.
    return f"{math.floor(1000 * probability) / 10:.1f} %" if math.isfinite(probability) else "nan"


def channels(image: np.ndarray, path: str | Path, *, crop: int = 14) -> str | Path:
    """Draws the red, green and blue channels in grey, every pixel's value written in it.

    Args:
      image: float [H, W, 3], normalised as the model gets it. The three share one grey scale,
        black at the lowest value drawn and white at the highest.
      path: where the PNG goes.
      crop: side in pixels of the middle of the image, which alone is drawn: at 14 the numbers can
        be read where the picture is shown pixel for pixel on a screen.
    """
    # Drawn with Pillow: thousands of numbers take matplotlib many seconds.
    load_matplotlib()
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    image = np.asarray(image, dtype=np.float64)
    whole = image.shape[:2]
    (y0, y1), (x0, x1) = (_middle(side, crop) for side in whole)
    image = image[y0:y1, x0:x1]
    height, width, _ = image.shape
    low, high = float(np.nanmin(image)), float(np.nanmax(image))
    grey = np.nan_to_num((image - low) / max(high - low, 1e-12))
    face = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    large, medium, small = (ImageFont.truetype(str(face), size) for size in (20, 16, 12))
    cell, edge, top = 36, 20, 80  # pixels
    size = (3 * width * cell + 4 * edge, height * cell + top + edge)
    picture = Image.new("L", size, "white")
    draw = ImageDraw.Draw(picture)
    where = f"rows {y0} to {y1 - 1}, columns {x0} to {x1 - 1} of {whole[0]} x {whole[1]}"
    heading = f"One image by channel, {where}: normalised, black {low:.2f} to white {high:.2f}"
    for font in (large, medium, small):  # a small image has little room for it
        if draw.textlength(heading, font=font) < size[0] - 2 * edge:
            break
    draw.text((edge, edge), heading, fill=INK, font=font)
    drawn = {}  # value -> its square; a channel has at most 256 of them

    def square(value: float, shade: float):
        if value not in drawn:
            drawn[value] = Image.new("L", (cell, cell), round(255 * shade))
            # 0.46 is the grey on which black and white text have equal contrast.
            ink = "black" if shade > 0.46 else "white"
            text = f"{value:.2f}".replace("-0.00", "0.00")
            middle = (cell / 2, cell / 2)
            ImageDraw.Draw(drawn[value]).text(middle, text, fill=ink, font=small, anchor="mm")
        return drawn[value]

    for k, name in enumerate(("red", "green", "blue")):
        left = edge + k * (width * cell + edge)
        draw.text((left, top - 10), f"{name} channel", fill=INK, font=medium, anchor="ls")
        for (y, x), value in np.ndenumerate(image[..., k]):
            at = (left + cell * x, top + cell * y)
            picture.paste(square(value, grey[y, x, k]), at)
    # 64 levels of grey look the same and halve the file; black and white stay what they are.
    levels = (np.asarray(picture) * (63 / 255)).round() * (255 / 63)
    save(Image.fromarray(levels.round().astype(np.uint8)), path)
    return path


def _middle(side: int, crop: int) -> tuple[int, int]:
    first = max(0, (side - crop) // 2)
    return first, min(side, first + crop)


def _series(rows: Sequence[Mapping], name: str) -> np.ndarray:
    """Returns one value a row, nan where it is absent or was not finite (`null` in the JSON)."""
    values = [row.get(name) for row in rows]
    return np.array([math.nan if value is None else value for value in values], float)


def curves(
    rows: Sequence[Mapping], path: str | Path, *, heading: str = "", note: str = ""
) -> str | Path:
    """Draws training and validation loss and accuracy by epoch, the best epoch marked.

    Args:
      rows: rows of `metrics.jsonl` (`cifar_jax.reporting.metrics_log`). Rows of kind `epoch` make
        the curves; rows of kind `window`, where there are any, the faint line of the loss within
        epochs.
      path: where the PNG goes.
      heading: a line above the picture.
      note: a line below it.

    Raises:
      UserError: no row of kind `epoch`.
    """
    with drawing(path, 10, 4.2) as figure:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=QUIET)
        axes = figure.subplots(1, 2)
        for axis, what in zip(axes, ("loss", "accuracy"), strict=True):
            draw_curve(axis, rows, what)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return path


def draw_curve(axis, rows: Sequence[Mapping], what: str) -> None:
    """Draws the `loss` or the `accuracy` of training and validation by epoch on an axis of
    matplotlib; `rows` as in `curves`."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from cifar_jax.reporting.console import best_epoch

    epochs = [row for row in rows if row["kind"] == "epoch"]
    windows = [row for row in rows if row["kind"] == "window"]
    if not epochs:
        raise UserError("no epoch has ended yet: there are no curves to draw")
    best = best_epoch(epochs)
    when, title = _series(epochs, "epoch"), what.capitalize()
    if what == "loss" and windows:
        x = _series(windows, "step") / (epochs[0]["step"] / epochs[0]["epoch"])
        y = _series(windows, "loss")
        label = f"training, mean of {_window(windows)} steps"
        axis.plot(x, y, color=BLUE, alpha=0.45, lw=1, label=label)
    for name, color, mark in (("train", BLUE, "o"), ("validation", ORANGE, "s")):
        y = _series(epochs, f"{name}_{what}")
        if not np.isnan(y).all():
            label = "training, epoch mean" if name == "train" else name
            axis.plot(when, y, color=color, lw=1.8, marker=mark, ms=3.5, label=label)
    if best is not None and best.get(f"validation_{what}") is not None:
        y = best[f"validation_{what}"]
        shown = f"{y:.4f}" if what == "loss" else f"{100 * y:.2f} %"
        title += f": {shown} on validation at epoch {best['epoch']}"
        axis.axvline(best["epoch"], color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=0)
        label = "lowest validation loss"
        axis.plot([best["epoch"]], [y], "*", color=INK, ms=11, mec="white", label=label, zorder=5)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if what == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    axis.margins(x=0.03, y=0.08)


def _window(windows: Sequence[Mapping]) -> int:
    """Returns the steps of a window: the first one's end, in its epoch, which it starts with."""
    return int(windows[0]["step"])


# What every picture is drawn on: style, colours, files, and images in a grid.
#
# Figures are built on matplotlib's object interface: no pyplot state, no display. Colours are from
# the palette of Okabe and Ito (2008), made for colour-blind readers too, but for the green and red
# of right and wrong, which are told apart by a mark as well.

BLUE, ORANGE, GREEN, RED = "#0072B2", "#D55E00", "#007A55", "#C8200E"
INK, QUIET, FAINT = "#222222", "#6B6B6B", "#DDDDDD"
SERIES = (BLUE, ORANGE, GREEN, RED, INK, QUIET)  # of lines and points, in order

GRID_COLUMNS = 10
_DPI = 120

STYLE = {
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

    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
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
