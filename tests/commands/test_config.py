"""Settings from a file, and the one command for all."""

import datetime
import functools
import json
import shlex
import sys

import pytest
from logger_support import stand_in
from tiny_data import python, rows_of, summary_of, tiny, words

from cifar_jax import __main__ as command
from cifar_jax import _cli as cli
from cifar_jax import evaluate, train
from cifar_jax.recipes import RECIPES
from cifar_jax.reporting.run_files import command as command_of
from cifar_jax.runtime.errors import UserError, run_command
from experiments import sweep as former_sweep

__all__ = ["tiny"]

RUN = "--recipe adam --conv gemm --devices 1 --batch-size 60 --epochs 1 --no-plots --augment flip"


def run(*arguments):
    lines = []
    return train.main([str(argument) for argument in arguments], say=lines.append), lines


def test_a_run_again_from_its_own_config(tiny, tmp_path):
    first, again, printed = (tmp_path / name for name in ("first", "again", "printed"))
    data = ["--data-dir", tiny, *words("--conv gemm --devices 1 --no-plots")]
    run(*words(RUN), "--seed", 7, "--data-dir", tiny, "--workdir", first)
    run("--config", first / "config.json", *data, "--workdir", again)
    assert rows_of(again) == rows_of(first)
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (first / "config.json").read_text()
    )
    _, lines = run("--config", first / "config.json", "--print-config", "--epochs", 2)
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    _, same = run("--config", tmp_path / "mine.toml", "--print-config")
    assert same == lines
    run("--config", tmp_path / "mine.toml", "--epochs", 1, *data, "--workdir", printed)
    assert rows_of(printed) == rows_of(first)


