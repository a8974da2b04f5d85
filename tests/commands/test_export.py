"""Exported models answer as `predict` does, at any batch size, without this package."""

import hashlib
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_data import NAMES, complete, tiny, words

from cifar_jax import export, predict
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.training import evaluation

__all__ = ["complete", "tiny"]


def exported(run, out, *more):
    lines = []
    return export.main([str(run), str(out), *more], say=lines.append), lines


def images_of(count):
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def predicted(run, images, folder):
    """Probabilities [N, classes] as the predict command prints them."""
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k:02d}.png")
    results = predict.main([str(run), str(folder), "--top-k", "10"], say=id)
    found = [{c["class"]: c["probability"] for c in r["predictions"]} for r in results]
    return np.array([[shares[name] for name in NAMES] for shares in found])


@pytest.fixture(scope="module")
def expected(complete, tmp_path_factory):
    """Images by batch size, with what the predict command says of them."""
    return {
        count: (
            images_of(count),
            predicted(complete, images_of(count), tmp_path_factory.mktemp("i")),
        )
        for count in (1, 7)
    }


@pytest.fixture(scope="module")
def artifact(complete, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.stablehlo"
    exported(complete, out)
    return out


def test_it_answers_as_predict_at_any_batch_size(artifact, expected):
    served = jax.export.deserialize(artifact.read_bytes())
    for images, shares in expected.values():
        got = np.asarray(served.call(images))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, shares, rtol=1e-5, atol=1e-6)
    assert np.ptp(shares, axis=0).max() > 0.01, "the answers differ"


def test_it_is_for_cpus_and_nvidia_gpus_and_any_batch(artifact):
    served = jax.export.deserialize(artifact.read_bytes())
    assert served.platforms == ("cpu", "cuda")
    (images,) = served.in_avals
    assert images.dtype == np.uint8
    assert images.shape[1:] == (32, 32, 3)
    assert not isinstance(images.shape[0], int)
    text = served.mlir_module()
    assert "stablehlo.convolution" in text
    targets = {part.split("(")[0] for part in text.split("stablehlo.custom_call @")[1:]}
    assert targets <= {"shape_assertion"}, "nothing that only one platform knows"


def test_the_facts_beside_it(artifact, complete):
    facts = json.loads(artifact.with_name("model.stablehlo.json").read_text())
    assert facts["class_names"] == NAMES
    assert facts["image_shape"] == [32, 32, 3]
    assert facts["sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert facts["step"] == evaluation.load(complete).step
    assert facts["versions"]["jax"] == jax.__version__
    assert (facts["model"], facts["normalize"]) == ("tutorial_cnn", "half")
    assert str(complete) not in json.dumps(facts), "no path of this machine"


def test_files_are_not_overwritten_unasked(artifact, complete, tmp_path):
    out, form = tmp_path / "a.bin", words("--format stablehlo")
    (tmp_path / "a.bin.json").write_text("mine")
    with pytest.raises(UserError, match=r"a\.bin\.json is there already; give --overwrite"):
        exported(complete, out, *form)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin.json"]
    facts, lines = exported(complete, out, *form, "--overwrite")
    assert facts["format"] == "stablehlo"
    assert json.loads((tmp_path / "a.bin.json").read_text()) == facts
    assert str(out) in lines[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.bin.json"]


@pytest.mark.filterwarnings("ignore")  # jax2onnx's own
def test_onnx_answers_as_predict(complete, expected, tmp_path):
    pytest.importorskip("jax2onnx", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    out = tmp_path / "model.onnx"
    facts, _ = exported(complete, out)
    assert facts["format"] == "onnx"
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for images, shares in expected.values():
        (got,) = session.run(["probabilities"], {"images": images})
        np.testing.assert_allclose(got, shares, rtol=1e-5, atol=1e-6)


def test_onnx_without_the_exporter_names_the_extra(complete, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r"the extra `onnx`"):
        exported(complete, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_write_is_one_line(complete, tmp_path, monkeypatch):
    def to_onnx(*_, **__):
        raise NotImplementedError("no plugin\nfor resize")

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    with pytest.raises(UserError, match=r"cannot write this model \(.*no plugin for resize\)"):
        exported(complete, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run out --format onx", "unknown --format 'onx'; did you mean 'onnx'"),
        ("run out.onnx --checkpoint bets", "--checkpoint must be best, latest or a step"),
        ("run nosuch/out.stablehlo", "there is no directory nosuch"),
        ("run empty --format onnx", "empty is a directory"),
        ("nosuch out.stablehlo", "nosuch does not exist"),
        ("empty out.STABLEHLO", "no checkpoint in"),
        *(
            (
                f"nosuch {name}",
                f"{name}: an exported model ends in .stablehlo or .onnx, or --format",
            )
            for name in ("m.tflite", "m.pt", "m", "m.onnx.gz", ".onnx", "m.stablehlo/m")
        ),
        ("nosuch m.onnx --format stablehlo", "m.onnx ends in .onnx, --format says stablehlo"),
        ("run", "required: out"),
    ],
)
def test_bad_input_is_one_line(arguments, message, complete, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(complete)
    (tmp_path / "empty").mkdir()
    assert run_command(lambda: export.main(words(arguments))) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run"]


LOADER = """
import sys
from jax import export
import numpy as np
served = export.deserialize(open(sys.argv[1], "rb").read())
np.save(sys.argv[2], served.call(np.load(sys.argv[3])))
assert not any(name.split(".")[0] in ("cifar_jax", "flax") for name in sys.modules)
"""


def test_it_needs_neither_this_package_nor_flax(artifact, expected, tmp_path):
    images, shares = expected[7]
    np.save(tmp_path / "in.npy", images)
    paths = [str(p) for p in (artifact, tmp_path / "out.npy", tmp_path / "in.npy")]
    subprocess.run([sys.executable, "-c", LOADER, *paths], check=True, cwd=tmp_path, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), shares, rtol=1e-5, atol=1e-6)
