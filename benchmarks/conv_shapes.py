"""Which lowering is fastest for which convolution: the measurements behind `auto`.

    python -m benchmarks.conv_shapes --out benchmarks/results/cpu_conv_shapes.json

Each convolution of the models alone, with bias, relu and pool: forward and all its gradients
(not by the images, for a first layer), repeated in one scanned program. Block forms get their
input as blocks, as the layer before them leaves it. Forms take turns; medians over rounds. Inside a
scan `lax` may take seconds where the others take milliseconds: such forms run once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from cifar_jax.ops import layout
from cifar_jax.ops.convolution import choose, convolve, cpu_compiler_options
from cifar_jax.runtime.errors import UserError, run_command

FORMS = ("lax", "gemm", "winograd")
# (kernel, input channels, filters, input size, padding, pool), batch
SHAPES = [
    ((5, 3, 6, 32, 0, True), 4),
    ((5, 6, 16, 14, 0, True), 4),
    ((5, 3, 6, 32, 0, True), 128),
    ((5, 6, 16, 14, 0, True), 128),
    ((3, 3, 16, 32, 1, True), 20),
    ((3, 16, 32, 16, 1, True), 20),
    ((3, 32, 64, 8, 1, True), 20),
    ((5, 3, 10, 32, 0, False), 16),
    ((5, 10, 20, 28, 0, False), 16),
    ((5, 20, 20, 24, 0, False), 16),
    ((5, 20, 10, 20, 0, True), 16),
    ((3, 64, 64, 32, 1, True), 32),
    ((3, 128, 128, 16, 1, True), 32),
    ((3, 256, 256, 8, 1, True), 128),
    ((3, 512, 512, 4, 1, True), 128),
    ((3, 512, 512, 2, 1, True), 128),
]


def out_size(shape: tuple) -> int:
    """Rows and columns of the convolution's output, before the pool."""
    kernel, _, _, size, padding, _ = shape
    return size + 2 * padding - kernel + 1


def program(shape: tuple, batch: int, form: str):
    """Returns `run(length)`, which computes the layer and its gradients so many times."""
    kernel_size, channels, filters, size, padding, pool = shape
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, size, size, channels), jnp.float32)
    if form != "lax":
        x = layout.to_blocked(
            x, choose(form, kernel_size, channels, (out_size(shape),) * 2, pool)[1]
        )
    scale = float(np.sqrt(2 / (kernel_size**2 * channels)))
    kernel = scale * jax.random.normal(keys[1], (kernel_size, kernel_size, channels, filters))
    bias = jnp.zeros((filters,))
    inner = channels > 3  # a first layer needs no gradient by the images

    def loss(x, kernel, bias):
        y = convolve(x, kernel, bias, padding=padding, pool=pool, lowering=form)
        return sum((leaf * leaf).sum() for leaf in jax.tree.leaves(y))

    def body(_, carry):
        grads = jax.grad(loss, argnums=(0, 1, 2) if inner else (1, 2))(*carry)
        grads = grads if inner else (jax.tree.map(jnp.zeros_like, carry[0]), *grads)
        # The next turn depends on this one, or the compiler would take it out of the loop.
        return jax.tree.map(lambda a, g: a - jnp.float32(1e-9) * g, carry, grads)

    run = jax.jit(
        lambda carry, length: jax.lax.fori_loop(0, length, body, carry),
        compiler_options=cpu_compiler_options(),
    )
    carry = (x, kernel, bias)
    return lambda length: jax.block_until_ready(run(carry, np.int32(length)))


def measure(shape: tuple, batch: int, rounds: int, seconds: float) -> dict:
    """Returns {"shape", "batch", "auto": the form it takes, "milliseconds": {form: median},
    "once": the forms that are too slow for rounds and were run once}."""
    runs, lengths, times, once = {}, {}, {}, []
    for form in FORMS:
        run = program(shape, batch, form)
        run(0)  # compiles
        start = time.perf_counter()
        run(1)
        first = time.perf_counter() - start
        times[form] = [1e3 * first]
        if first > 5 * seconds:
            once.append(form)
            continue
        runs[form], lengths[form], times[form] = run, max(1, round(seconds / first)), []
    for _ in range(rounds):
        for form, run in runs.items():
            start = time.perf_counter()
            run(lengths[form])
            times[form].append(1e3 * (time.perf_counter() - start) / lengths[form])
    kernel, channels, *_, pool = shape
    return {
        "shape": shape,
        "batch": batch,
        "auto": choose("auto", kernel, channels, (out_size(shape),) * 2, pool)[0],
        "milliseconds": {form: float(np.median(values)) for form, values in times.items()},
        "once": once,
    }


def table(result: dict) -> str:
    """Returns the result as Markdown; the fastest form is bold."""
    lines = [
        f"{results.processor(result)}; {results.stamp(result)}. "
        "Milliseconds, forward and gradients.",
        "",
        f"| convolution | batch | {' | '.join(FORMS)} | `auto` |",
        "|---" * (len(FORMS) + 3) + "|",
    ]
    for row in result["rows"]:
        kernel, channels, filters, size, padding, pool = row["shape"]
        name = f"{kernel}x{kernel}, {channels} to {filters}, {size}x{size}"
        name += f"{', padded' if padding else ''}{', pool' if pool else ''}"
        times = row["milliseconds"]
        best = min(times, key=times.get)
        cells = [f"**{times[f]:.3g}**" if f == best else f"{times[f]:.3g}" for f in FORMS]
        cells = [c + " (once)" * (f in row["once"]) for f, c in zip(FORMS, cells, strict=True)]
        lines.append(f"| {name} | {row['batch']} | {' | '.join(cells)} | {row['auto']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a form in a round")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    results.add_show(parser)
    args = parser.parse_args()
    if results.shown(args, table):
        return
    if args.rounds < 1 or args.seconds <= 0:
        raise UserError("--rounds must be at least 1, --seconds above 0")
    result = {**results.header(), "rows": []}
    for case in SHAPES:
        result["rows"].append(measure(*case, args.rounds, args.seconds))
        results.write(args.out, result)
    print(table(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
