"""Published weights: found in PyTorch's cache, downloaded, checked; and a run that starts there.

The published file itself cannot be had here. What is loaded has its names and shapes (in the
slow test: all 528 MiB of them) and numbers drawn by the test.
"""

import functools
import hashlib
import http.server
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_data import tiny, words

from cifar_jax import make_model, train
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import evaluation
from cifar_jax.weights import files as weight_files
from cifar_jax.weights import init_from, pretrained
from cifar_jax.weights.state_dict import entries

__all__ = ["tiny"]

pytestmark = pytest.mark.extended


def write_weights(path, model, seed=0):
    """Writes a state dict of the model's names and shapes; returns it."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)
    state = {
        entry.name: rng.normal(0, 0.05, entry.shape).astype(np.float32)
        for entry in entries({"params": params})
    }
    weight_files.write(path, state)
    return state


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server of weights of a 1000-class tutorial_cnn, published as `imagenet`; the folder it
    serves, the file's name, and PyTorch's cache, empty."""
    pytest.importorskip("torch", reason="the published files are PyTorch's own format")
    folder = tmp_path / "served"
    folder.mkdir()
    write_weights(folder / "weights.pth", make_model("tutorial_cnn", 1000))
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    name = f"tutorial-{digest[:8]}.pth"
    (folder / "weights.pth").rename(folder / name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(pretrained, "PUBLISHED", {"tutorial_cnn": {"imagenet": url}})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder / name, tmp_path / "torch" / "hub" / "checkpoints" / name
        server.shutdown()
        thread.join()


def find(weights="imagenet", model="tutorial_cnn", **options):
    return pretrained.find(model, weights, progress=False, **options)


def test_the_cache_is_torchs(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="the yardstick is torch.hub's own rule")
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ((None, None), ("XDG_CACHE_HOME", "a"), ("TORCH_HOME", "b")):
        if name:
            monkeypatch.setenv(name, str(tmp_path / value))
        assert str(pretrained.cache_dir()) == torch.hub.get_dir() + "/checkpoints"


def test_downloaded_once_and_found_in_the_cache(published):
    served, cached = published
    assert find() == cached
    assert cached.read_bytes() == served.read_bytes()
    served.unlink()
    assert find(may_download=False) == cached


def test_a_damaged_file_in_the_cache_is_named(published):
    _, cached = published
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"checkpoints/tutorial-.* is damaged.*delete it"):
        find()
    assert cached.read_bytes() == b"half a file"


def test_a_download_of_another_hash_is_refused(published):
    served, cached = published
    served.write_bytes(served.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"another hash"):
        find()
    assert not cached.exists()


def test_offline_the_address_and_the_place_are_said_soon(published, monkeypatch):
    served, cached = published
    url = pretrained.PUBLISHED["tutorial_cnn"]["imagenet"]
    with pytest.raises(UserError) as refused:
        find(may_download=False)
    assert url in str(refused.value)
    with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
        gone = f"http://127.0.0.1:{closed.server_port}/{served.name}"
    monkeypatch.setattr(pretrained, "PUBLISHED", {"tutorial_cnn": {"imagenet": gone}})
    start = time.monotonic()
    with pytest.raises(UserError) as offline:
        find()
    assert time.monotonic() - start < 10
    for part in (gone, f"put the file at {cached}", "--pretrained FILE"):
        assert part in str(offline.value)


@pytest.mark.parametrize(
    ("weights", "model", "message"),
    [
        ("imagenet", "dropout_cnn", "no imagenet weights of dropout_cnn, only of vgg16"),
        ("imagnet", "vgg16", "--pretrained takes imagenet or a file of weights"),
        ("", "vgg16", "--pretrained takes imagenet or a file of weights"),
        ("..", "vgg16", "--pretrained takes imagenet or a file of weights"),
    ],
)
def test_names_that_are_none(weights, model, message):
    with pytest.raises(UserError, match=message):
        find(weights, model)


def test_the_published_vgg16():
    url = pretrained.PUBLISHED["vgg16"]["imagenet"]
    assert url == "https://download.pytorch.org/models/vgg16-397923af.pth"


def test_a_run_starts_from_published_weights(published, tiny, tmp_path):
    """No step moves the weights (rate 0), so what is tested is what was loaded."""
    served, _ = published
    where = ["--data-dir", str(tiny), "--no-plots", "--workdir", str(tmp_path / "run")]
    options = words(
        "--recipe tutorial --conv gemm --batch-size 300 --epochs 1 --learning-rate 0 --devices 1"
    )
    lines = []
    train.main([*options, *where, "--pretrained", "imagenet"], say=lines.append)
    said = "\n".join(lines)
    assert f"Weights    from {pretrained.cache_dir() / served.name}" in said
    assert "has 1000 classes, this data set 10: fc3 is drawn anew" in said
    found = evaluation.load(tmp_path / "run").variables["params"]
    state = weight_files.read(served).state
    np.testing.assert_array_equal(found["fc2"]["kernel"], state["fc2.weight"].T)
    assert found["fc3"]["kernel"].shape == (84, 10)
    copy = tmp_path / "mine.pth"
    shutil.copy(served, copy)
    again = train.main([*options, *where, "--pretrained", str(copy)], say=lines.append)
    assert "complete" in lines[-2], "the same content is the same run"
    assert again["init_from"]["redrawn"] == ["fc3"]
    with pytest.raises(UserError, match="both name weights"):
        train.main([*options, *where, "--pretrained", "imagenet", "--init-from", "x"], say=id)


@pytest.mark.slow
def test_the_full_size_vgg16(tmp_path, monkeypatch):
    """528 MiB of the published names and shapes, folded on the way in, the head drawn anew."""
    pytest.importorskip("torch", reason="the published files are PyTorch's own format")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = pretrained.cache_dir()
    folder.mkdir(parents=True)
    state = write_weights(folder / "vgg16.pth", make_model("vgg16", 1000))
    assert len(state) == 32
    assert sum(value.size for value in state.values()) == 138_357_544
    assert state["classifier.0.weight"].shape == (4096, 25088)
    digest = hashlib.sha256((folder / "vgg16.pth").read_bytes()).hexdigest()
    name = f"vgg16-{digest[:8]}.pth"
    (folder / "vgg16.pth").rename(folder / name)
    monkeypatch.setattr(pretrained, "PUBLISHED", {"vgg16": {"imagenet": f"http://none/{name}"}})
    path = find(model="vgg16")
    start = init_from.load(path, make_model("vgg16", fold=True), (32, 32, 3))
    assert start.record["redrawn"] == ["classifier_6"]
    assert "classifier_6" not in start.variables["params"]
    layer = start.variables["params"]["classifier_0"]
    want = state["classifier.0.weight"].reshape(4096, 512, 49).mean(axis=2).T
    np.testing.assert_allclose(layer["mean_kernel"], want, atol=1e-6)
    first = start.variables["params"]["features_0"]["kernel"]
    np.testing.assert_array_equal(first, state["features.0.weight"].transpose(2, 3, 1, 0))
