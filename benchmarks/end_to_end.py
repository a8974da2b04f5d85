"""Whole commands, from process start to the tested model, ours against PyTorch's.

    python -m benchmarks.end_to_end                              tutorial, adam, dropout (25 min)
    python -m benchmarks.end_to_end --runs dropout:30 --sides ours,published
    python -m benchmarks.end_to_end --show FILE                  the table of a result file again

A run is RECIPE:EPOCHS. Sides: `ours` with every program already in the compilation cache,
`ours-cold` with an empty one, and the peers of `torch_reference`, `@N` for N threads. Each side
is a command of its own; an epoch ends when its line arrives here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results
from benchmarks.machine import ROOT
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.environment import peak_bytes
from cifar_jax.runtime.errors import UserError, lookup, run_command

# dropout's 30 epochs take PyTorch's published loop half an hour: 3 show its rate.
RUNS = "tutorial:2,adam:10,dropout:3"
SIDES = "ours-cold,ours,published,eager_channels_last,eager_channels_last@1"
EPOCH = re.compile(r"\bepoch +(\d+)(?:/\d+ +[\d.]|\b.*\btrain)")


def command(
    side: str, recipe: str, epochs: int, folder: Path, where: argparse.Namespace, workers: int = 0
) -> list[str]:
    """Returns the command line of one side's whole run, writing into `folder`; `where` has the
    device, the data set and its directory."""
    words = [sys.executable, "-m"]
    if side.startswith("ours"):
        words += ["cifar_jax.train", "--workdir", str(folder / "run"), "--device", where.device]
    else:
        peer, _, threads = side.partition("@")
        words += ["benchmarks.torch_reference", "--peer", peer, "--threads", threads or "0"]
        words += ["--out", str(folder / "out.jsonl")]
        words += ["--device", "cuda" if where.device == "gpu" else "cpu"]
        if peer == "published":
            words += ["--workers", str(workers)]
    words += ["--recipe", recipe, "--epochs", str(epochs), "--dataset", where.dataset]
    return words + (["--data-dir", where.data_dir] if where.data_dir else [])


def run(words: list[str], environment: dict[str, str]) -> dict:
    """Runs a command and returns when its epochs and the whole of it ended.

    Returns:
      {"seconds", "epochs": [seconds from process start to the end of each epoch],
      "peak_memory_bytes": of the largest single process}.

    Raises:
      UserError: the command failed; its last line is in the message.
    """
    start = time.perf_counter()
    epochs, last = [], ""
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            last = line.strip() or last
            found = EPOCH.search(line)
            if found and int(found[1]) == len(epochs) + 1:
                epochs.append(time.perf_counter() - start)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(words[1:])} ended with {process.returncode}: {last}")
    return {
        "seconds": time.perf_counter() - start,
        "epochs": epochs,
        "peak_memory_bytes": peak_bytes(usage),
    }


def fastest_workers(recipe: str, where: argparse.Namespace) -> int:
    """Asks the published loop, in a process of its own, how many workers are fastest here."""
    words = [sys.executable, "-m", "benchmarks.torch_reference", "--recipe", recipe]
    words += ["--probe-workers", "--dataset", where.dataset]
    words += ["--data-dir", where.data_dir] if where.data_dir else []
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError((found.stderr.strip() or "no output").splitlines()[-1])
    return int(found.stdout.split()[-1])


def measure(
    side: str, recipe: str, epochs: int, cache: Path, where: argparse.Namespace, workers: int = 0
) -> dict:
    """Runs one side once; `cache` holds the compiled programs of `ours`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = folder / "cache" if side == "ours-cold" else cache
        environment = {"JAX_COMPILATION_CACHE_DIR": str(used)} if side.startswith("ours") else {}
        return run(command(side, recipe, epochs, folder, where, workers), environment)


def summary(rounds: list[dict]) -> dict:
    """Returns medians over the rounds of one side."""
    epochs = [
        statistics.median(times) for times in zip(*(r["epochs"] for r in rounds), strict=True)
    ]
    further = [late - early for early, late in itertools.pairwise(epochs)]
    return {
        "seconds": statistics.median(r["seconds"] for r in rounds),
        "epochs": epochs,
        "further_epoch": statistics.median(further) if further else None,
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in rounds),
        "rounds": rounds,
    }


