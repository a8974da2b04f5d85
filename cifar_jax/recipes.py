"""Recipes: the published runs this project reproduces, and where its other networks start from.

`Recipe`, the class of them, is in `settings.py`. Figures ("published") are what the PyTorch
write-ups printed from their own single run.
"""

from __future__ import annotations

from cifar_jax.settings import Recipe

# No published run: settings in common use for networks with batch normalisation from scratch.
_FROM_SCRATCH = Recipe(
    normalize="cifar10",
    augment=("flip", "translate"),
    validation_fraction=0.1,
    epochs=30,
    batch_size=128,
    learning_rate=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=1.0,
)

_NORMS = ("layers_1/norm", "layers_2/norm", "layers_3/norm")  # of airbench's groups

# What airbench95 and airbench96 share: SGD with decoupled numbers, which are per 1,024 images and
# for steps as large as gradients. Their steps an epoch: 50,000 // 1,024 = 48.
_AIRBENCH_STEP = 1024 * (1 + 1 / (1 - 0.85))


def _airbench_sgd(rate: float, decay: float, **settings) -> Recipe:
    """A recipe of airbench's before Muon; `rate` and `decay` as it states them."""
    return Recipe(
        normalize="cifar10",
        batch_size=1024,
        drop_last=True,
        eval_batch_size=2000,
        learning_rate=rate / _AIRBENCH_STEP,
        momentum=0.85,
        nesterov=True,
        weight_decay=decay * 1024 / rate,
        loss_reduction="sum",
        schedule="linear",
        warmup_factor=0.2,
        label_smoothing=0.2,
        freeze=("whiten/kernel",),
        rate_scale=tuple(f"{norm}=64.0" for norm in _NORMS),
        decay_scale=tuple(f"{norm}={1 / 64!r}" for norm in _NORMS),
        stop_epochs=("whiten=3",),
        lookahead=5,
        whitening_images=5000,
        tta="mirror-shift",
        **settings,
    )


_RESIDUAL = Recipe(
    normalize="cifar10",
    augment=("flip", "translate"),
    batch_size=128,
    learning_rate=0.1,
    momentum=0.9,
    schedule="cosine",
)


# See "airbench94" below.
_AIRBENCH94 = Recipe(
    model="airbench",
    normalize="cifar10",
    augment=("alternating_flip", "translate"),
    translate_pixels=2,
    epochs=8,
    batch_size=2000,
    drop_last=True,
    eval_batch_size=2000,
    optimizer="muon",
    learning_rate=0.24,
    momentum=0.85,
    muon_momentum=0.6,
    nesterov=True,
    rescale_filters=True,
    weight_decay=0.004,
    decay_scale=(f"head={1 / 0.67!r}", *(f"{g}={1 / 0.053!r}" for g in ("whiten", "layers"))),
    loss_reduction="sum",
    schedule="linear",
    label_smoothing=0.2,
    freeze=("whiten/kernel",),
    rate_scale=(
        f"head={0.67 / 0.24!r}",
        *(f"{g}={0.053 / 0.24!r}" for g in ("whiten", *_NORMS)),
    ),
    rate_epochs=("whiten=3",),
    whitening_images=5000,
    tta="mirror-shift",
)

