"""The loggers beside `metrics.jsonl`: what each is told, by a run that goes on too."""

import json
import sys
import types

import pytest
from logger_support import Remembered, stand_in

from cifar_jax.reporting import loggers
from cifar_jax.runtime.errors import UserError

CONFIG = {"recipe_name": "adam", "seed": 3, "recipe": {"epochs": 2, "augment": ["flip"]}}
ROWS = [
    {"kind": "window", "epoch": 1, "step": 100, "loss": 2.0},
    {"kind": "epoch", "epoch": 1, "step": 200, "train_loss": 1.5, "timing": {"seconds": 3.0}},
    {"kind": "test", "step": 200, "test_accuracy": 0.5, "per_class": []},
]
TOLD = [
    ({"window/loss": 2.0}, 100),
    ({"epoch/train_loss": 1.5, "epoch/seconds": 3.0}, 200),
    ({"test/test_accuracy": 0.5}, 200),
]


def log(names, folder, rows=ROWS, resume=False):
    said = []
    loggers.check(names)
    with loggers.opened(names, folder, CONFIG, resume, said.append) as append:
        for row in rows:
            append(row)
    return said


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_told_every_row_and_find_their_run_again(name, tmp_path, monkeypatch):
    runs = []

    def init(**given):
        runs.append(Remembered(**given))
        return runs[-1]

    stand_in(monkeypatch, name, init=init)
    assert log((name,), tmp_path) == log((name,), tmp_path, resume=True) == []
    assert [run.rows for run in runs] == [TOLD, TOLD]
    assert all(run.ended for run in runs)
    assert runs[0].given == runs[1].given, "which names the run by its directory"
    assert runs[0].given["resume"] == "allow"
    settings = {"epochs": 2, "augment": '["flip"]', "recipe": "adam", "seed": 3}
    assert runs[0].given["config"] == settings
    other = tmp_path / "other"
    other.mkdir()
    log((name,), other)
    identity = "id" if name == "wandb" else "name"
    assert runs[2].given[identity] != runs[0].given[identity]


class Client:
    """MLflow's, for one run."""

    told: tuple = ()

    def __init__(self):
        self.told = type(self).told

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "0"

    def search_runs(self, experiments, query):
        self.told.append(("search", query))
        return []

    def create_run(self, experiment, tags, run_name):
        self.told.append(("create", tags))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    def log_param(self, run, name, value):
        self.told.append((name, value))

    def log_metric(self, run, name, value, step):
        self.told.append((name, value, step))

    def set_terminated(self, run):
        self.told.append("ended")


def test_mlflow_is_told_settings_and_every_row(tmp_path, monkeypatch):
    Client.told = []
    stand_in(monkeypatch, "mlflow", MlflowClient=Client)
    assert log(("mlflow",), tmp_path) == []
    (_, query), (_, tags), *rest = Client.told
    assert query == f"tags.cifar_jax = '{tags['cifar_jax']}'"
    assert ("augment", '["flip"]') in rest
    numbers = [(name, value, step) for row, step in TOLD for name, value in row.items()]
    assert [entry for entry in rest if len(entry) == 3] == numbers
    assert rest[-1] == "ended"


def test_what_fails_is_told_once_and_the_others_go_on(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no\nserver")

    runs = []
    stand_in(monkeypatch, "wandb", init=init)
    stand_in(monkeypatch, "trackio", init=lambda **given: runs.append(Remembered()) or runs[-1])
    said = log(("wandb", "trackio"), tmp_path)
    assert said == ["warning: --log wandb: no server; the run goes on without"]
    assert runs[0].rows == TOLD
    runs.clear()
    monkeypatch.setattr(Remembered, "log", lambda *_, **__: 1 / 0)
    said = log(("trackio",), tmp_path)
    assert said == ["warning: --log trackio: division by zero; the run goes on without"]
    assert runs[0].ended, "what it holds open is closed all the same"


def test_what_is_not_there_is_refused_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"--log mlflow needs mlflow: pip install 'cifar_jax\[mlf"):
        loggers.check(("mlflow",))
    with pytest.raises(UserError, match="unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        loggers.check(("tensorbord",))


def test_tensorboard_gets_the_settings_and_hides_what_a_resumed_run_writes_again(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    from tensorboardX.proto.event_pb2 import SessionLog
    from test_console import events

    log(("tensorboard",), tmp_path, ROWS[:2])
    (first,) = events(tmp_path / "tensorboard")
    assert any("epochs: 2" in str(event.summary) for event in first)
    # Of a run whose test alone is missing the last epoch's row stays.
    for rows, at in ((ROWS[1:], 200), (ROWS[2:], 201)):
        folder = tmp_path / f"{at}"
        log(("tensorboard",), folder, rows, resume=True)
        (again,) = events(folder / "tensorboard")
        starts = [event.step for event in again if event.session_log.status == SessionLog.START]
        assert starts == [at]
    assert json.loads(loggers.settings_of(CONFIG)["augment"]) == ["flip"]
