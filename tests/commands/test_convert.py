"""Weights out of a run, into a file, and into another run: `convert` and `train --init-from`."""

import contextlib
import json

import numpy as np
import pytest
from tiny_data import (
    STEPS,
    assert_same_run,
    complete,
    copy_run,
    rows_of,
    snapshot,
    states_of,
    tiny,
    words,
)

from cifar_jax import convert, train
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import evaluation
from cifar_jax.weights import files as weight_files
from cifar_jax.weights.state_dict import to_torch

pytestmark = pytest.mark.extended

torch = pytest.importorskip("torch", reason="needs PyTorch")

from benchmarks.torch_models import TutorialCNN  # noqa: E402

__all__ = ["complete", "tiny"]

SMALL = words("--recipe adam --conv gemm --devices 1 --batch-size 60 --no-plots")
# Without a step: what comes out is what went in.
STILL = [*SMALL, *words("--epochs 1 --learning-rate 0")]
# With an averaged copy of the weights, which starts from the given ones too.
MOVING = [*SMALL, *words("--epochs 2 --ema-decay 0.9")]

EARLIER = STEPS * 3  # the epoch before the last


def converted(source, out, *more):
    lines = []
    result = convert.main([str(source), str(out), *more], say=lines.append)
    return result, lines


def trained_from(tiny, workdir, source, *more, recipe=STILL):
    lines = []
    where = ["--data-dir", str(tiny), "--workdir", str(workdir), "--init-from", str(source)]
    return train.main([*recipe, *where, *more], say=lines.append), lines


