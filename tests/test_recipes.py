"""Recipes: the published settings, their JSON, and what is refused."""

import dataclasses
import json
import math

import pytest

from cifar_jax.augment import AUGMENTATIONS, BY_RUN, NORMALIZATIONS
from cifar_jax.models import MODELS
from cifar_jax.recipes import MODEL_RECIPES, RECIPES, Recipe
from cifar_jax.runtime.errors import UserError

# What the write-ups state, field by field.
PUBLISHED = {
    "tutorial": {
        "model": "tutorial_cnn",
        "normalize": "half",
        "validation_fraction": 0.0,
        "optimizer": "sgd",
        "learning_rate": 0.001,
        "momentum": 0.9,
        "batch_size": 4,
        "epochs": 2,
        "select_best": False,
        "log_every": 2000,
    },
    "deep": {
        "model": "deep_cnn",
        "normalize": "unit",
        "validation_fraction": 0.0,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.0,
        "batch_size": 16,
        "epochs": 10,
        "select_best": False,
    },
    "adam": {
        "model": "tutorial_cnn",
        "normalize": "half",
        "validation_fraction": 0.2,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "batch_size": 128,
        "epochs": 10,
        "select_best": False,
        "log_every": 100,
    },
    "dropout": {
        "model": "dropout_cnn",
        "normalize": "half",
        "validation_fraction": 0.2,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.0,
        "batch_size": 20,
        "epochs": 30,
        "select_best": True,
    },
    "vgg16_finetune": {
        "model": "vgg16",
        "normalize": "half",
        "validation_fraction": 0.2,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "batch_size": 128,
        "epochs": 10,
        "select_best": False,
    },
}
# None of the write-ups uses any of these.
OFF = {
    "dataset": "cifar10",
    "augment": (),
    "nesterov": False,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "clip_norm": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "precision": "float32",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one(name):
    values = dataclasses.asdict(RECIPES[name])
    for field, value in (PUBLISHED[name] | OFF).items():
        assert values[field] == value, f"{name}.{field}"


def test_every_recipe_names_things_that_exist():
    for recipe in RECIPES.values():
        assert recipe.model in MODELS
        assert recipe.normalize in NORMALIZATIONS
        assert set(recipe.augment) <= set(AUGMENTATIONS | BY_RUN)
    for model, recipe in MODEL_RECIPES.items():
        assert RECIPES[recipe].model == model


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_round_trip(name):
    recipe = RECIPES[name].replace(augment=("flip", "translate"), label_smoothing=0.1)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again != RECIPES[name]


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["deep"].epochs = 3
    assert RECIPES["deep"].replace(epochs=3).epochs == 3
    assert RECIPES["deep"].epochs == 10


BAD = [
    ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
    ({"optimizer": "adamm"}, "did you mean 'adam'"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"precision": "float16"}, "valid: bfloat16, float32"),
    ({"learning_rate": -0.1}, "--learning-rate must be at least 0"),
    ({"learning_rate": math.nan}, "--learning-rate must be a number"),
    ({"learning_rate": math.inf}, "--learning-rate must be at least 0 and at most 1000"),
    ({"learning_rate": "0.1"}, "--learning-rate must be a number"),
    ({"epochs": 0}, "--epochs must be at least 1"),
    ({"batch_size": 0}, "--batch-size must be at least 1"),
    ({"batch_size": True}, "--batch-size must be a number"),
    ({"batch_size": 4.5}, "--batch-size must be a whole number"),
    ({"epochs": 1.5}, "--epochs must be a whole number"),
    ({"eval_batch_size": -1}, "--eval-batch-size must be at least 1"),
    ({"validation_fraction": 1.0}, "--validation-fraction"),
    ({"momentum": 1.0}, "--momentum"),
    ({"weight_decay": -1e-4}, "--weight-decay"),
    ({"label_smoothing": 1.0}, "--label-smoothing"),
    ({"ema_decay": 1.0}, "--ema-decay"),
    ({"step_factor": 0.0}, "--step-factor must be above 0"),
    ({"step_epochs": 0}, "--step-epochs must be above 0"),
    ({"clip_norm": -1}, "--clip-norm"),
    ({"log_every": -1}, "--log-every"),
    ({"nesterov": True, "momentum": 0.0}, "--nesterov needs"),
    ({"nesterov": True, "momentum": 0.9, "optimizer": "adam"}, "--nesterov needs"),
    ({"select_best": True}, "--select-best needs validation images"),
    ({"warmup_epochs": 3.0}, "--warmup-epochs 3 is longer than --epochs 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_values_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as raised:
        RECIPES["tutorial"].replace(**changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_saved_recipe_with_a_foreign_field_is_refused():
    values = RECIPES["adam"].to_dict() | {"moментum": 0.9}
    with pytest.raises(UserError, match="unknown recipe field"):
        Recipe.from_dict(values)
