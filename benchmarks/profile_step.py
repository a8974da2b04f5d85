"""The kernels of one training step, by the profiler: what runs, how often and how long.

python -m benchmarks.profile_step --device gpu --cases tutorial:4,dropout:20 --out FILE.csv
"""

from __future__ import annotations

import argparse
import collections
import csv
import sys
import tempfile
from pathlib import Path

from benchmarks.cases import parse
from benchmarks.worker import add_options
from cifar_jax.runtime.errors import UserError, run_command


def kernels(folder: Path, device: str) -> dict[str, list[float]]:
    """Returns {kernel: [microseconds of each call]} of a trace: what a GPU's streams ran, or what a
    CPU's threads did."""
    import jax

    found = collections.defaultdict(list)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                if device == "cpu" or ("GPU" in plane.name and "Stream" in line.name):
                    for event in line.events:
                        found[event.name].append(event.duration_ns / 1e3)
    return found


def profiled(text: str, dataset, device: str, lowering: str, precision: str) -> list[dict]:
    """Returns the rows of a case, longest first: "case", "kernel", "calls" and "microseconds" a
    step."""
    import jax

    from benchmarks.sides import Ours

    side = Ours(lowering)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side.prepare(parse(text), dataset, precision, folder / "weights.npz", 0.2)
        with jax.profiler.trace(folder):
            side.dispatch()
            side.sync()
        found = kernels(folder, device)
    rows = [
        {
            "case": text,
            "kernel": kernel,
            "calls": len(times) / side.chunk,
            "microseconds": sum(times) / side.chunk,
        }
        for kernel, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="tutorial:4,dropout:20", help="RECIPE:BATCH,...")
    parser.add_argument("--conv", default="auto", help="as of cifar_jax.train")
    parser.add_argument("--out", type=Path, help="all rows (CSV)")
    add_options(parser)
    args = parser.parse_args()
    from cifar_jax.datasets import load_dataset
    from cifar_jax.parallel import hardware
    from cifar_jax.runtime import compilation_cache

    hardware.select_platform(args.device)
    compilation_cache.enable()
    dataset = load_dataset(args.dataset, data_dir=args.data_dir, progress=False)
    rows = []
    for text in args.cases.split(","):
        if parse(text).kind != "train":
            raise UserError(f"--cases {text}: a training step is profiled, as tutorial:4")
        case = profiled(text, dataset, args.device, args.conv, args.precision)
        calls, total = (sum(row[name] for row in case) for name in ("calls", "microseconds"))
        print(f"{text}: {calls:.1f} kernels, {total:.1f} us a step")
        for row in case[:12]:
            print(f"  {row['microseconds']:8.2f} us {row['calls']:6.2f} x {row['kernel'][:80]}")
        rows += case
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "kernel", "calls", "microseconds"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
