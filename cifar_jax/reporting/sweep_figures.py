"""Pictures of a sweep (accuracy along its axes) and of a ramp (loss along learning rates)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cifar_jax.reporting import plots

_BEST = "best point"
_DASHES = (None, (4, 2), (1, 1))


def draw(
    names: Sequence[str],
    points: Sequence[Mapping],
    folder: Path,
    *,
    heading: str,
    chance: float | None = None,
    best: Mapping | None = None,
) -> list[Path]:
    """Draws the accuracy of a sweep's points into `folder`; returns the pictures' paths.

    `curves.png`: along the axis of most values, a line for each combination of the others, and
    `map.png`, where there are two axes: the two of most values, the best over the others. Of
    points by chance there is a scatter in place of both.

    Args:
      names: of the axes.
      points: from `cifar_jax.replicas.sweep.by_point`.
      chance: the accuracy of guessing, in percent, drawn as a line.
      best: of `points` the one to mark.
    """
    values = {name: sorted({point["values"][name] for point in points}) for name in names}
    longest = sorted(names, key=lambda name: -len(values[name]))
    crossed = np.prod([len(values[name]) for name in names]) == len(points)
    if not crossed and len(names) > 1:
        return [_scatter(longest[:2], points, folder / "scatter.png", heading, best)]
    path, rest = folder / "curves.png", longest[1:]
    paths = [_curves(longest[0], rest, values, points, path, heading, chance, best)]
    if len(names) > 1:
        paths.append(_map(longest[:2], values, points, folder / "map.png", heading, best))
    return paths


def _percent(point: Mapping, what: str = "mean") -> float:
    found = point["test_accuracy"]
    return 100 * found[what] if found else np.nan


def _is_log(values: Sequence) -> bool:
    return all(isinstance(v, (int, float)) and v > 0 for v in values) and (
        len(values) > 2 and values[-1] > 20 * values[0]
    )


def _name(setting: str) -> str:
    return setting.replace("_", " ")


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _scale(axis, which: str, name: str, values: Sequence) -> list[float]:
    """Labels an axis and returns where on it the values lie."""
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    getattr(axis, f"set_{which}label")(_name(name))
    if not numeric:
        getattr(axis, f"set_{which}ticks")(range(len(values)), [_text(v) for v in values])
        return list(range(len(values)))
    if _is_log(values):
        getattr(axis, f"set_{which}scale")("log")
        # The style draws no mathematics, which 10^-3 would be.
        getattr(axis, f"{which}axis").set_major_formatter(lambda value, _: f"{value:g}")
    return list(values)


def _curves(along, others, values, points, path, heading, chance, best) -> Path:
    lines: dict[tuple, list] = {}
    for point in points:
        key = tuple(point["values"][name] for name in others)
        lines.setdefault(key, []).append(point)
    with plots.drawing(path, 7.5, 4.2, palette=256) as figure:
        axis = figure.subplots()
        places = dict(zip(values[along], _scale(axis, "x", along, values[along]), strict=True))
        for k, (key, mine) in enumerate(lines.items()):
            mine = sorted(mine, key=lambda point: places[point["values"][along]])
            x = np.array([places[point["values"][along]] for point in mine], float)
            y = np.array([_percent(point) for point in mine])
            reach = np.array([_percent(p, "std") for p in mine])
            row, column = divmod(k, len(plots.SERIES))
            color, dashes = plots.SERIES[column], _DASHES[row % 3]
            label = ", ".join(f"{_name(n)} {_text(v)}" for n, v in zip(others, key, strict=True))
            style = {"dashes": dashes} if dashes else {}
            axis.plot(x, y, "o-", color=color, ms=3.5, lw=1.6, label=label or "mean", **style)
            axis.fill_between(x, y - reach, y + reach, color=color, alpha=0.15, lw=0)
            for place, point in zip(x, mine, strict=True):
                if point["diverged"]:
                    axis.plot(
                        place,
                        0.02 + 0.025 * k,
                        "x",
                        color=color,
                        ms=6,
                        mew=1.8,
                        transform=axis.get_xaxis_transform(),
                    )
        if any(point["diverged"] for point in points):
            axis.plot([], [], "x", color=plots.QUIET, mew=1.8, ls="none", label="runs diverged")
        if chance is not None:
            axis.axhline(
                chance, color=plots.QUIET, lw=1, ls=(0, (4, 3)), label="guessing", zorder=0
            )
        if best is not None:
            at = places[best["values"][along]], _percent(best)
            axis.plot(*at, "*", color=plots.INK, ms=13, mec="white", label=_BEST, zorder=5)
        axis.set(title=heading, ylabel="test accuracy, %: mean and standard deviation")
        axis.grid()
        axis.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return path


def _map(names, values, points, path, heading, best) -> Path:
    along, across = names
    grid = np.full((len(values[across]), len(values[along])), np.nan)
    lost = np.zeros(grid.shape, int)
    for point in points:
        where = (
            values[across].index(point["values"][across]),
            values[along].index(point["values"][along]),
        )
        grid[where] = np.fmax(grid[where], _percent(point))
        lost[where] += point["diverged"]
    from matplotlib.patches import Rectangle

    size = max(6.0, 0.62 * grid.shape[1] + 2.4), max(2.6, 0.5 * grid.shape[0] + 1.7)
    with plots.drawing(path, *size, palette=256) as figure:
        axis = figure.subplots()
        axis.set_facecolor(plots.FAINT)
        picture = axis.imshow(grid, cmap="Blues", aspect="auto", origin="lower")
        found = grid[np.isfinite(grid)]
        low, high = (found.min(), found.max()) if len(found) else (0, 1)
        for (row, column), value in np.ndenumerate(grid):
            dark = np.isfinite(value) and value > low + 0.6 * (high - low)
            text = f"{value:.1f}" if np.isfinite(value) else "diverged"
            if lost[row, column] and np.isfinite(value):
                text += f"\n({lost[row, column]} div.)"
            ink = "white" if dark else plots.INK
            axis.text(column, row, text, color=ink, fontsize=7.5, ha="center", va="center")
        if best is not None:
            at = [values[name].index(best["values"][name]) - 0.5 for name in (along, across)]
            axis.add_patch(Rectangle(at, 1, 1, fill=False, ec=plots.ORANGE, lw=2.5, label=_BEST))
            figure.legend(loc="outside lower right", fontsize=8.5)
        axis.set_xticks(range(grid.shape[1]), [_text(v) for v in values[along]], rotation=45)
        axis.set_yticks(range(grid.shape[0]), [_text(v) for v in values[across]])
        axis.set(xlabel=_name(along), ylabel=_name(across), title=heading)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=axis, pad=0.02)
        bar.set_label("mean test accuracy, %")
        bar.outline.set_visible(False)
    return path


def _scatter(names, points, path, heading, best) -> Path:
    with plots.drawing(path, 6.5, 4.4, palette=256) as figure:
        axis = figure.subplots()
        where, scales = [], []
        for which, name in zip("xy", names, strict=True):
            values = sorted({point["values"][name] for point in points})
            places = dict(zip(values, _scale(axis, which, name, values), strict=True))
            scales.append(places)
            where.append(np.array([places[point["values"][name]] for point in points], float))
        accuracy = np.array([_percent(point) for point in points])
        good = np.isfinite(accuracy)
        axis.plot(where[0][~good], where[1][~good], "x", color=plots.RED, label="diverged")
        picture = axis.scatter(
            where[0][good], where[1][good], c=accuracy[good], cmap="viridis", s=42
        )
        bar = figure.colorbar(picture, ax=axis, pad=0.02)
        bar.set_label("mean test accuracy, %")
        axis.set_title(heading)
        axis.grid()
        axis.set_axisbelow(True)
        if best is not None:
            at = [[scale[best["values"][name]]] for name, scale in zip(names, scales, strict=True)]
            axis.plot(*at, "o", mfc="none", mec=plots.INK, mew=2, ms=13, label=_BEST)
        if best is not None or not good.all():
            figure.legend(loc="outside lower center", fontsize=8.5)
    return path


def ramp(losses: np.ndarray, rates: np.ndarray, found, path: Path, *, heading: str) -> Path:
    """Draws the loss along a ramp of the learning rate.

    Args:
      losses: float [R, steps], of each run's batches.
      rates: float [steps].
      found: the `rate_ramp.Found` of them.
    """
    with plots.drawing(path, 7.5, 4.2, palette=256) as figure:
        axis = figure.subplots()
        axis.plot(rates, losses.mean(axis=0), ".", color="#BBBBBB", ms=3, label="mean of a step")
        axis.plot(rates, found.smooth, color=plots.BLUE, lw=2, label="smoothed")
        axis.plot(found.lowest_at, found.lowest, "o", color=plots.INK, ms=6, label="lowest")
        if found.suggestion:
            label = f"suggestion: {found.suggestion:g}"
            axis.axvline(found.suggestion, color=plots.ORANGE, lw=1.8, label=label)
        height = max(found.first - found.lowest, 0.02)
        axis.set_ylim(found.lowest - 0.3 * height, found.first + 0.8 * height)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(title=heading, xlabel="learning rate", ylabel="training loss")
        axis.grid()
        axis.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8.5)
    return path