def test_a_run_again_from_the_command_in_its_summary(tiny, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    data = ["--data-dir", tiny, "--no-plots", *words("--conv gemm --devices 1")]
    options = words(
        "--recipe adam --batch-size 60 --epochs 1 --no-select-best --augment cutout,flip"
    )
    began = datetime.datetime.now().astimezone()
    summary, _ = run(*options, *words("--seed 7 --freeze conv1,fc2"), *data, "--workdir", first)
    python_, _, module, *arguments = shlex.split(summary["command"])
    assert (python_, module) == ("python", "cifar_jax.train")
    run(*arguments, *data, "--workdir", again)
    assert summary_of(again) == summary_of(first)
    started = datetime.datetime.fromisoformat(summary["started"])
    assert abs((started - began).total_seconds()) < 60
    assert summary["total_seconds"] == pytest.approx(sum(summary["seconds"].values()))


def test_a_command_names_all_that_makes_a_run():
    recipe = RECIPES["dropout"].replace(
        model="my net.py:Net", model_option=("a=1,2", "b=x"), augment=(), select_best=False
    )
    data = {"image_shape": [48, 48, 3], "test_fraction": 0.2}
    config = {"recipe_name": "dropout", "recipe": recipe.to_dict(), "seed": 1, "seeds": [1, 2, 3]}
    config |= {"dataset": data, "init_from": {"source": "old run"}}
    config["code"] = {"file": "my net.py", "sha256": ""}
    said = shlex.split(command_of(config))[3:]
    options = train.make_parser().parse(said)
    assert options.model_option == ["a=1,2", "b=x"]
    assert (options.model, options.select_best) == ("my net.py:Net", False)
    assert (options.seeds, options.init_from, options.image_size) == ((1, 2, 3), "old run", 48)
    assert options.test_fraction == 0.2
    # A Recipe of somebody's own, from Python.
    nameless = shlex.split(command_of({**config, "recipe_name": "recipe"}))[3:]
    options = train.make_parser().parse(nameless)
    given = {k: v for k, v in cli.given_settings(options).items() if k != "model"}
    assert RECIPES[options.recipe].replace(**given) == recipe.replace(model="tutorial_cnn")


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(list(arguments))
    assert not stop.value.code
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_what_most_runs_need_with_the_recipes_values(capsys):
    short = help_of(capsys, "--help")
    listed = [word for word in short.split() if word.startswith("--") and word[2:3].isalpha()]
    assert [word for word in train.FIRST if word not in listed] == []
    assert len(train.FIRST) == 10
    assert "--conv" not in short
    assert "{adam,adamw,muon,sgd}" in short
    assert "(default: 0.01)" in short, "the rate of dropout, which is trained without a name"
    assert "(default: 0.003)" in help_of(
        capsys, "--learning-rate", "0.003", "-h", "--recipe", "adam"
    )
    assert "(default: 200)" in help_of(capsys, "--help", "--model", "resnet18")
    whole = help_of(capsys, "--help-all", "--recipe", "vgg16_bn")
    for option in cli._option_names(train.make_parser()):
        assert option in whole
    assert "of the batch: mixup, cutmix (default: flip,translate)" in whole
    with pytest.raises(UserError, match="did you mean 'adam'"):
        train.main(["--help", "--recipe", "adm"])


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.toml").write_text(
        'recipe = "dropout"\nlearning_rate = 1\nseed = 0\naugment = ["flip", "cutout"]\n'
    )
    _, lines = run("--config", tmp_path / "a.toml", "--seed", 3, "--augment", "", "--print-config")
    said = lines[0].splitlines()
    wanted = 'recipe = "dropout"|model = "dropout_cnn"|learning_rate = 1|seed = 3|augment = []'
    assert set(wanted.split("|")) <= set(said)
    _, lines = run("--config", tmp_path / "a.toml", "--print-config")
    assert {"seed = 0", 'augment = ["flip", "cutout"]'} <= set(lines[0].splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1", "unknown 'learning_rat'; did you mean 'learning_rate'?"),
        ('learning_rate = "fast"', "learning_rate must be a number, got 'fast'"),
        ("epochs = 1.5", "epochs must be a whole number"),
        ("epochs = true", "epochs must be a whole number"),
        ("nesterov = 1", "nesterov must be a true or false"),
        ('augment = "flip"', "augment must be a list of names"),
        ("augment = [1]", "augment must be a list of names"),
        ("epochs = 0", "--epochs must be at least 1"),
        ('recipe = "adm"', "unknown recipe 'adm'; did you mean 'adam'?"),
        ('seeds = "5:1"', "'5:1' is empty"),
        ("seed = -1", "-1 is not between 0 and"),
        ('seed = 1\nseeds = "0:2"', "has seed and seeds"),
        ("epochs 3", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, capsys, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    arguments = ["--config", str(path), "--workdir", str(tmp_path / "run")]
    assert run_command(functools.partial(train.main, arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_command_for_all(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cifar-jax", "evalute", "x"])
    assert command.run() == 2
    assert "unknown command 'evalute'; did you mean 'evaluate'?" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["cifar-jax", "--help"])
    assert command.run() == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in command.COMMANDS)
    assert all(callable(command.find(name)) for name in command.COMMANDS)
    assert command.find("evaluate") is evaluate.main
    assert command.find("sweep") is former_sweep.main
    monkeypatch.setattr("sys.argv", ["cifar-jax", "evaluate", "/nowhere"])
    assert command.run() == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_shell_completes_every_command_and_option(capsys, monkeypatch):
    asked = []

    def complete(parser, shell):
        asked.append((parser, shell))
        return "the script"

    stand_in(monkeypatch, "shtab", complete=complete, SUPPORTED_SHELLS=["bash", "zsh"])
    monkeypatch.setattr("sys.argv", ["cifar-jax", "--print-completion", "zsh"])
    assert command.run() == 0
    assert capsys.readouterr().out == "the script\n"
    ((parser, shell),) = asked
    assert shell == "zsh"
    (commands,) = (action.choices for action in parser._actions if action.choices)
    assert commands.keys() == command.COMMANDS.keys()
    options = {name for action in commands["train"]._actions for name in action.option_strings}
    assert {"-h", "--help-all", "--learning-rate", "--no-nesterov"} <= options
    assert {"prepare", "list"} <= set(cli_choices(commands["datasets"]))
    monkeypatch.setattr("sys.argv", ["cifar-jax", "--print-completion", "fish"])
    assert command.run() == 2
    assert "unknown shell 'fish'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert command.run() == 2
    assert "pip install 'cifar_jax[completion]'" in capsys.readouterr().err


def cli_choices(parser):
    return next(action.choices for action in parser._actions if action.choices)


def test_it_is_a_module_too():
    code = "import runpy, sys; sys.argv = ['-', 'datasets', 'list', '--data-dir', '/']; "
    code += "runpy.run_module('cifar_jax', run_name='__main__')"
    code = f"try:\n exec({code!r})\nexcept SystemExit as e: print('status', e.code)"
    assert "status 0" in python(code)
