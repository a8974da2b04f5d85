"""What is measured: a recipe, trained or evaluated, at a batch size."""

from __future__ import annotations

import dataclasses

import numpy as np

from cifar_jax.recipes import RECIPES, Recipe
from cifar_jax.runtime.errors import UserError, lookup

BATCHES = (4, 20, 128, 512, 2048)
PLAIN = "benchmarks/plain_networks.py"  # networks in nothing but Flax
ALL_RECIPES = RECIPES | {
    # A usual rate, 0.1, triples a difference of rounding at every step, so that the first fifty
    # losses of two right sides differ by a hundredth. The speed is the same.
    "small_resnet": Recipe(
        model=f"{PLAIN}:SmallResNet", batch_size=128, learning_rate=0.001, momentum=0.9
    )
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`train/dropout:128` or `eval/dropout:512`."""

    kind: str
    recipe: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.recipe}:{self.batch_size}"

    def settings(self, precision: str = "float32") -> Recipe:
        """The recipe at this batch size, all images for training (a split changes no speed)."""
        sizes = {"batch_size": self.batch_size, "eval_batch_size": self.batch_size}
        recipe = ALL_RECIPES[self.recipe].replace(**sizes, precision=precision)
        return recipe.replace(validation_fraction=0.0, select_best=False)


def parse(text: str) -> Case:
    """`dropout:128`, `train/dropout:128` or `eval/dropout:512` -> a case. Raises `UserError`."""
    kind, _, rest = text.rpartition("/")
    name, _, batch = rest.partition(":")
    kind = kind or "train"
    lookup(ALL_RECIPES, name, "recipe")
    if kind not in ("train", "eval") or not batch.isdecimal() or int(batch) < 1:
        raise UserError(f"case {text!r} is not of the form train/RECIPE:BATCH or eval/RECIPE:BATCH")
    return Case(kind, name, int(batch))


CASE_SETS: dict[str, list[Case]] = {
    "table": [
        *map(parse, ("tutorial:4", "adam:128", "dropout:20", "dropout:128", "deep:16", "deep:64")),
        *map(parse, ("eval/tutorial:512", "eval/dropout:512", "eval/deep:512")),
    ],
    "full": [
        *(Case("train", recipe, batch) for recipe in ("tutorial", "adam", "dropout", "deep")
          for batch in BATCHES),
        *(Case("eval", RECIPE, batch) for RECIPE in ("tutorial", "dropout", "deep")
          for batch in BATCHES),
        parse("vgg16_finetune:128"),
    ],
    "plain": [parse("tutorial:4"), parse("dropout:20"), parse("small_resnet:128")],
    "vgg16": [parse("vgg16_finetune:128"), parse("eval/vgg16_finetune:512")],
}  # fmt: skip


def cases_from(text: str) -> list[Case]:
    """A name in `CASE_SETS`, or cases separated by commas."""
    return CASE_SETS[text] if text in CASE_SETS else [parse(part) for part in text.split(",")]


def full_batches(images: int, batch_size: int) -> np.ndarray:
    """Returns the batches both sides train on, int32 [steps, batch]: one shuffled epoch.

    Raises:
      UserError: the batch is larger than the data set.
    """
    steps = images // batch_size
    if steps == 0:
        raise UserError(f"batch {batch_size} is larger than the {images} images")
    order = np.random.default_rng(7).permutation(images)[: steps * batch_size]
    return order.reshape(steps, batch_size).astype(np.int32)