@pytest.fixture(scope="module")
def files(complete, tmp_path_factory):
    """A folder with the weights of the complete run in both formats."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("best.safetensors", "best.pth"):
        converted(complete, folder / name)
    converted(complete, folder / "earlier.safetensors", "--checkpoint", str(EARLIER))
    return folder


# Convert


def test_a_run_becomes_what_pytorch_loads_strictly(complete, files, tmp_path):
    """The averaged weights of the best epoch, as `evaluate` and `predict` take them."""
    trained = evaluation.load(complete)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    x = torch.tensor(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    ours = np.asarray(trained.logits(images))
    from safetensors.torch import load_file

    for load, name in ((torch.load, "best.pth"), (load_file, "best.safetensors")):
        peer = TutorialCNN()
        peer.load_state_dict(load(files / name), strict=True)
        with torch.no_grad():
            theirs = peer(x).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(ours).max())


def test_which_checkpoint(complete, files, tmp_path):
    earlier = weight_files.read(files / "earlier.safetensors").state
    for which in ("best", "latest"):
        trained = evaluation.load(complete, which)
        result, lines = converted(complete, tmp_path / f"{which}.pth", "--checkpoint", which)
        assert result["sha256"] == weight_files.content_hash(to_torch(**trained.variables))
        assert result["sha256"] != weight_files.content_hash(earlier)
        assert lines[-1].startswith(f"tutorial_cnn after step {trained.step}, from ")
    result, _ = converted(complete / "checkpoints" / str(EARLIER), tmp_path / "by-step.pth")
    assert result["sha256"] == weight_files.content_hash(earlier)


def test_between_the_formats_nothing_changes(files, tmp_path):
    there, _ = converted(files / "best.safetensors", tmp_path / "a.pt")
    back, _ = converted(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert there["sha256"] == back["sha256"]
    want = weight_files.read(files / "best.pth").state
    got = weight_files.read(tmp_path / "b.safetensors").state
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True)
    metadata = weight_files.read(files / "best.safetensors").metadata
    assert metadata["model"] == "tutorial_cnn"
    assert metadata["normalize"] == "half"
    assert json.loads(metadata["classes"])[3] == "cat"
    torch.save({"state_dict": {"a.weight": torch.ones(2).half()}}, tmp_path / "half.pth")
    _, lines = converted(tmp_path / "half.pth", tmp_path / "half.safetensors")
    assert lines[0] == (
        f"notice: {tmp_path / 'half.pth'}: 1 of 1 entries are float16 and were converted to float32"
    )


def test_nothing_is_overwritten_unasked(complete, files, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already; give --overwrite"):
        converted(complete, out)
    assert out.read_text() == "mine"
    converted(complete, out, "--overwrite")
    assert weight_files.read(out).state.keys() == weight_files.read(files / "best.pth").state.keys()


# --init-from


def test_a_run_starts_from_a_file_or_another_run(complete, files, tiny, tmp_path):
    expected = json.loads((complete / "summary.json").read_text())
    found = {}
    for name, source in (
        ("run", complete),
        ("safetensors", files / "best.safetensors"),
        ("pth", files / "best.pth"),
    ):
        summary, lines = trained_from(tiny, tmp_path / name, source)
        assert summary["test_correct"] == expected["test_correct"]
        assert summary["test_loss"] == expected["test_loss"]
        (line,) = [line for line in lines if line.startswith("Weights    ")]
        record = summary["init_from"]
        assert record == json.loads((tmp_path / name / "config.json").read_text())["init_from"]
        assert str(source) in line
        assert record["sha256"][:12] in line
        assert record["redrawn"] == []
        found[name] = record["sha256"]
    assert len(set(found.values())) == 1, "the same weights, whatever they came in"
    assert "init_from" not in expected


def test_another_number_of_classes_draws_the_last_layer_anew(files, tiny, tmp_path):
    state = weight_files.read(files / "best.pth").state
    seven = {"fc3.weight": state["fc3.weight"][:7], "fc3.bias": state["fc3.bias"][:7]}
    weight_files.write(tmp_path / "seven.pth", state | seven)
    summary, lines = trained_from(tiny, tmp_path / "run", tmp_path / "seven.pth")
    (notice,) = [line for line in lines if line.startswith("notice")]
    assert "seven.pth has 7 classes, this data set 10: fc3 is drawn anew" in notice
    assert summary["init_from"]["redrawn"] == ["fc3"]
    result = to_torch(**evaluation.load(tmp_path / "run").variables)
    for name, value in state.items():
        same = np.array_equal(result[name], value)
        assert same == (not name.startswith("fc3"))
    bound = 84**-0.5
    assert 0.9 * bound < np.abs(result["fc3.weight"]).max() <= bound, "as any new layer is drawn"


def test_all_that_does_not_fit_is_said_at_once(files, tiny, tmp_path):
    state = weight_files.read(files / "best.pth").state
    state["fc3.weight"] = state["fc3.weight"][:7]  # and its bias is not of 7
    state["conv1.weight"] = state["conv1.weight"][:5]
    state["fc9.weight"] = state.pop("fc2.bias")
    weight_files.write(tmp_path / "odd.pth", state)
    with pytest.raises(UserError) as caught:
        trained_from(tiny, tmp_path / "run", tmp_path / "odd.pth")
    for part in (
        "--init-from",
        "fc2.bias is missing (shape [84])",
        "fc9.weight is not of this model (shape [84])",
        "conv1.weight has shape [5, 3, 5, 5], the model needs [6, 3, 5, 5]",
        "fc3.weight has shape [7, 84], the model needs [10, 84]",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"conv4\.weight is missing"):
        trained_from(tiny, tmp_path / "run", files / "best.pth", "--model", "deep_cnn")


def test_stopped_and_going_on_ends_with_the_same_bits(files, tiny, tmp_path, monkeypatch):
    source, often = files / "best.safetensors", words("--save-minutes 1e-6")
    trained_from(tiny, tmp_path / "whole", source, recipe=MOVING)

    @contextlib.contextmanager
    def stop_soon():
        calls = iter(range(1000))
        yield lambda: 2 if next(calls) >= 1 else None

    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_requests", stop_soon)
        with pytest.raises(SystemExit):
            trained_from(tiny, tmp_path / "parts", source, *often, recipe=MOVING)
    assert not (tmp_path / "parts" / "summary.json").exists()
    # The same weights in another place and format are the same recipe.
    _, lines = trained_from(tiny, tmp_path / "parts", files / "best.pth", recipe=MOVING)
    assert any(line.startswith("Going on from step") for line in lines)
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert summary["init_from"].pop("source") == str(files / "best.pth")
    assert str(files / "best.pth") in summary.pop("command")
    (tmp_path / "parts" / "summary.json").write_text(json.dumps(summary))
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    whole["init_from"].pop("source")
    whole.pop("command")
    (tmp_path / "whole" / "summary.json").write_text(json.dumps(whole))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    first = rows_of(tmp_path / "whole", "epoch")[0]
    assert first["train_loss"] < 1.5, "not from drawn weights"
    ema = [k for k in states_of(tmp_path / "whole") if "ema_params" in k]
    assert ema


def test_going_on_with_other_weights_is_refused(complete, files, tiny, tmp_path):
    run = tmp_path / "run"
    trained_from(tiny, run, files / "best.pth")
    before = snapshot(run)
    with pytest.raises(UserError, match=r"holds another run; init_from: .*best.*earlier"):
        trained_from(tiny, run, files / "earlier.safetensors")
    without = [*STILL, "--data-dir", str(tiny), "--workdir", str(run)]
    with pytest.raises(UserError, match=r"init_from: .*best\.pth \(sha256 .*\) -> none"):
        train.main(without, say=id)
    drawn = copy_run(complete, tmp_path / "drawn")
    for name in ("config.json",):
        config = json.loads((drawn / name).read_text())
        config["init_from"] = {"source": 3}
        (drawn / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        evaluation.load(drawn)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("convert nosuch.pth out.pth", "no such file of weights: nosuch.pth"),
        ("convert run out.h5", "ends in .safetensors, .pth, .pt"),
        ("convert run nosuch/out.pth", "there is no directory nosuch"),
        ("convert run there.pth", "there.pth is there already; give --overwrite"),
        ("convert run out.pth --checkpoint bets", "--checkpoint must be best, latest or a step"),
        ("convert run out.pth --checkpoint 999", "no checkpoint of step 999"),
        ("convert there.pth out.pth --checkpoint best", "there.pth is no run directory"),
        ("convert there.pth out.pth", "there.pth is damaged or no PyTorch file"),
        ("convert empty out.pth", "no checkpoint in"),
        ("convert run", "required: out"),
        ("train --init-from nosuch.pth", "no such file of weights: nosuch.pth"),
        ("train --init-from weights.bin", "no such file of weights: weights.bin"),
        ("train --init-from empty", "no checkpoint in"),
        ("train --init-from there.pth", "there.pth is damaged or no PyTorch file"),
        ("train --init-from", "expected one argument"),
    ],
)
def test_bad_input_is_one_line(command, expected, complete, tiny, tmp_path, monkeypatch, capsys):
    from cifar_jax.runtime.errors import run_command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(complete)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.pth").write_text("text")
    name, *arguments = words(command)
    if name == "train":
        arguments += [*STILL, "--data-dir", str(tiny), "--workdir", "new"]
    main = {"train": train.main, "convert": convert.main}[name]
    assert run_command(lambda: main(arguments)) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run", "there.pth"]
