"""`python -m cifar_jax.datasets prepare NAME` and `python -m cifar_jax.datasets list`."""

from __future__ import annotations

import sys

from cifar_jax import _cli as cli
from cifar_jax import datasets
from cifar_jax.datasets import locate
from cifar_jax.runtime.errors import run_command


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = cli.Parser(add_help=False)
    shared.add_argument("--data-dir", type=cli.path, help="a tfds data directory")
    prepare = commands.add_parser(
        "prepare", parents=[shared], help="make a data set ready: fetch or draw, write, decode"
    )
    prepare.add_argument("name", help=f"{', '.join(datasets.BUILT_IN)}, or a prepared tfds set")
    prepare.add_argument(
        "--archive", type=cli.path, help="a CIFAR archive or the folder extracted from it"
    )
    prepare.add_argument("--url", help="another address of the same archive")
    prepare.add_argument("--image-size", type=cli.positive, help="resize images to so many pixels")
    commands.add_parser("list", parents=[shared], help="show the sets prepared on this machine")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse(argv)
    if args.command == "list":
        found = list(locate.list_prepared(locate.search_dirs(args.data_dir)))
        for path in found:
            print(f"{path}  {locate.file_format_of(path)}")
        if not found:
            print(f"none in {', '.join(map(str, locate.search_dirs(args.data_dir)))}")
        return
    dataset = datasets.load_dataset(
        args.name,
        data_dir=args.data_dir,
        archive=args.archive,
        url=args.url,
        image_size=args.image_size,
    )
    counts = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    print(f"{dataset.source}: {counts} images, {dataset.num_classes} classes")


if __name__ == "__main__":
    sys.exit(run_command(main))
