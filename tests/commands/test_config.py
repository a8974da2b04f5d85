"""Settings from a file, and the one command for all."""

import functools
import json

import pytest
from tiny_data import python, rows_of, tiny, words

from cifar_jax import __main__ as command
from cifar_jax import evaluate, train
from cifar_jax.runtime.errors import run_command

__all__ = ["tiny"]

RUN = "--recipe adam --conv lax --devices 1 --batch-size 60 --epochs 1 --no-plots --augment flip"


def run(*arguments):
    lines = []
    return train.main([str(argument) for argument in arguments], say=lines.append), lines


def test_a_run_again_from_its_own_config(tiny, tmp_path):
    first, again, printed = (tmp_path / name for name in ("first", "again", "printed"))
    data = ["--data-dir", tiny, *words("--conv lax --devices 1 --no-plots")]
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
    monkeypatch.setattr("sys.argv", ["cifar-jax", "evaluate", "/nowhere"])
    assert command.run() == 2
    assert "/nowhere" in capsys.readouterr().err


def test_it_is_a_module_too():
    code = "import runpy, sys; sys.argv = ['-', 'datasets', 'list', '--data-dir', '/']; "
    code += "runpy.run_module('cifar_jax', run_name='__main__')"
    code = f"try:\n exec({code!r})\nexcept SystemExit as e: print('status', e.code)"
    assert "status 0" in python(code)
