"""How many images/s many runs train together, ours and PyTorch's, beside one run by itself.

    python -m benchmarks.replicas                                  tutorial:4, R = 1 to 256
    python -m benchmarks.replicas --case dropout:20 --replicas 1,16 --out FILE
    python -m benchmarks.replicas --show FILE                      the table of a result file again

Sides: `map` and `vmap`, our two forms on all local devices; `torch-vmap`, PyTorch's own answer,
torch.func over stacked weights; and for comparison one run by itself, `ours` and PyTorch's
`eager`, to which R runs one after another come down. Each lives in a process of its own, and they
take turns. README.md holds the protocol.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.cases import parse
from benchmarks.statistics import paired_ratio, spread
from benchmarks.throughput import (
    add_timing_options,
    check_timing,
    prepare,
    ratio,
    speed,
    take_turns,
)
from benchmarks.worker import Worker
from cifar_jax.runtime.errors import UserError, nearest, run_command

SINGLE = ("ours", "eager")
FORMS = ("map", "vmap", "torch-vmap")


def measure(workers: list[Worker], request: dict, rounds: int, precision: str) -> dict:
    """Measures sides that run the same case; the first is the reference, and must run.

    Returns:
      {"sides": {name: {"rates", "images_per_second", "ratio" to the first side (of the same
      rounds), "loss_difference", "same_work", "compile_seconds", ...}}, "not_run": {name: reason}}.

    Raises:
      UserError: the first side did not run.
    """
    sides, not_run, running = prepare(workers, request, precision)
    rates = take_turns(running, rounds)
    for name, side in sides.items():
        side["rates"] = rates[name]
        side["images_per_second"] = spread(rates[name])
        side["ratio"] = paired_ratio(rates[name], rates[workers[0].side])
    for worker in running:
        worker.ask(do="drop")
    return {"sides": sides, "not_run": not_run}


def sides_for(replicas: int, forms: list[str]) -> list[str]:
    """Returns the names of the sides for so many replicas, the reference in front."""
    return [*SINGLE, *(f"{form}-{replicas}" for form in forms)]


def benchmark(args: argparse.Namespace, forms: list[str], counts: list[int]) -> dict:
    """Runs every number of replicas and returns the result that `table` shows."""
    case = parse(args.case)
    if case.kind != "train":
        raise UserError(f"--case {args.case}: replicas are measured in training, as tutorial:4")
    shared = ("device", "precision", "threads", "dataset", "data_dir")
    options = {name: getattr(args, name) for name in shared}
    result = {
        **results.header(),
        "case": str(case),
        **options,
        "rounds": args.rounds,
        "window_seconds": args.seconds,
        "replicas": [],
    }
    for count in counts:
        workers = [Worker(name, **options) for name in sides_for(count, forms)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                weights = str(Path(folder) / "weights.npz")
                request = {"do": "prepare", "case": str(case), "weights": weights}
                request["seconds"] = args.seconds
                row = measure(workers, request, args.rounds, args.precision)
            described = {worker.side: worker.ask(do="describe") for worker in workers}
        finally:
            for worker in workers:
                worker.close()
        result["replicas"].append({"count": count, **row, "workers": described})
        print(f"{count} replicas measured", file=sys.stderr, flush=True)
        results.write(args.out, result)
    return result


def table(result: dict) -> str:
    """Returns the result as Markdown: images/s of all replicas together, and the ratio to one run
    of ours by itself, measured in the same rounds."""
    first = result["replicas"][0]
    forms = [name.rpartition("-")[0] for name in first["workers"] if name not in SINGLE]
    lines = [
        f"{result['case']}; {results.processor(result)}; {result['dataset']}, "
        f"{result['precision']}; {results.stamp(result)}. "
        f"Images/s of all runs together: median (lowest-highest) of {result['rounds']} rounds; "
        "then the ratio to `ours`.",
        "",
        f"| replicas | ours, one run | PyTorch eager, one run | {' | '.join(forms)} |",
        "|---" * (len(forms) + 3) + "|",
    ]
    for row in result["replicas"]:
        cells = [str(row["count"])]
        for name in sides_for(row["count"], forms):
            side = row["sides"].get(name)
            if side is None:
                cells.append("not run")
                continue
            mark = "" if side["same_work"] else " (first losses differ)"
            shown = f" {ratio(side['ratio'])}x" if name != SINGLE[0] else ""
            cells.append(f"{speed(side)}{shown}{mark}")
        lines.append(f"| {' | '.join(cells)} |")
    reasons = {(name, why) for row in result["replicas"] for name, why in row["not_run"].items()}
    return "\n".join([*lines, "", *(f"Not run: {n}: {why}." for n, why in sorted(reasons))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="tutorial:4", help="RECIPE:BATCH")
    parser.add_argument("--replicas", default="1,4,16,64,256", help="how many, by commas")
    parser.add_argument("--forms", default=",".join(FORMS), help=", ".join(FORMS))
    add_timing_options(parser, "row")
    args = parser.parse_args()
    if results.shown(args, table):
        return
    check_timing(args)
    forms, counts = args.forms.split(","), args.replicas.split(",")
    for form in forms:
        if form not in FORMS:
            raise UserError(f"unknown form {form!r}; {nearest(form, FORMS)}")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--replicas takes numbers from 1 by commas, got {args.replicas!r}")
    print(table(benchmark(args, forms, [int(count) for count in counts])))


if __name__ == "__main__":
    sys.exit(run_command(main))
