"""Training and evaluation speed, ours against PyTorch's, on this machine.

    python -m benchmarks.throughput                       the table of README.md (15 minutes)
    python -m benchmarks.throughput --cases full          every recipe, batch 4 to 2048
    python -m benchmarks.throughput --cases dropout:128,eval/deep:512 --rounds 9
    python -m benchmarks.throughput --show FILE           the table of a result file again

Each side lives in a process of its own, and they take turns, so that drift of the machine
falls on all of them. README.md holds the protocol.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.cases import CASE_SETS, Case, cases_from
from benchmarks.statistics import largest_difference, paired_ratio, spread
from benchmarks.worker import Worker, add_options
from cifar_jax.runtime.errors import UserError, run_command

# Above this the first losses say that the two sides did not do the same work.
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}
# Peers slower than this share of the fastest in the screening are not measured further.
SCREEN = 0.75
# `torch_reference.PEERS`, named here too so that a machine without torch lists them as not run;
# `@1` is a peer on one processor, which small batches sometimes prefer to two.
PEERS = (
    "published",
    "eager",
    "eager@1",
    "eager_channels_last",
    "eager_channels_last@1",
    "compile",
    "compile_channels_last",
    "compile_channels_last@1",
    "compile_max_autotune",
    "compile_reduce_overhead",
    "cudagraph",
    "cudagraph_channels_last",
)


def measure(
    case: Case,
    ours: list[Worker],
    peers: list[Worker],
    folder: Path,
    *,
    precision: str,
    rounds: int,
    seconds: float,
) -> dict:
    """Measures one case.

    Returns:
      {"case", "sides": {name: {"images_per_second", "steps_per_second", "rates",
      "compile_seconds", "data_seconds", "screened", "loss_difference"}}, "not_run": {name:
      reason}, "strongest", "ratio" (to the strongest peer), "ratio_to_published"}. Screened
      sides carry one rate and no ratio.

    Raises:
      UserError: our own side did not run.
    """
    request = {
        "do": "prepare",
        "case": str(case),
        "weights": str(folder / "weights.npz"),
        "seconds": seconds,
    }
    sides, not_run, running = prepare([*ours, *peers], request, precision, label=f"{case}: ")
    rates = screen(running, ours, sides)
    kept = [worker for worker in running if not sides[worker.side]["screened"]]
    if rounds:
        rates = take_turns(kept, rounds)
    for name, values in rates.items():
        sides[name]["rates"] = values
    for worker in running:
        worker.ask(do="drop")
    for side in sides.values():
        side["images_per_second"] = spread(side["rates"])
        side["steps_per_second"] = side["images_per_second"]["median"] / case.batch_size
    return {"case": str(case), "sides": sides, "not_run": not_run} | ratios(
        sides, ours[0].side, [worker.side for worker in kept if worker in peers]
    )


def prepare(
    workers: list[Worker], request: dict, precision: str, label: str = ""
) -> tuple[dict, dict, list[Worker]]:
    """Has workers prepare the same case; the first is the reference, and must run.

    Returns:
      {name: what the side answered, with "loss_difference" to the first side's first losses and
      "same_work" in place of "losses"}, {name of one that did not run: reason}, and the workers
      that run.

    Raises:
      UserError: the first side did not run.
    """
    sides, not_run, running = {}, {}, []
    for worker in workers:
        print(f"{label}preparing {worker.side}", file=sys.stderr, flush=True)
        found = worker.ask(**request)
        if "not_run" in found:
            if worker is workers[0]:
                raise UserError(f"{label}our side did not run: {found['not_run']}")
            not_run[worker.side] = found["not_run"]
            worker.ask(do="drop")
            continue
        sides[worker.side] = found
        running.append(worker)
    reference = sides[workers[0].side]["losses"]
    for side in sides.values():
        side["loss_difference"] = largest_difference(reference, side.pop("losses"))
        side["same_work"] = side["loss_difference"] <= TOLERANCE[precision]
    return sides, not_run, running


def rate(worker: Worker) -> float:
    """One window's images/s."""
    window = worker.ask(do="window")
    return window["images"] / window["seconds"]


def take_turns(running: list[Worker], rounds: int) -> dict[str, list[float]]:
    """Returns images/s of every round by side; in each another side is the first."""
    rates = {worker.side: [] for worker in running}
    for number in range(rounds):
        turn = number % len(running)
        for worker in running[turn:] + running[:turn]:
            rates[worker.side].append(rate(worker))
    return rates


def screen(running: list[Worker], ours: list[Worker], sides: dict) -> dict[str, list[float]]:
    """Times every side once and marks the peers far behind the fastest as `screened`.

    The published loop is always measured, for the second ratio.
    """
    rates = {worker.side: [rate(worker)] for worker in running}
    mine = {worker.side for worker in ours}
    best = max(
        (rates[name][0] for name, side in sides.items() if name not in mine and side["same_work"]),
        default=0.0,
    )
    for name, side in sides.items():
        side["rates"] = rates[name]
        slow = name not in mine and name != "published" and rates[name][0] < SCREEN * best
        side["screened"] = slow
    return rates


def ratios(sides: dict, mine: str, peers: list[str]) -> dict:
    """Returns the strongest peer, our ratio to it and to the published loop."""
    comparable = [name for name in peers if sides[name]["same_work"]]
    if not comparable:
        return {"strongest": None, "ratio": None, "ratio_to_published": None}
    strongest = max(comparable, key=lambda name: sides[name]["images_per_second"]["median"])
    out = {"strongest": strongest}
    for key, name in (("ratio", strongest), ("ratio_to_published", "published")):
        known = name in comparable
        out[key] = paired_ratio(sides[mine]["rates"], sides[name]["rates"]) if known else None
    return out


