"""Training steps of one recipe with several lowerings, taking turns in one process.

    python -m benchmarks.conv_forms dropout:20 tutorial:128 --forms auto,gemm,winograd,lax

For whoever changes `cifar_jax/models`: random images, whole training steps in one scanned
program, medians over rounds of images a second and of processor seconds (which hardly see what
else the machine is doing). The comparison with PyTorch is `benchmarks.throughput`.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import steps
from cifar_jax.models import make_model
from cifar_jax.ops.convolution import LOWERINGS, cpu_compiler_options
from cifar_jax.optimizers import make_optimizer
from cifar_jax.recipes import RECIPES


def training(recipe_name: str, batch: int, lowering: str, length: int):
    """Returns a function that trains for `length` steps and returns how many images that is."""
    recipe = RECIPES[recipe_name].replace(batch_size=batch)
    model = make_model(recipe.model, lowering=lowering)
    optimizer = make_optimizer(recipe, length)
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        preprocess=steps.make_preprocess(recipe.normalize),
    )
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (length, batch, 32, 32, 3), np.uint8)),
        "label": jnp.asarray(rng.integers(0, 10, (length, batch), np.int32)),
    }
    program = jax.jit(
        lambda state, data: jax.lax.scan(step, state, data),
        donate_argnums=0,
        compiler_options=cpu_compiler_options(),
    )
    state = steps.create_state(model, optimizer, jax.random.key(0))

    def run() -> int:
        nonlocal state
        state, sums = program(state, data)
        jax.block_until_ready(sums)
        return length * batch

    run.compiled = lambda: program.lower(state, data).compile()
    return run


def compare(candidates: dict, rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Returns name -> (images a second, images a processor second), medians over rounds in which
    every candidate runs for about `seconds`."""
    speeds = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            run()  # the others' data out of the caches, ours in
            images, wall, processor = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - wall < seconds:
                images += run()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            speeds[name].append((images / wall, images / processor))
    return {name: tuple(np.median(values, axis=0)) for name, values in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="recipe:batch")
    parser.add_argument("--forms", default="auto,lax", help=f"of {', '.join(LOWERINGS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    for case in options.cases:
        name, _, batch = case.partition(":")
        batch = int(batch)
        length = max(8, min(256, 1024 // batch))
        forms = {f: training(name, batch, f, length) for f in options.forms.split(",")}
        for form, (wall, processor) in compare(forms, options.rounds, options.seconds).items():
            print(f"{case:14} {form:10} {wall:9.0f} images/s {processor:9.0f} /cpu-s", flush=True)


if __name__ == "__main__":
    main()
