"""Steps of airbench94 on a CPU, ours and PyTorch's in alternation: `python -m
benchmarks.airbench_steps --rounds 5 --sides ours,torch-float32,torch-bfloat16`.

Each side is a process of its own, and one of them works at a time. A step holds the augmentation
and the whitening bias's gradient on both sides; images are random. Prints each step, and at the end
a JSON object for each side: the median and the least of its seconds, of the processor seconds too,
its peak of memory in GB, and the seconds until its first step was done. `--huge-pages` runs all of
them with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

IMAGES, BATCH = 10_000, 2_000


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    return images, rng.integers(0, 10, IMAGES).astype(np.int32)


def ours(name: str) -> Callable[[], None]:
    """Returns a training step as the `train` command takes it. `name`: `ours`, or `ours-LOWERING`,
    with `@N` on N devices."""
    import jax

    from cifar_jax.models import model_of
    from cifar_jax.parallel import hardware, placement, programs
    from cifar_jax.recipes import RECIPES
    from cifar_jax.training import setup

    name, _, devices = name.partition("@")
    hardware.select_platform("cpu")
    recipe = RECIPES["airbench94"]
    model = model_of(recipe, 10, name.partition("-")[2] or "auto")
    state = jax.jit(setup.state_maker(recipe, model, 25, (32, 32, 3)))(jax.random.key(0))
    mesh = hardware.data_mesh(hardware.choose_devices(devices or "auto", BATCH, 2_000_000))
    large = setup.in_pieces(model, BATCH, mesh)
    step_of_recipe = setup.step_of(recipe, model, 25)
    train = programs.compile_training(step_of_recipe, mesh=mesh, in_pieces=large)
    examples = placement.put(*data(), mesh, placement.Placement.RESIDENT)
    rows = np.arange(IMAGES, dtype=np.int32).reshape(-1, BATCH)
    changing = placement.replicate((state, programs.empty_metrics(25)), mesh)
    rows, number = placement.replicate(rows, mesh), 0

    def step():
        nonlocal changing, number
        changing = train(changing, examples, rows, number % len(rows), number % 25, 1)
        jax.block_until_ready(changing)
        number += 1

    return step


def pytorch(name: str) -> Callable[[], None]:
    """Returns a step of `airbench_torch`; `name`: `torch-float32` or `torch-bfloat16`."""
    import torch

    from benchmarks import airbench_torch as original

    dtype = original.PRECISIONS[name.partition("-")[2]]
    low = dtype != torch.float32
    images, labels = data()
    x = original.normalised(images, "cpu", torch.float32)
    labels = torch.from_numpy(labels).long()
    net = original.Airbench().to(memory_format=torch.channels_last)
    original.whiten(net, x[:5000])
    trainer = original.Trainer(net, 200, 75, dtype)
    padded = torch.nn.functional.pad(x, (2,) * 4, "reflect")
    context = torch.autocast("cpu", dtype=dtype if low else None, enabled=low)
    number = 0

    def step():
        nonlocal number
        chosen = torch.arange(BATCH) + BATCH * (number % (IMAGES // BATCH))
        batch = original.shifted(padded[chosen], 32, 2)
        batch = batch.contiguous(memory_format=torch.channels_last)
        trainer.step(number % 75, batch, labels[chosen], context)
        number += 1

    return step


def work(name: str) -> None:
    """A side's process: a step for each line of its input."""
    from cifar_jax.runtime.environment import peak_bytes

    began = time.perf_counter()
    step = (pytorch if name.startswith("torch") else ours)(name)
    step()
    print(json.dumps({"first": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        step()
        row = {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - processor,
            "peak_gb": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) / 1e9,
        }
        print(json.dumps(row), flush=True)


@dataclasses.dataclass
class Side:
    name: str
    process: subprocess.Popen
    rows: list[dict] = dataclasses.field(default_factory=list)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.airbench_steps", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", default="ours,torch-float32,torch-bfloat16")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work)
        return []
    environment = dict(os.environ)
    if options.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sides, first = [], {}
    for name in options.sides.split(","):
        command = [sys.executable, "-m", "benchmarks.airbench_steps", "--work", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides.append(Side(name, subprocess.Popen(command, env=environment, **pipes)))
        first[name] = sides[-1].answer()["first"]
    for _ in range(options.rounds):
        for side in sides:
            side.process.stdin.write("step\n")
            side.process.stdin.flush()
            side.rows.append(side.answer())
            print(side.name, side.rows[-1], flush=True)
    results = []
    for side in sides:
        side.process.stdin.close()
        side.process.wait()
        found = {key: [row[key] for row in side.rows] for key in side.rows[0]}
        row = {"side": side.name, "first_step_done": first[side.name]}
        for key in ("seconds", "processor_seconds"):
            row[key], row[f"least_{key}"] = statistics.median(found[key]), min(found[key])
        row["peak_gb"] = max(found["peak_gb"])
        results.append({k: v if isinstance(v, str) else round(v, 3) for k, v in row.items()})
        print(json.dumps(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    main()
