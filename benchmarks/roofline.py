"""How far each recipe's training step is from what this machine can do.

    python -m benchmarks.roofline --out benchmarks/results/cpu_roofline.json

A step does at least the products of the plain convolutions and dense layers: forward, and the
gradients by weights and by inputs (not by the first layer's inputs, which are the images). It
moves at least its activations, written once and read twice (forward by the next layer, backward
by its own), and its weights, gradients and optimizer state. Both are divided by rates measured
here: of a large float32 matrix product and of a large copy. The larger quotient is the floor.
Winograd's form does fewer multiplications than the plain convolution, so a step may pass its
"floor"; caches hold small activations, so it may pass the memory side too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.cases import Case, cases_from
from cifar_jax.runtime.errors import UserError, run_command

CASES = "tutorial:4,adam:128,dropout:20,dropout:128,deep:16,deep:64"
# Numbers an optimizer reads and writes for a weight, besides reading the gradient.
OPTIMIZER_TRAFFIC = {"sgd": 2, "momentum": 4, "adam": 6, "adamw": 6}


def best_seconds(function, repeats: int = 10) -> float:
    """Returns the shortest of `repeats` timed calls, after one untimed."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_rates(side: int = 2048, copied: int = 1 << 28) -> dict[str, float]:
    """Returns {"flops": FLOP/s of a float32 product of `side`, "bytes": bytes/s of a copy}.

    A copy of n bytes counts 2 n: it reads and writes.
    """
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    product = jax.jit(jnp.matmul)
    x = jnp.ones((copied // 4,), jnp.float32)
    # Adding one: a bare copy would be elided.
    copy = jax.jit(lambda x: x + jnp.float32(1))
    return {
        "flops": 2 * side**3 / best_seconds(lambda: product(a, a).block_until_ready()),
        "bytes": 2 * copied / best_seconds(lambda: copy(x).block_until_ready()),
    }


def work(case: Case) -> dict[str, float]:
    """Returns {"flops", "bytes"} of one training step, as the module's docstring counts them."""
    from cifar_jax.models import make_model
    from cifar_jax.models.layer_table import summarise

    recipe = case.settings()
    layers = [row for row in summarise(make_model(recipe.model, 10)) if row.flops]
    flops = case.batch_size * (3 * sum(row.flops for row in layers) - layers[0].flops)
    activations = case.batch_size * sum(int(np.prod(row.output_shape)) for row in layers)
    weights = sum(row.parameters for row in layers)
    kind = "momentum" if recipe.optimizer == "sgd" and recipe.momentum else recipe.optimizer
    # Forward reads the weights, backward reads them and writes gradients, the rule reads those.
    moved = 4 * (3 * activations + (4 + OPTIMIZER_TRAFFIC[kind]) * weights)
    return {"flops": flops, "bytes": moved + 3072 * case.batch_size}


def measure(case: Case, dataset, rates: dict, seconds: float, windows: int) -> dict:
    """Times our training program and sets it beside the floor."""
    from benchmarks.sides import Ours

    needed = work(case)
    floor = {
        "compute": needed["flops"] / rates["flops"],
        "memory": needed["bytes"] / rates["bytes"],
    }
    with tempfile.TemporaryDirectory() as folder:
        side = Ours()
        side.prepare(case, dataset, "float32", Path(folder) / "weights.npz", seconds)
        found = [side.window() for _ in range(windows)]
    step = float(np.median([taken / images for images, taken in found])) * case.batch_size
    return {
        "case": str(case),
        **needed,
        "floor_seconds": floor,
        "step_seconds": step,
        "achieved_flops": needed["flops"] / step,
        "share_of_floor": max(floor.values()) / step,
    }


def table(result: dict) -> str:
    """Returns the result as Markdown."""
    rates = result["rates"]
    lines = [
        f"{results.processor(result)}; a 2048 x 2048 float32 product "
        f"{rates['flops'] / 1e9:.0f} GFLOP/s, memory {rates['bytes'] / 1e9:.1f} GB/s; "
        f"{results.stamp(result)}.",
        "",
        "| case | GFLOP a step | MB a step | floor, ms: compute, memory | our step, ms |"
        " GFLOP/s | share of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        floor = row["floor_seconds"]
        cells = [row["case"], f"{row['flops'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.2f}"]
        cells.append(f"{1e3 * floor['compute']:.3f}, {1e3 * floor['memory']:.3f}")
        cells += [f"{1e3 * row['step_seconds']:.3f}", f"{row['achieved_flops'] / 1e9:.0f}"]
        cells.append(f"{100 * row['share_of_floor']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Draws the roof and each case under it: FLOP/s over FLOPs a byte."""
    from cifar_jax.reporting import plots

    rates = result["rates"]
    intensity = np.geomspace(0.5, 500, 100)
    roof = np.minimum(rates["flops"], rates["bytes"] * intensity) / 1e9
    with plots.drawing(path, 6.5, 4) as figure:
        axes = figure.subplots()
        axes.loglog(intensity, roof, color=plots.INK, label="measured roof")
        for row, color in zip(result["cases"], itertools.cycle(plots.SERIES), strict=False):
            x, y = row["flops"] / row["bytes"], row["achieved_flops"] / 1e9
            name, batch = row["case"].removeprefix("train/").split(":")
            axes.plot(x, y, "o", color=color, label=f"{name}, batch {batch}: {y:.0f} GFLOP/s")
        for axis in (axes.xaxis, axes.yaxis):  # the style draws no mathematics, which 10^2 would be
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("FLOPs a byte moved")
        axes.set_ylabel("GFLOP/s of the plain network")
        axes.set_title("Training steps under this machine's roof")
        axes.grid(which="major")
        axes.legend(loc="lower right", fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, help="RECIPE:BATCH,...")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window")
    parser.add_argument("--windows", type=int, default=5, help="median of so many")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--data-dir", default=None, help="directory of prepared data sets")
    parser.add_argument("--out", type=Path, help="result file (JSON); a .png goes beside it")
    args = parser.parse_args()
    cases = cases_from(args.cases)
    if any(case.kind != "train" for case in cases) or args.windows < 1 or args.seconds <= 0:
        raise UserError("--cases are training cases; --windows at least 1, --seconds above 0")

    from cifar_jax.datasets import load_dataset
    from cifar_jax.parallel import hardware
    from cifar_jax.runtime import compilation_cache

    hardware.select_platform(args.device)
    compilation_cache.enable()
    dataset = load_dataset("cifar10", data_dir=args.data_dir)
    rates = machine_rates()
    head = results.header()
    head["machine"]["device"] = hardware.describe_device()
    result = {
        **head,
        "rates": rates,
        "cases": [measure(case, dataset, rates, args.seconds, args.windows) for case in cases],
    }
    print(table(result))
    results.write(args.out, result)
    if args.out:
        draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_command(main))
