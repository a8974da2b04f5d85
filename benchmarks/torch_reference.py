"""Whole PyTorch runs of the recipes: the accuracies and losses ours are held against.

    python -m benchmarks.torch_reference --recipe tutorial --peer eager --seeds 0:8 --out F.jsonl

appends one JSON line a seed and leaves out the seeds that F.jsonl already holds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import hardware
from benchmarks.torch_published import PublishedTrainer
from benchmarks.torch_trainers import (
    CompileMaxAutotuneTrainer,
    CompileReduceOverheadTrainer,
    CompileTrainer,
    CudaGraphTrainer,
    EagerTrainer,
    NotRun,
    Trainer,
)
from cifar_jax.recipes import RECIPES, Recipe
from cifar_jax.runtime.errors import UserError, lookup, run_command

PEERS: dict[str, Callable[..., Trainer]] = {
    "published": PublishedTrainer,
    "eager": EagerTrainer,
    "eager_channels_last": functools.partial(EagerTrainer, channels_last=True),
    "compile": CompileTrainer,
    "compile_channels_last": functools.partial(CompileTrainer, channels_last=True),
    "compile_max_autotune": CompileMaxAutotuneTrainer,
    "compile_reduce_overhead": CompileReduceOverheadTrainer,
    "cudagraph": CudaGraphTrainer,
    "cudagraph_channels_last": functools.partial(CudaGraphTrainer, channels_last=True),
}


def split_indices(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (training, validation) indices: a random `fraction` of `count` is held out."""
    order = np.random.default_rng([seed, 1]).permutation(count)
    held_out = round(count * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns an epoch's batches of indices; the last may be smaller."""
    order = np.random.default_rng([seed, 2, epoch]).permutation(count)
    return np.split(order, range(batch_size, count, batch_size))


def train_peer(
    recipe: str | Recipe,
    peer: str,
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    initial_state: dict[str, torch.Tensor] | None = None,
    order: Sequence[np.ndarray] | None = None,
    max_steps: int | None = None,
    device: str = "cpu",
    workers: int | None = None,
    report: Callable[[dict], None] | None = None,
) -> dict:
    """Trains one run with a peer and returns what it measured.

    Args:
      recipe: a `Recipe` or a name in `RECIPES`.
      peer: a name in `PEERS`.
      images, labels: uint8 [N, 32, 32, 3], int [N]; the recipe's validation fraction is taken
        from these by `seed`, unless `order` says what to train on.
      test: images and labels tested once, at the end.
      initial_state: a state dict; by default PyTorch's own initialisation from `seed`.
      order: the batches of indices of the whole run, in place of epochs over a random split.
      max_steps: stop after so many steps, with no evaluation of a cut epoch.
      workers: the published loop's DataLoader workers; None measures and takes the fastest.
      report: called with each epoch's row.

    Returns:
      {"losses": float32 [steps], "epochs": [rows], "model": the trained module,
      "seconds": of training and validation, and with `test` "test_loss", "test_accuracy",
      "test_correct", "per_class" (correct in each class), "best_epoch"}. A row holds epoch,
      train_loss and, with a split, val_loss and val_accuracy.

    Raises:
      NotRun: the peer cannot run on this machine.
      UserError: unknown recipe or peer.
    """
    recipe = lookup(RECIPES, recipe, "recipe") if isinstance(recipe, str) else recipe
    make = lookup(PEERS, peer, "peer")
    fraction = 0.0 if order is not None else recipe.validation_fraction
    kept, held_out = split_indices(len(images), fraction, seed)
    if order is None:
        images, held_images, labels, held_labels = (
            images[kept], images[held_out], labels[kept], labels[held_out],
        )  # fmt: skip
        epochs = (
            epoch_order(len(images), recipe.batch_size, seed, epoch)
            for epoch in range(recipe.epochs)
        )
    else:
        epochs = iter([list(order)])
    trainer = make(recipe, images, labels, seed=seed, initial_state=initial_state, device=device)
    if workers is not None:
        trainer.workers = workers
    validation = trainer.place(held_images, held_labels) if len(held_out) else None
    losses, rows, steps = [], [], 0
    best_loss, best_epoch, best_state = float("inf"), None, None
    start = time.perf_counter()
    for epoch, batches in enumerate(epochs, start=1):
        cut = max_steps is not None and steps + len(batches) > max_steps
        batches = batches[: max_steps - steps] if cut else batches
        if batches:
            losses.append(trainer.run(batches).float().cpu().numpy())
            steps += len(batches)
        if cut:
            break
        row = {"epoch": epoch, "train_loss": float(losses[-1].astype(np.float64).mean())}
        if validation is not None:
            result = trainer.evaluate(validation, recipe.eval_batch_size)
            row |= {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
            if recipe.select_best and result["loss"] < best_loss:
                best_loss, best_epoch = result["loss"], epoch
                best_state = copy.deepcopy(trainer.model.state_dict())
        rows.append(row)
        if report is not None:
            report(row)
    trainer.sync()
    out = {
        "losses": np.concatenate(losses) if losses else np.zeros(0, np.float32),
        "epochs": rows,
        "model": trainer.model,
        "seconds": time.perf_counter() - start,
        "best_epoch": best_epoch,
    }
    if best_state is not None:
        trainer.model.load_state_dict(best_state)
    if test is not None:
        result = trainer.evaluate(trainer.place(*test), recipe.eval_batch_size)
        out |= {
            "test_loss": result["loss"],
            "test_accuracy": result["accuracy"],
            "test_correct": result["correct"],
            "per_class": result["per_class"],
        }
    return out


def seeds_from(text: str) -> list[int]:
    """`3`, `0:8` (8 not included) or `1,5,9` -> the list. Raises `UserError` on anything else."""
    try:
        if ":" in text:
            first, last = (int(part) for part in text.split(":"))
            seeds = list(range(first, last))
        else:
            seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {text!r} is not a range such as 0:8 or a list such as 1,5,9")
    return seeds


def seeds_done(path: Path, recipe: Recipe, peer: str) -> set[int]:
    """Returns the seeds that `path` holds for this recipe, exactly as it is set, and peer.

    A setting that a line does not know had its default when the line was written.
    """
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row["peer"] == peer]
    return {row["seed"] for row in rows if Recipe.from_dict(row["settings"]) == recipe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--peer", default="eager", help=f"one of {', '.join(PEERS)}")
    parser.add_argument("--seeds", default="0:1", help="0:8 or 1,5,9")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch's threads; 0: its own")
    parser.add_argument("--dataset", default=None, help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, help="the published loop's; default: the fastest")
    parser.add_argument(
        "--probe-workers", action="store_true", help="print the fastest number of workers and stop"
    )
    parser.add_argument("--data-dir", default=None, help="directory of prepared data sets")
    args = parser.parse_args()

    recipe = lookup(RECIPES, args.recipe, "recipe")
    if args.epochs is not None:
        recipe = recipe.replace(epochs=args.epochs)
    if args.dataset is not None:
        recipe = recipe.replace(dataset=args.dataset)
    lookup(PEERS, args.peer, "peer")
    seeds = seeds_from(args.seeds)
    if args.out is None and not args.probe_workers:
        raise UserError("--out FILE is missing: where the runs' lines go")
    if args.workers is not None and (args.workers < 0 or args.peer != "published"):
        raise UserError("--workers is the published loop's DataLoader workers, 0 or more")
    if args.threads < 0:
        raise UserError(f"--threads must be 0 or more, got {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)

    from cifar_jax.datasets import load_dataset

    data = load_dataset(recipe.dataset, data_dir=args.data_dir)
    if args.probe_workers:
        print(probe_workers(recipe, data.splits["train"]))
        return
    done = seeds_done(args.out, recipe, args.peer)
    for seed in seeds:
        if seed in done:
            print(f"{args.recipe} seed {seed}: already in {args.out}", file=sys.stderr)
            continue
        run(args, recipe, seed, data)


def probe_workers(recipe: Recipe, split, images: int = 4000) -> int:
    """Returns the DataLoader workers with which the published loop is fastest here."""
    trainer = PEERS["published"](recipe, split.images, split.labels)
    order = epoch_order(len(split.labels), recipe.batch_size, 0, 0)
    return trainer.fastest_worker_count(order[: max(3, images // recipe.batch_size)])


def run(args: argparse.Namespace, recipe: Recipe, seed: int, data) -> None:
    """Trains one seed and appends its line to `args.out`."""

    def report(row: dict) -> None:
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "epoch")
        print(f"{args.recipe} seed {seed} epoch {row['epoch']}: {numbers}", file=sys.stderr)

    train, test = data.splits["train"], data.splits["test"]
    try:
        result = train_peer(
            recipe,
            args.peer,
            seed,
            train.images,
            train.labels,
            test=(test.images, test.labels),
            device=args.device,
            workers=args.workers,
            report=report,
        )
    except NotRun as reason:
        raise UserError(f"peer {args.peer} not run: {reason}") from None
    result = {key: value for key, value in result.items() if key not in ("losses", "model")}
    on_gpu = args.device == "cuda"
    line = {"recipe": args.recipe, "peer": args.peer, "seed": seed} | result
    line |= {
        "settings": recipe.to_dict(),
        "dataset": {
            "name": data.name,
            "version": data.version,
            "fingerprint": data.fingerprint,
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
        "threads": torch.get_num_threads(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
