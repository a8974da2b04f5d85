"""A side in a resident process: one JSON request a line on stdin, one answer a line on stdout.

{"do": "prepare", "case": "train/dropout:128", "weights": FILE, "seconds": 1.0}
    -> {"losses", "compile_seconds", "data_seconds", ...} or {"not_run": REASON}
{"do": "window"} -> {"images", "seconds"}
{"do": "describe"} -> {"versions", "processors", "peak_memory_bytes", ...}
{"do": "drop"} -> {}      frees the case
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from cifar_jax.runtime.environment import peak_bytes
from cifar_jax.runtime.errors import UserError


class Worker:
    """The driver's end of a worker process.

    Args:
      side: `ours`, `ours-one` (one device), `ours-step` (a bare jitted step, on one device),
        `ours-unfolded`, `ours-plain` (`plain_networks.py`), `ours-LOWERING`, several such words
        (`ours-step-lax`), or a PyTorch peer's name; `map-16`, `vmap-16` or `torch-vmap-16` for so
        many replicas (`replica_sides.py`); any of them with `@N` for a number of processors of its
        own, such as `eager@1`.
      options: of `add_options`, by name, for the worker's command line.
    """

    def __init__(self, side: str, **options):
        self.side = side
        name, _, threads = side.partition("@")
        if threads:
            options["threads"] = int(threads)
        command = [sys.executable, "-m", "benchmarks.worker", name]
        for name, value in options.items():
            if value is not None:
                command.append(f"--{name.replace('_', '-')}={value}")
        environment = dict(os.environ)
        if options.get("device") == "gpu":
            # Several processes share the card.
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def ask(self, **request) -> dict:
        """Sends a request and waits for its answer.

        Raises:
          UserError: the worker cannot work, for want of data or of a device.
          RuntimeError: the worker ended; its own message is on stderr.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker {self.side} ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process: it stops at the end of its input."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def is_ours(side: str) -> bool:
    """Whether a side is JAX, and not PyTorch."""
    return side.split("-")[0] in ("ours", "map", "vmap")


def make_side(name: str, device: str):
    """Returns the side called `name` (see `Worker`)."""
    from benchmarks.sides import Ours, OurStep
    from benchmarks.torch_side import PyTorch

    form, _, replicas = name.rpartition("-")
    if replicas.isdecimal():
        from benchmarks.replica_sides import OurReplicas, TorchReplicas

        if form == "torch-vmap":
            return TorchReplicas(int(replicas), "cuda" if device == "gpu" else "cpu")
        return OurReplicas(form, int(replicas))
    if name.split("-")[0] != "ours":
        return PyTorch(name, "cuda" if device == "gpu" else "cpu")
    words = name.split("-")[1:]
    lowerings = [word for word in words if word not in ("step", "unfolded", "one", "plain")]
    lowering, fold = lowerings[0] if lowerings else "auto", "unfolded" not in words
    if "step" in words:
        return OurStep(lowering, fold)
    devices = "1" if "one" in words else "auto"
    return Ours(lowering, fold, devices, plain="plain" in words)


def describe(side: str) -> dict:
    """Returns versions, processors and threads, and the process's peak memory so far."""
    import platform
    import resource

    out = {
        "peak_memory_bytes": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)),
        "processors": len(os.sched_getaffinity(0)),
    }
    versions = {"python": platform.python_version()}
    if is_ours(side):
        import flax
        import jax
        import jaxlib
        import optax

        versions |= {m.__name__: m.__version__ for m in (jax, jaxlib, flax, optax)}
        out["device"] = str(jax.devices()[0].device_kind)
        out["devices"] = len(jax.devices())
    elif importlib.util.find_spec("torch"):
        import torch

        versions["torch"] = torch.__version__
        out["threads"] = torch.get_num_threads()
    return out | {"versions": versions}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every worker shares with the driver."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="processors a side; 0: all")
    parser.add_argument("--dataset", default="cifar10", help="any prepared set of 32x32 images")
    parser.add_argument("--data-dir", default=None, help="directory of prepared data sets")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side")
    add_options(parser)
    args = parser.parse_args()
    # Whatever a library prints goes to stderr; stdout carries answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.threads:
        # Before any library counts the processors to size its pool.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if is_ours(args.side):
        from cifar_jax.runtime import compilation_cache

        compilation_cache.enable()

    from benchmarks.cases import parse
    from cifar_jax.datasets import load_dataset
    from cifar_jax.parallel import hardware

    try:
        dataset, problem = load_dataset(args.dataset, data_dir=args.data_dir, progress=False), None
    except UserError as error:
        problem = str(error)
    side = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict = {}
        if request["do"] == "prepare" and not problem:
            case = parse(request["case"])
            side = make_side(args.side, args.device)
            if is_ours(args.side):  # the first case says how many threads this process has
                try:
                    hardware.select_platform(args.device, side.cpu_threads(case))
                except UserError as error:
                    problem = str(error)
        if problem:
            answer = {"error": problem}
        elif request["do"] == "prepare":
            try:
                answer = side.prepare(
                    case,
                    dataset,
                    args.precision,
                    Path(request["weights"]),
                    request["seconds"],
                )
            except Exception as error:
                answer = not_run(error)
        elif request["do"] == "window":
            images, seconds = side.window()
            answer = {"images": images, "seconds": seconds}
        elif request["do"] == "describe":
            answer = describe(args.side)
        elif request["do"] == "drop":
            side = None
            gc.collect()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def not_run(error: Exception) -> dict:
    """An answer for what `NotRun`, a failed compilation or too little memory mean: not run.

    A defect of ours would also end here; its reason stands in the table, where it is seen, and
    its traceback on stderr.
    """
    import traceback

    if type(error).__name__ != "NotRun":
        traceback.print_exc()
    lines = str(error).strip().splitlines() or [""]
    return {"not_run": f"{type(error).__name__}: {lines[0]}".removeprefix("NotRun: ")}


if __name__ == "__main__":
    main()
