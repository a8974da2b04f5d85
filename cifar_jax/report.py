"""Makes the page of a run: `python -m cifar_jax.report runs/dropout-seed42`.

One directory, of a run or of `--seeds`, gets its `report.html` anew; several are set side by side
in one page, `report.html` in the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.runtime.errors import UserError, notice, run_command


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.report", description=__doc__)
    parser.add_argument("runs", type=cli.path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--output",
        type=cli.path,
        metavar="FILE",
        help="where the page goes (default: RUN/report.html; of several runs ./report.html)",
    )
    parser.add_argument(
        "--csv", action="store_true", help="write predictions.csv into each run directory too"
    )
    group = parser.add_argument_group("data", "the images of the gallery; nothing is downloaded")
    group.add_argument(
        "--data-dir", type=cli.path, help="tfds directory (else TFDS_DATA_DIR, then ~/...)"
    )
    return parser


def test_split(config: dict, data_dir: str | None):
    """Returns the test split of a run's data set, or None, with a line on stderr that says why."""
    from cifar_jax.datasets import load_dataset

    data = config["dataset"]
    side = data["image_shape"][0]
    try:
        dataset = load_dataset(
            data["name"],
            data_dir=data_dir,
            image_size=None if side == 32 else side,
            test_fraction=data.get("test_fraction", 0.0),
            download=False,
            progress=False,
        )
    except UserError as error:
        notice(f"no gallery: {error}")
        return None
    if dataset.fingerprint != data["fingerprint"]:
        notice(f"no gallery: {dataset.source} holds other images than those of the run")
        return None
    return dataset.splits["test"]


def write_csv(folder: Path) -> None:
    """Writes `predictions.csv` of a run, or of each run in a directory of many.

    Raises:
      UserError: there is no `predictions.npz`.
    """
    from cifar_jax.reporting import predictions, run_files

    run = run_files.read_run(folder)
    for place in [folder / f"seed-{seed}" for seed in run.seeds] or [folder]:
        said, _ = predictions.read(place)
        if said is None:
            raise UserError(f"{place} holds no {predictions.NPZ}; runs of this version write it")
        predictions.write_csv(place, said, run.class_names)


def main(arguments: Sequence[str] | None = None, say=print) -> Path:
    """Parses, writes the page, says where. Returns its path. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax.reporting import page, run_files

    folders = [Path(run) for run in options.runs]
    one = len(folders) == 1
    target = Path(options.output or (folders[0] / page.NAME if one else page.NAME))
    if target.is_dir():
        raise UserError(f"{target} is a directory; name a file")
    run = run_files.read_run(folders[0])
    tested = test_split(run.config, options.data_dir) if one else None
    for folder in folders if options.csv else ():
        write_csv(folder)
    page.write(folders, target, tested)
    say(f"Written to {target}")
    return target


if __name__ == "__main__":
    sys.exit(run_command(main))