def table(result: dict) -> str:
    """Returns the result as Markdown: against PyTorch, and our sides beside one another."""
    chip, mine = results.processor(result), result["ours"]
    if result["device"] == "gpu":
        chip = f"{result['workers'][mine[0]]['device']} ({chip})"
    lines = [
        f"{chip}; {result['dataset']}, "
        f"{result['precision']}; {results.stamp(result)}. "
        f"Images/s: median (lowest-highest) of {result['rounds']} rounds.",
        "",
        "| case | ours | strongest PyTorch peer | ratio (95 % interval) | published loop | ratio |"
        " largest difference of the first losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        sides, strongest = row["sides"], row["strongest"]
        cells = [row["case"], speed(sides[mine[0]])]
        if strongest:
            cells += [f"{strongest} {speed(sides[strongest])}", ratio(row["ratio"])]
        else:
            cells += ["none ran", ""]
        published = sides.get("published")
        cells += [speed(published) if published else "not run", ratio(row["ratio_to_published"])]
        cells.append(f"{sides[strongest]['loss_difference']:.1e}" if strongest else "")
        lines.append("| " + " | ".join(cells) + " |")
    if len(mine) > 1:
        lines += ["", f"| images/s | {' | '.join(mine)} |", "|---" * (len(mine) + 1) + "|"]
        for row in result["cases"]:
            cells = [speed(row["sides"][name]) if name in row["sides"] else "" for name in mine]
            lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    reasons = {(name, why) for row in result["cases"] for name, why in row["not_run"].items()}
    unequal = {
        name for row in result["cases"] for name, s in row["sides"].items() if not s["same_work"]
    }
    lines += ["", *(f"Not run: {name}: {why}." for name, why in sorted(reasons))]
    lines += [f"Not comparable (first losses differ): {name}." for name in sorted(unequal)]
    return "\n".join(lines)


def speed(side: dict) -> str:
    numbers = side["images_per_second"]
    low, high = numbers["lowest"], numbers["highest"]
    return f"{numbers['median']:,.0f} ({low:,.0f}-{high:,.0f})"


def ratio(found: dict | None) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else ""


def add_timing_options(parser: argparse.ArgumentParser, part: str) -> None:
    """Adds how long to time, on what, and where the result goes, written after each `part`."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window")
    add_options(parser)
    parser.add_argument("--out", type=Path, help=f"result file (JSON), written after each {part}")
    results.add_show(parser)


def check_timing(args: argparse.Namespace) -> None:
    """Raises `UserError` for a number that cannot be timed with."""
    if args.rounds < 1 or args.seconds <= 0 or args.threads < 0:
        raise UserError("--rounds must be at least 1, --seconds above 0, --threads 0 or more")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(CASE_SETS)
    parser.add_argument("--cases", default="table", help=f"{names}, or KIND/RECIPE:BATCH,...")
    parser.add_argument("--peers", default="", help="PyTorch peers, by commas; empty: all")
    parser.add_argument("--ours", default="ours", help="our sides, e.g. ours,ours-lax,ours-step")
    add_timing_options(parser, "case")
    args = parser.parse_args()
    if results.shown(args, table):
        return
    check_timing(args)
    result = benchmark(args)
    print(table(result))


def check_sides(names: list[str]) -> None:
    """Raises `UserError` for a side that does not exist."""
    valid = sorted({name.partition("@")[0] for name in PEERS})
    for name in names:
        kind, at, threads = name.partition("@")
        if kind.split("-")[0] != "ours" and kind not in valid:
            raise UserError(f"unknown peers {kind}; valid: {', '.join(valid)}")
        if at and (not threads.isdecimal() or int(threads) < 1):
            raise UserError(f"{name}: after @ comes a number of processors, such as eager@1")


def benchmark(args: argparse.Namespace) -> dict:
    """Runs all cases and returns the result that `table` shows."""
    cases = cases_from(args.cases)
    names = args.peers.split(",") if args.peers else list(PEERS)
    if not args.peers and args.device == "gpu":
        names = [name for name in names if "@" not in name]
    check_sides([*names, *args.ours.split(",")])
    shared = ("device", "precision", "threads", "dataset", "data_dir")
    options = {name: getattr(args, name) for name in shared}
    mine = args.ours.split(",")
    peers = [Worker(name, **options) for name in names]
    result = {
        **results.header(),
        "ours": mine,
        **options,
        "rounds": args.rounds,
        "window_seconds": args.seconds,
        "cases": [],
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            for case in cases:
                # A process for each case, as each run of `cifar_jax.train` is one.
                ours = [Worker(name, **options) for name in mine]
                try:
                    row = measure(
                        case,
                        ours,
                        peers,
                        Path(folder),
                        precision=args.precision,
                        rounds=args.rounds,
                        seconds=args.seconds,
                    )
                    described = {w.side: w.ask(do="describe") for w in [*ours, *peers]}
                finally:
                    for worker in ours:
                        worker.close()
                result["cases"].append(row)
                result["workers"] = described
                print(f"{case}: {ratio(row['ratio'])} of {row['strongest']}", file=sys.stderr)
                results.write(args.out, result)
    finally:
        for worker in peers:
            worker.close()
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