def ahead_after(mine: list[float], theirs: list[float]) -> int | None:
    """Returns the first epoch at whose end we are ahead and stay so, None where we are not."""
    behind = [n for n, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1) if a >= b]
    first = max(behind, default=0) + 1
    return first if first <= len(mine) else None


def table(result: dict) -> str:
    """Returns the result as Markdown."""
    lines = [
        f"{results.processor(result)}; {result['dataset']}; {results.stamp(result)}. "
        f"Medians of {result['rounds']} rounds, seconds from process start.",
        "",
        "| recipe, epochs | side | whole command | first epoch done | a further epoch |"
        " peak memory, GB | our command is faster by | ahead from epoch (cold, warm) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["runs"]:
        sides = row["sides"]
        for name, side in sides.items():
            further = side["further_epoch"]
            cells = [f"{row['recipe']}, {row['epochs']}", name, f"{side['seconds']:.1f}"]
            cells += [f"{side['epochs'][0]:.1f}", "" if further is None else f"{further:.1f}"]
            cells.append(f"{side['peak_memory_bytes'] / 1e9:.2f}")
            ours = [sides[n] for n in ("ours-cold", "ours") if n in sides]
            if name.startswith("ours"):
                cells += ["", ""]
            else:
                cells.append(", ".join(f"{side['seconds'] / o['seconds']:.2f}x" for o in ours))
                first = [ahead_after(o["epochs"], side["epochs"]) for o in ours]
                cells.append(", ".join("never" if n is None else str(n) for n in first))
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"Not run: {name}." for name in result["not_run"])]
    return "\n".join(lines)


def runs_from(text: str) -> list[tuple[str, int]]:
    """`tutorial:2,dropout:3` -> [(recipe, epochs)]. Raises `UserError` on anything else."""
    found = []
    for part in text.split(","):
        recipe, _, epochs = part.partition(":")
        lookup(RECIPES, recipe, "recipe")
        if not epochs.isdecimal() or int(epochs) < 1:
            raise UserError(f"--runs {text!r}: after each recipe comes its number of epochs, R:3")
        found.append((recipe, int(epochs)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default=RUNS, help="RECIPE:EPOCHS,...")
    parser.add_argument("--sides", default=SIDES, help="by commas")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--dataset", default="cifar10", help="any prepared set of 32x32 images")
    parser.add_argument("--rounds", type=int, default=1, help="whole runs of each side")
    parser.add_argument("--data-dir", default=None, help="directory of prepared data sets")
    parser.add_argument("--out", type=Path, help="result file (JSON), written after each run")
    results.add_show(parser)
    args = parser.parse_args()
    if results.shown(args, table):
        return
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {args.rounds}")
    print(table(benchmark(args)))


def benchmark(args: argparse.Namespace) -> dict:
    """Runs all commands, sides in turn within a round, and returns what `table` shows."""
    result = {
        **results.header(),
        "dataset": args.dataset,
        "device": args.device,
        "rounds": args.rounds,
        "runs": [],
        "not_run": [],
    }
    sides = args.sides.split(",")
    with tempfile.TemporaryDirectory() as cache:
        for recipe, epochs in runs_from(args.runs):
            found: dict[str, list[dict]] = {}
            workers = fastest_workers(recipe, args) if "published" in sides else 0
            if "ours" in sides:
                measure("ours", recipe, 1, Path(cache), args)  # fills the cache
            for number in range(args.rounds):
                for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                    print(f"{recipe}, {epochs} epochs: {side}", file=sys.stderr, flush=True)
                    try:
                        taken = measure(side, recipe, epochs, Path(cache), args, workers)
                    except UserError as error:
                        if side.startswith("ours"):
                            raise
                        result["not_run"].append(f"{recipe}: {side}: {error}")
                        continue
                    found.setdefault(side, []).append(taken)
            ordered = {side: summary(found[side]) for side in sides if side in found}
            row = {"recipe": recipe, "epochs": epochs, "published_workers": workers}
            result["runs"].append(row | {"sides": ordered})
            results.write(args.out, result)
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
