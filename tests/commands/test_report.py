"""The page of a run: what it says is what the directory holds, and a browser shows it rightly."""

import csv
import gc
import json
import re
import shutil
import time

import chromium
import numpy as np
import pytest
from tiny_data import NAMES, RICH_SMALL, complete, copy_run, small, tiny, words

from cifar_jax import report, train
from cifar_jax.datasets import Split
from cifar_jax.reporting import page, predictions, scores
from cifar_jax.runtime.errors import UserError

__all__ = ["complete", "small", "tiny"]


@pytest.fixture(scope="module")
def many(small, tiny, tmp_path_factory):
    """A directory of three runs, with tables."""
    workdir = tmp_path_factory.mktemp("many") / "run"
    options = [*RICH_SMALL, "--epochs", "2", "--seeds", "0:3", "--csv", "--data-dir", str(tiny)]
    options.remove("--devices")
    options.remove("1")
    train.main([*options, "--workdir", str(workdir)], say=id)
    return workdir


def text_of(path):
    return path.read_text(encoding="utf-8")


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_every_run_ends_with_a_page_that_stands_alone(complete):
    text = text_of(complete / "report.html")
    summary = summary_of(complete)
    low, high = scores.wilson_interval(summary["test_correct"], 200)
    for shown in (
        page.percent(summary["test_accuracy"]), page.percent(low), page.percent(high),
        f"{summary['test_correct']} of 200", f"{summary['test_loss']:.4f}",
        "--recipe adam", "--learning-rate 0.003", "--augment flip,translate", "--select-best",
        "after temperature scaling", *NAMES,
    ):  # fmt: skip
        assert shown in text, shown
    assert "What is missing" not in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    for address in (a or b for a, b in addresses):
        assert address.startswith(("#", "data:")), address
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert len(text) < 2_000_000


def test_the_predictions_of_a_run_are_those_it_was_tested_by(complete):
    said, held_out = predictions.read(complete)
    summary = summary_of(complete)
    assert (said.predicted == said.labels).sum() == summary["test_correct"]
    assert scores.log_likelihood_loss(said.probabilities, said.labels) == pytest.approx(
        summary["test_loss"], rel=1e-5
    )
    np.testing.assert_allclose(said.probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(said.labels, np.arange(200) % 10)
    rows = [json.loads(line) for line in (complete / "metrics.jsonl").read_text().splitlines()]
    tested = next(
        r for r in rows if r.get("epoch") == summary["tested_epoch"] and r["kind"] == "epoch"
    )
    assert len(held_out.labels) == 120
    right = (held_out.predicted == held_out.labels).mean()
    assert right == pytest.approx(tested["validation_accuracy"])
    np.testing.assert_array_equal(held_out.labels, held_out.indices % 10)


def test_the_command_makes_it_again_and_writes_tables(complete, tiny, tmp_path):
    run = copy_run(complete, tmp_path / "run")
    former = text_of(run / "report.html")
    (run / "report.html").unlink()
    assert report.main([str(run), "--data-dir", str(tiny), "--csv"], say=id) == run / "report.html"
    assert text_of(run / "report.html") == former
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["right"]) for row in rows) == summary_of(run)["test_correct"]


def test_what_an_older_directory_lacks_is_named_and_the_rest_is_shown(complete, tiny, tmp_path):
    run = copy_run(complete, tmp_path / "run")
    (run / "predictions.npz").unlink()
    report.main([str(run), "--data-dir", str(tiny)], say=id)
    text = text_of(run / "report.html")
    assert "predictions.npz: without it" in text
    assert 'id="gallery"' not in text
    assert 'aria-label="Confusion matrix' in text
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    report.main([str(run), "--data-dir", str(tiny)], say=id)
    text = text_of(run / "report.html")
    assert "the run is not complete" in text
    assert "there are no curves" in text
    assert "--recipe adam" in text
    with pytest.raises(UserError, match=r"no predictions\.npz"):
        report.main([str(run), "--data-dir", str(tiny), "--csv"], say=id)


def test_without_the_images_there_is_no_gallery_and_a_line_says_why(complete, tmp_path, capsys):
    run = copy_run(complete, tmp_path / "run")
    report.main([str(run), "--data-dir", str(tmp_path)], say=id)
    assert "no gallery" in capsys.readouterr().err
    assert "The test images, which are not here" in text_of(run / "report.html")


