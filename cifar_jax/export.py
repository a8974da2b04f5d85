"""A trained model as one file for serving: `python -m cifar_jax.export runs/dropout-seed42 OUT`.

uint8 images [batch, height, width, 3] of any batch size in, float32 probabilities [batch, classes]
out; the weights and the normalisation are inside. OUT.json beside it says what the classes are.

- OUT.stablehlo: a `jax.export` artifact, which JAX alone runs on CPUs and NVIDIA GPUs.
- OUT.onnx: through jax2onnx, which needs the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.errors import UserError, nearest, run_command

FORMATS = ("stablehlo", "onnx")  # each is written to files that end in its name
PLATFORMS = ("cpu", "cuda")
# The newest that ONNX Runtime of two years ago reads; nothing here needs a later one.
OPSET = 21


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.export", description=__doc__)
    parser.add_argument(
        "run", type=cli.path, help="a run directory, its checkpoints, or one checkpoint"
    )
    parser.add_argument("out", type=cli.path, help="file to write; OUT.json is written beside it")
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--format", help="stablehlo or onnx (default: by the ending of OUT)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    cli.add_trust_option(parser)
    return parser


def format_of(out: str, asked: str | None) -> str:
    """Returns the format in which a file of this name is to be written.

    Args:
      asked: by `--format`, which a name that ends otherwise needs.

    Raises:
      UserError: no such format, or the name ends in none of them or in another one.
    """
    endings = [f".{name}" for name in FORMATS]
    ending = Path(out).suffix.lower()
    if asked is not None and asked not in FORMATS:
        raise UserError(f"unknown --format {asked!r}; {nearest(asked, FORMATS)}")
    if ending not in endings:
        if asked is not None:
            return asked
        raise UserError(
            f"{out}: an exported model ends in {' or '.join(endings)}, or --format says what it "
            "is; files of weights are written by python -m cifar_jax.convert"
        )
    if asked not in (None, ending[1:]):
        raise UserError(f"{out} ends in {ending}, --format says {asked}; give one of them")
    return ending[1:]


def serving_function(trained) -> Callable:
    """Returns `images uint8 [N, H, W, 3] -> probabilities float32 [N, classes]`.

    Args:
      trained: an `evaluation.Trained`, loaded with `lowering="lax"` so that it runs anywhere.
    """
    import jax

    from cifar_jax import steps

    def probabilities(images):
        logits = steps.predict_step(
            trained.variables, images, model=trained.model, preprocess=trained.preprocess
        )
        return jax.nn.softmax(logits)

    return probabilities


def to_stablehlo(trained) -> bytes:
    """Returns the serialized `jax.export.Exported` of a trained model, for `PLATFORMS`."""
    import jax
    import jax.numpy as jnp
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *trained.config.dataset["image_shape"]), jnp.uint8)
    exported = export.export(jax.jit(serving_function(trained)), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def to_onnx(trained) -> bytes:
    """Returns a trained model as an ONNX file's content: `images` in, `probabilities` out.

    Raises:
      UserError: jax2onnx is not installed, or cannot write this model.
    """
    import jax
    import jax.numpy as jnp

    try:
        import jax2onnx
    except ImportError as error:
        raise UserError(
            f"ONNX files need the extra `onnx` (pip install '.[onnx]'): {error}; "
            "the format stablehlo needs nothing"
        ) from None
    images = jax.ShapeDtypeStruct(("batch", *trained.config.dataset["image_shape"]), jnp.uint8)
    try:
        with _errors_alone("onnx_ir", "jax2onnx"):
            model = jax2onnx.to_onnx(
                serving_function(trained),
                [images],
                model_name=trained.config.recipe.model,
                opset=OPSET,
                input_names=["images"],
                output_names=["probabilities"],
            )
    except Exception as error:  # what it does not know ends in nearly anything: `--resize`, for one
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"jax2onnx cannot write this model ({type(error).__name__}: {reason}); "
            "the format stablehlo can"
        ) from None
    return model.SerializeToString()


@contextlib.contextmanager
def _errors_alone(*names: str) -> Iterator[None]:
    """Keeps the warnings of these loggers off the screen meanwhile: of parts of theirs that this
    JAX does not fit and that nothing here needs."""
    loggers = [logging.getLogger(name) for name in names]
    former = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, former, strict=True):
            logger.setLevel(level)


def describe(trained, kind: str, content: bytes) -> dict:
    """Returns what OUT.json holds."""
    config = trained.config
    shape = config.dataset["image_shape"]
    return {
        "format": kind,
        "sha256": hashlib.sha256(content).hexdigest(),
        "model": config.recipe.model,
        "dataset": config.dataset["name"],
        "class_names": trained.class_names,
        "image_shape": shape,
        "input": f"uint8 [batch, {', '.join(map(str, shape))}], RGB from 0 to 255",
        "output": f"float32 [batch, {len(trained.class_names)}], probabilities",
        "normalize": config.recipe.normalize,
        "precision": config.recipe.precision,
        "step": trained.step,
        "platforms": list(PLATFORMS) if kind == "stablehlo" else [],
        "versions": environment()["versions"],
    }


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, exports, prints. Returns what OUT.json holds. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax.runtime.files import check_target, new_file
    from cifar_jax.training import evaluation

    kind = format_of(options.out, options.format)
    out, beside = Path(options.out), Path(f"{options.out}.json")
    for path in (out, beside):
        check_target(path, options.overwrite)
    which = cli.checkpoint_name(options.checkpoint)
    trained = evaluation.load(options.run, which, lowering="lax", trust_code=options.trust_code)
    for line in trained.notices:
        say(f"warning: {line}")
    content = (to_onnx if kind == "onnx" else to_stablehlo)(trained)
    facts = describe(trained, kind, content)
    with new_file(beside, overwrite=options.overwrite) as part:
        part.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with new_file(out, overwrite=options.overwrite) as whole:
            whole.write_bytes(content)
    say(f"{facts['model']} after step {trained.step}, from {trained.directory}")
    say(f"{facts['input']} -> {facts['output']}")
    say(f"Written: {out} ({kind}, {len(content) / 1e6:.1f} MB) and {beside}")
    return facts


if __name__ == "__main__":
    cli.stay_on_cpu()
    sys.exit(run_command(main))
