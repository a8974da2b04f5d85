"""Weights as a file: `python -m cifar_jax.convert runs/dropout-seed42 dropout.safetensors`.

Takes a run, one of its checkpoints, or another file of weights, and writes .safetensors, or .pth
or .pt (PyTorch's own, which needs the extra `torch`): a state dict with PyTorch's names, shapes
and layouts, for `load_state_dict(..., strict=True)`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.runtime.errors import run_command


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.convert", description=__doc__)
    parser.add_argument(
        "source", type=cli.path, help="a run directory, a checkpoint in one, or a file of weights"
    )
    parser.add_argument("out", type=cli.path, help="file to write: .safetensors, .pth or .pt")
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    cli.add_trust_option(parser)
    return parser


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, converts, prints. Returns {"entries", "sha256", "step"}. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax.reporting.console import counted
    from cifar_jax.runtime import files
    from cifar_jax.weights import files as weight_files
    from cifar_jax.weights import init_from

    weight_files.check_ending(options.out)
    files.check_target(options.out, options.overwrite)
    which = cli.checkpoint_name(options.checkpoint)
    if Path(options.source).is_dir():
        trained, weights = init_from.of_run(options.source, which, options.trust_code)
        recipe, step = trained.config.recipe, trained.step
        origin = f"{recipe.model} after step {step}, from {trained.directory}"
        metadata = {
            "model": recipe.model,
            "classes": json.dumps(trained.class_names, ensure_ascii=False),
            "image_shape": json.dumps(trained.config.dataset["image_shape"]),
            "normalize": recipe.normalize,
            "step": str(step),
        }
    else:
        weights = init_from.read(options.source, which)
        origin, metadata, step = options.source, weights.metadata, None
    for line in weights.notices:
        say(f"notice: {line}")
    weight_files.write(options.out, weights.state, metadata, overwrite=options.overwrite)
    entries = len(weights.state)
    say(f"{origin}: {counted(entries, 'entry', 'entries')} written to {options.out}")
    return {
        "entries": entries,
        "sha256": weight_files.content_hash(weights.state),
        "step": step,
    }


if __name__ == "__main__":
    cli.stay_on_cpu()
    sys.exit(run_command(main))
