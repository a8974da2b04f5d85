"""The statistics of the experiments' tables, by hand."""

import json

import pytest

from cifar_jax.runtime.errors import UserError
from experiments import lowerings, reproduce, seeds


def run(seed, accuracy, loss=1.0):
    return {"seed": seed, "test_accuracy": accuracy, "test_loss": loss}


@pytest.mark.parametrize("command", [reproduce.main, lowerings.main])
@pytest.mark.parametrize("text", ["", "3:3", "-1:2", "a", "1:b"])
def test_seeds_that_name_nothing_are_refused(command, text):
    with pytest.raises(UserError, match="argument --seeds"):
        command([f"--seeds={text}"])


def test_lowerings_are_compared_seed_by_seed():
    runs = {
        "lax": [run(0, 0.50), run(1, 0.60)],
        "gemm": [run(0, 0.51), run(1, 0.60)],
        "winograd": [run(0, 0.50), run(1, 0.60)],
    }
    found = lowerings.compare(runs)
    assert found["lax"]["accuracy"]["mean"] == pytest.approx(55)
    assert "difference" not in found["lax"]
    assert found["gemm"]["difference"]["mean"] == pytest.approx(0.5)
    assert found["gemm"]["z"] == pytest.approx(1.0)
    assert found["winograd"]["difference"]["mean"] == 0
    assert "+0.50 ± 0.50 (se) = 1.00 se" in lowerings.table(found)


def test_every_lowering_trains_the_same_seeds_and_diverged_ones_are_not_paired(
    tmp_path, monkeypatch
):
    gains, asked = {"lax": 0.0, "gemm": 0.01, "winograd": -0.02}, []
    about = {
        "dataset": {"name": "cifar10", "source": "/home/me"},
        "versions": {},
        "device": {},
        "cpu": {},
        "commit": "c",
    }

    def trained(words):
        asked.append(words)
        gain = gains[words[words.index("--conv") + 1]]
        return about | {"diverged": lost, "runs": [run(3, 0.5 + gain), run(5, 0.6 + gain)]}

    lost = []
    monkeypatch.setattr(lowerings.train, "main", trained)
    words = ["--recipe", "adam", "--epochs", "1", "--seeds", "3,5"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    found = lowerings.main(words)
    assert [w[w.index("--seeds") + 1] for w in asked] == ["3,5"] * 3
    assert len({w[w.index("--workdir") + 1] for w in asked}) == 3
    assert found["winograd"]["difference"]["mean"] == pytest.approx(-2.0)
    written = json.loads((tmp_path / "lowerings_adam.json").read_text())
    assert (written["epochs"], written["commit"]) == (1, "c")
    assert "/home/me" not in json.dumps(written)
    lost = [{"seed": 5, "step": 7}]
    with pytest.raises(UserError, match="--conv lax: some runs diverged"):
        lowerings.main(words)


def test_reproduce_reads_back_runs_and_keeps_recipes_not_named(tmp_path, monkeypatch):
    summary = {
        "test_accuracy": 0.55, "test_loss": 1.2, "best_epoch": None, "seconds": {},
        "per_class": [{"class": "cat", "accuracy": 0.5}, {"class": "dog", "accuracy": 0.6}],
        "dataset": {"name": "cifar10"}, "versions": {}, "device": {}, "cpu": {}, "commit": "c",
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(reproduce.train, "main", lambda words: asked.append(words) or summary)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    row = {"seed": 0, "test_accuracy": 0.5, "test_loss": 1.3, "per_class": [500, 500]}
    rows = [row, row | {"seed": 1, "test_accuracy": 0.54}]
    (tmp_path / "torch_tutorial.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    reproduce.main(["--recipes", "deep", "--seeds", "0:2", *options])
    found = reproduce.main(["--recipes", "tutorial", "--seeds", "0:2", *options])
    assert [words[words.index("--seed") + 1] for words in asked] == ["0", "1", "0", "1"]
    assert list(found) == ["tutorial", "deep"]
    assert found["tutorial"]["difference"] == pytest.approx(3.0)
    text = (tmp_path / "reproduce.md").read_text()
    assert "55.00 ± 0.00 (n=2) | 52.00 ± 2.83 (n=2) | +3.00 = 1.50 se" in text
    assert "| deep | 46.37 | 55.00 ± 0.00 (n=2) | not run |" in text
    assert (tmp_path / "reproduce.png").stat().st_size > 1000


def test_seeds_place_the_published_runs_among_ours(tmp_path, monkeypatch):
    accuracies = [0.44, 0.46, 0.48, 0.50]
    summary = dict.fromkeys(seeds.KEPT) | {
        "test_accuracy": {}, "seconds": {"training": 90, "test": 30},
        "runs": [{"seed": i, "test_accuracy": a} for i, a in enumerate(accuracies)],
        "ensemble": {"test_accuracy": 0.5512},
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(seeds.train, "main", lambda words: asked.append(words) or summary)
    options = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    seeds.main(["--recipes", "deep", *options])
    seeds.main(["--recipes", "tutorial", "--count", "4", *options])
    assert [words[words.index("--seeds") + 1] for words in asked] == ["0:16", "0:4"]
    # Mean 47, std 2.582; the interval is 3.182 standard errors of 1.291 wide on each side.
    text = (tmp_path / "seeds.md").read_text()
    where = "| 47.00 | 2.58 | 1.29 | 42.89 to 51.11 | 44.00 to 50.00 | 55.12 |"
    assert f"| deep | 4 {where} 46.37: above 2 of 4, -0.2 std | 2 |" in text
    assert f"| tutorial | 4 {where} 55: above 4 of 4, +3.1 std; 54: above 4 of 4, +2.7 std" in text
    assert text.index("| tutorial") < text.index("| deep"), "in the order of the recipes"
    assert (tmp_path / "seeds.png").stat().st_size > 1000
    with pytest.raises(UserError, match="vgg16_bn"):
        seeds.main(["--recipes", "vgg16_bn", *options])