def test_what_is_no_run_is_refused_in_one_line(complete, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.main([str(tmp_path)], say=id)
    with pytest.raises(UserError, match="is a directory"):
        report.main([str(complete), "--output", str(tmp_path)], say=id)
    run = copy_run(complete, tmp_path / "run")
    for text in ("{", "[]", '{"test_accuracy": 0.5}'):
        (run / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"summary\.json"):
            report.main([str(run)], say=id)
    config = json.loads((run / "config.json").read_text()) | {"axes": {"momentum": [0.0, 0.9]}}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a sweep's"):
        report.main([str(run)], say=id)
    with pytest.raises(UserError, match="cannot write"):
        report.main([str(complete), "--output", str(tmp_path / "no" / "x.html")], say=id)


def test_names_are_text_not_markup(complete, tiny, tmp_path):
    run = copy_run(complete, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["dataset"]["class_names"][3] = "<script>alert(1)</script>"
    (run / "config.json").write_text(json.dumps(config))
    split = Split(np.zeros((200, 32, 32, 3), np.uint8), np.arange(200) % 10)
    text = text_of(page.write([run], tmp_path / "x.html", split))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_many_runs_have_a_page_of_all_and_of_each(many, tiny):
    text, summary = text_of(many / "report.html"), summary_of(many)
    found = summary["test_accuracy"]
    each = [predictions.read(many / f"seed-{seed}")[0] for seed in range(3)]
    agreed = scores.agreement(np.stack([said.predicted for said in each]), each[0].labels)
    for shown in (
        page.percent(found["mean"]), page.percent(found["interval_95"][0]), "--seeds 0:3",
        page.percent(summary["ensemble"]["test_accuracy"]), page.percent(agreed["pairs"], 1),
        "mean of the runs", "of 3 runs right",
    ):  # fmt: skip
        assert shown in text, shown
    assert "What is missing" not in text
    assert (many / "seed-1" / "predictions.csv").exists()
    one = report.main([str(many / "seed-1"), "--data-dir", str(tiny)], say=id)
    assert "seed 1" in text_of(one)
    assert "No temperature" in text_of(one)


def test_several_runs_stand_side_by_side(many, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    report.main([str(complete), str(many), str(many / "seed-0")], say=said.append)
    assert said == ["Written to report.html"]
    text = text_of(tmp_path / "report.html")
    for run in (complete, many / "seed-0"):
        assert page.percent(summary_of(run)["test_accuracy"]) in text
    assert page.percent(summary_of(many)["test_accuracy"]["mean"]) in text
    assert '<th scope="row">epochs</th><td>4</td><td>2</td><td>2</td>' in text


def test_a_page_of_ten_thousand_images_is_small_and_quickly_made(complete, tmp_path):
    rng = np.random.default_rng(0)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        shutil.copy(complete / name, run)
    labels = rng.integers(0, 10, 10_000).astype(np.int32)
    logits = rng.normal(size=(10_000, 10)) + 2 * np.eye(10)[labels]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    said = predictions.of_split(shares, labels)
    predictions.write(run, said, said)
    noise = Split(rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8), labels)  # worst to compress
    page.write([run], run / "report.html", noise)  # imports matplotlib, if nothing has yet
    gc.collect()
    gc.freeze()  # what earlier tests left is not the page's to look through
    began = time.thread_time()
    path = page.write([run], run / "report.html", noise)
    took = time.thread_time() - began
    gc.unfreeze()
    assert took < 2
    assert 300_000 < path.stat().st_size < 2_000_000


TEXTS = """
(() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const inside = node.parentElement.closest("script, style, select, .hidden, .skip, details:not([open]) > :not(summary)");
    const slanted = node.parentElement.closest("[transform*='rotate(-45']"); // boxes are not letters
    if (inside || slanted || !node.data.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 1) found.push([node.data.trim(), box.left, box.top, box.right, box.bottom]);
  }
  return found;
})()
"""  # noqa: E501


def overlaps(texts):
    """Pairs of texts whose boxes share more than a line's own leading."""
    boxes = np.array([box for _, *box in texts])
    found = []
    for i, (left, top, right, bottom) in enumerate(boxes):
        later = boxes[i + 1 :]
        wide = np.minimum(right, later[:, 2]) - np.maximum(left, later[:, 0])
        high = np.minimum(bottom, later[:, 3]) - np.maximum(top, later[:, 1])
        least = 0.4 * np.minimum(bottom - top, later[:, 3] - later[:, 1])
        for k in np.flatnonzero((wide > 2) & (high > least)):
            found.append((texts[i][0], texts[i + 1 + k][0]))
    return found


@pytest.fixture(scope="module")
def browser():
    if chromium.BINARY is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with chromium.opened() as tab:
        yield tab


@pytest.mark.parametrize("which", ["one", "many", "several"])
@pytest.mark.parametrize("width", [360, 1440])
def test_a_browser_shows_it_without_errors_requests_or_overlapping_text(
    browser, complete, many, which, width, tmp_path
):
    path = {"one": complete, "many": many}.get(which, tmp_path) / "report.html"
    if which == "several":
        report.main([str(complete), str(many), "--output", str(path)], say=id)
    browser.show(path, width)
    assert browser.errors() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 100
    assert overlaps(texts) == []


TILES = "Array.from(document.querySelectorAll('#gallery > li:not([hidden])'))"
SHOWN = f"{TILES}.map(x => ({{...x.dataset}}))"
PRINTED = (
    "Array.from(document.querySelectorAll('#gallery > li'))"
    ".filter(x => getComputedStyle(x).display != 'none').map(x => ({...x.dataset}))"
)


def test_the_filters_filter(browser, complete):
    browser.show(complete / "report.html", 1440)
    assert len(browser.evaluate(SHOWN)) == 60
    browser.evaluate("document.getElementById('more').click()")
    assert 60 < len(browser.evaluate(SHOWN)) <= 120

    def choose(name, value):
        code = f"x = document.getElementById('{name}'); x.value = '{value}'; "
        browser.evaluate(code + "x.dispatchEvent(new Event('input', {bubbles: true}))")
        return browser.evaluate(SHOWN)

    wrong = choose("f-kind", 0)
    assert wrong
    assert all(tile["k"] == "0" and tile["t"] != tile["s"] for tile in wrong)
    right = choose("f-kind", 1)
    assert right
    assert all(tile["k"] == "1" and tile["t"] == tile["s"] for tile in right)
    cats = choose("f-true", 3)
    assert cats
    assert all(tile["t"] == "3" for tile in cats)
    middle = sorted(float(tile["p"]) for tile in cats)[len(cats) // 2]
    sure = choose("f-low", int(100 * middle))
    assert 0 < len(sure) <= len(cats)
    assert all(float(tile["p"]) >= int(100 * middle) / 100 for tile in sure)
    assert choose("f-said", 4) == []
    assert browser.evaluate("document.getElementById('shown').textContent").startswith("0 of 0")


def test_on_paper_some_of_all_images_or_those_chosen(browser, complete):
    browser.show(complete / "report.html", 1440)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    some = browser.evaluate(PRINTED)
    assert 20 <= len(some) <= 60
    assert len({tile["t"] for tile in some}) > 5, "of all classes alike"
    assert {tile["k"] for tile in some} == {"0", "1"}
    choice = "x = document.getElementById('f-true'); x.value = '3'; "
    browser.evaluate(choice + "x.dispatchEvent(new Event('input', {bubbles: true}))")
    chosen = browser.evaluate(PRINTED)
    assert chosen
    assert all(tile["t"] == "3" for tile in chosen)
    browser.ask("Emulation.setEmulatedMedia", media="")


def test_without_javascript_everything_is_there_but_the_filters(browser, complete):
    browser.show(complete / "report.html", 1440, javascript=False)
    tiles = len(re.findall('<li[^>]* data-k="', text_of(complete / "report.html")))
    assert len(browser.evaluate(SHOWN)) == tiles > 60
    assert (
        browser.evaluate("getComputedStyle(document.getElementById('filters')).display") == "none"
    )


CONTRAST = """
(() => {
  const luminance = (c) => {
    const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2];
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(c)) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  for (const e of document.querySelectorAll("h1, h1 small, h2, h3, p, dt, dd, td, th, li, i, b, figcaption, footer, label, pre")) {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) low.push([e.tagName, e.textContent.slice(0, 30), contrast]);
  }
  return low;
})()
"""  # noqa: E501


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_that_wcag_asks_for(browser, complete, dark):
    browser.show(complete / "report.html", 1440, dark=dark)
    assert browser.evaluate(CONTRAST) == []
    headings = browser.evaluate(
        "Array.from(document.querySelectorAll('h1,h2,h3')).map(x => x.tagName).join()"
    )
    assert headings.startswith("H1,H2")
    unnamed = (
        "document.querySelectorAll('svg:not([aria-label]), [role=img]:not([aria-label])').length"
    )
    assert browser.evaluate(unnamed) == 0


def test_the_options_leave_the_page_out(small, tiny, tmp_path):
    options = [*RICH_SMALL, *words("--epochs 1 --no-report --csv --data-dir"), str(tiny)]
    train.main([*options, "--workdir", str(tmp_path / "run")], say=id)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "report.html" not in names
    assert {"predictions.npz", "predictions.csv", "plots"} <= names