RECIPES: dict[str, Recipe] = {
    # python -m cifar_jax.train --recipe tutorial
    # The PyTorch tutorial (yudonggeun.github.io, 2019, and a second author's run of it).
    # Published test accuracy: 55 % and 54 %; mean loss over each 2,000 batches
    # 2.192, 1.824, 1.647, 1.546, 1.505, 1.461 | 1.396, 1.362, 1.340, 1.325, 1.298, 1.272.
    "tutorial": Recipe(
        model="tutorial_cnn",
        epochs=2,
        batch_size=4,
        learning_rate=0.001,
        momentum=0.9,
        log_every=2000,
    ),
    # python -m cifar_jax.train --recipe deep
    # gjustin40, 2020-12-18: plain SGD; the text says 0.01, its printout of the optimizer 0.05.
    # Published test accuracy: 46.37 %. Its published losses start at a mean of 1.473 in epoch
    # 1, so that run probably went on from trained weights.
    "deep": Recipe(
        model="deep_cnn",
        normalize="unit",
        epochs=10,
        batch_size=16,
        learning_rate=0.01,
    ),
    # python -m cifar_jax.train --recipe adam
    # HyunMin Kim, 2023-05-07: the tutorial network, 40,000/10,000 split, seed 42.
    # Published: validation accuracy 42.42 % after epoch 1, 58.56 % after epoch 10; test 58 %.
    "adam": Recipe(
        model="tutorial_cnn",
        validation_fraction=0.2,
        epochs=10,
        batch_size=128,
        optimizer="adam",
        learning_rate=0.001,
        log_every=100,
    ),
    # python -m cifar_jax.train --model dropout_cnn
    # Udacity lesson notes, 2020-05-08: the weights of the lowest validation loss are tested.
    # Published: lowest validation loss 0.759594 at epoch 23; test loss 0.753790, test accuracy
    # 74 % (7451/10000).
    "dropout": Recipe(
        model="dropout_cnn",
        validation_fraction=0.2,
        epochs=30,
        batch_size=20,
        learning_rate=0.01,
        select_best=True,
    ),
    # python -m cifar_jax.train --model vgg16
    # HyunMin Kim, as `adam`, from ImageNet's weights, all layers trained, images not resized.
    # Published: validation accuracy by epoch 34.89, 59.82, 67.57, 75.64, 77.98, 78.29, 80.36,
    # 77.58, 78.98, 80.79 %; test 80.15 % (plane 84.7, car 83.4, bird 68.9, cat 66.3, deer 88.8,
    # dog 68.7, frog 85.0, horse 83.6, ship 89.1, truck 83.0).
    "vgg16_finetune": Recipe(
        model="vgg16",
        validation_fraction=0.2,
        epochs=10,
        batch_size=128,
        optimizer="adam",
        learning_rate=0.001,
        log_every=100,
    ),
    # python -m cifar_jax.train --model vgg16_bn
    # python -m cifar_jax.train --model vgg11_bn
    "vgg16_bn": _FROM_SCRATCH.replace(model="vgg16_bn"),
    "vgg11_bn": _FROM_SCRATCH.replace(model="vgg11_bn"),
    # python -m cifar_jax.train --model resnet18
    # The settings of kuangliu's pytorch-cifar, whose table gives 93.02 %; not yet run here.
    "resnet18": _RESIDUAL.replace(model="resnet18", epochs=200, weight_decay=5e-4),
    # python -m cifar_jax.train --model resnet20
    # He et al., arXiv:1512.03385, section 4.2: 91.25 % after 64,000 steps, with the rate divided by
    # 10 after 32,000 and 48,000 of them and 5,000 images held out; here it falls as a cosine.
    "resnet20": _RESIDUAL.replace(model="resnet20", epochs=164, weight_decay=1e-4),
    # python -m cifar_jax.train --model airbench
    # KellerJordan/cifar10-airbench, `airbench94_muon.py` (2024), after arXiv:2404.00498. Published:
    # mean test accuracy 94.01 % over 200 runs with `tta` mirror-shift, in 2.59 s on an A100.
    # Its rates: filters .24 (by Muon), biases .053, the head .67; its decay is 2e-6 * 2000 / rate.
    "airbench94": _AIRBENCH94,
    # python -m cifar_jax.train --recipe speedrun94
    # Our own: the first 40 % of those steps on images of 24 pixels (progressive resizing). No
    # published run.
    "speedrun94": _AIRBENCH94.replace(low_resolution="24:0.4"),
    # python -m cifar_jax.train --model airbench95
    # `airbench95.py` there. Published: 95.01 % over 200 runs, in 10.4 s on an A100. The rate rises
    # over the first 23 % of the 720 steps, 165 of them.
    "airbench95": _airbench_sgd(
        10.0,
        0.0153,
        model="airbench95",
        augment=("alternating_flip", "translate"),
        translate_pixels=2,
        epochs=15,
        warmup_epochs=165 / 48,
        end_factor=0.07,
    ),
    # python -m cifar_jax.train --model airbench96
    # `airbench96.py` there, of June 2024. Published: 96.01 % over 400 runs, in 31 epochs (the
    # 46.3 s on an A100 are of an earlier form of 40). A later one, `airbench96_faster.py`, trains
    # on the harder half of each batch, which this does not.
    "airbench96": _airbench_sgd(
        9.0,
        0.012,
        model="airbench96",
        augment=("alternating_flip", "translate", "cutout"),
        translate_pixels=4,
        cutout_size=12,
        epochs=31,
        warmup_epochs=148 / 48,
    ),
}

# The recipe that `--model X` means when no recipe is named.
MODEL_RECIPES = {
    "tutorial_cnn": "tutorial",
    "deep_cnn": "deep",
    "dropout_cnn": "dropout",
    "vgg16": "vgg16_finetune",
    "vgg11_bn": "vgg11_bn",
    "vgg16_bn": "vgg16_bn",
    "airbench": "airbench94",
    "airbench95": "airbench95",
    "airbench96": "airbench96",
    "resnet18": "resnet18",
    "resnet20": "resnet20",
}


# What the write-ups printed from their own single runs of the recipes.

# Test accuracy in percent, and the test loss where they gave one; each class's accuracy in label
# order.
PUBLISHED = {
    "tutorial": {
        "accuracy": [55.0, 54.0],
        "per_class": [58, 73, 46, 46, 44, 31, 72, 51, 61, 59],
    },
    "adam": {
        "accuracy": [58.0],
        "per_class": [60.8, 60.4, 57.8, 36.4, 46.7, 43.1, 78.3, 60.2, 73.5, 68.4],
    },
    "dropout": {
        "accuracy": [74.51],
        "loss": 0.753790,
        "per_class": [81.6, 88.1, 62.9, 57.0, 66.3, 66.6, 84.9, 77.4, 83.9, 76.4],
    },
    "deep": {"accuracy": [46.37]},
}


def published_accuracies(name: str, recipe: Recipe, dataset: str) -> list[float]:
    """Returns the published test accuracies, in percent, of the recipe called `name`; [] where
    there are none, or where `recipe` or the data set is not that of the published run."""
    if name not in PUBLISHED or dataset != RECIPES[name].dataset:
        return []
    reporting = {"eval_batch_size": 1, "log_every": 1}  # what has no part in the result
    same = recipe.replace(**reporting) == RECIPES[name].replace(**reporting)
    return list(PUBLISHED[name]["accuracy"]) if same else []
