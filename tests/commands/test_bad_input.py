"""What a user can get wrong ends in one clear line and exit status 2, and nothing is lost."""

import fcntl
import functools
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny_data import ROOT, command_environment, copy_run, prepare_tiny, snapshot, tiny, words

from cifar_jax import evaluate, predict, train
from cifar_jax.checkpoints.manifests import MANIFEST
from cifar_jax.datasets import __main__ as datasets_command
from cifar_jax.datasets import archives
from cifar_jax.runtime.errors import run_command

__all__ = ["tiny"]

COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "predict": predict.main,
    "datasets": datasets_command.main,
}
QUICK = "--recipe adam --conv gemm --devices 1 --batch-size 60 --epochs 1 --no-plots"


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A small complete run."""
    workdir = tmp_path_factory.mktemp("bad") / "run"
    train.main([*words(QUICK), "--data-dir", str(tiny), "--workdir", str(workdir)], say=id)
    return workdir


@pytest.fixture
def place(tmp_path, tiny, trained, monkeypatch):
    """A folder of good and bad things; no data set, home or network of the user's is in reach."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    (tmp_path / "home").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("text")
    copy_run(trained, tmp_path / "run")
    (tmp_path / "data").symlink_to(tiny)
    image = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3) * 7)
    image.save(tmp_path / "good.png")
    image.save(tmp_path / "good.jpg")
    for ending in ("png", "jpg"):
        data = (tmp_path / f"good.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(data[: len(data) // 2])
    (tmp_path / "nothing.png").touch()
    return tmp_path


def start(main, arguments):
    """Runs an entry point as its module does; returns the exit status."""
    return run_command(functools.partial(main, arguments))


def check(capsys, place, code, expected, before):
    out, err = capsys.readouterr()
    assert code == 2, out + err
    lines = [line for line in err.splitlines() if not line.startswith("cifar_jax: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert "Traceback" not in out + err
    for part in expected.split(" | "):
        assert part in lines[0], lines[0]
    after = snapshot(place)
    lost = {name for name, content in before.items() if after.get(name) != content}
    assert not lost
    # A later, mended command must not meet the directory of this one.
    assert not (place / "runs").exists()


TRAIN = f"train {QUICK} --data-dir data"

# "command arguments" -> parts of the line. Names are paths in `place`, which is the current folder.
CASES = [
    # names
    ("train --model dropout_cn", "unknown model 'dropout_cn' | did you mean 'dropout_cnn'"),
    ("train --recipe tutoral", "unknown recipe | did you mean 'tutorial' | adam"),
    (f"{TRAIN} --dataset cifar11", "'cifar11' | did you mean 'cifar10'"),
    (f"{TRAIN} --dataset ../x", "'../x'"),
    (f"{TRAIN} --dataset cifar10:9.9.9", "cifar10:9.9.9 is not prepared | use cifar10"),
    ("train --learning-rat 0.1", "unknown option --learning-rat | did you mean '--learning-rate'"),
    ("train --lr 0.1", "unknown option --lr; did you mean '--learning-rate'?"),
    ("train --bs 4", "did you mean '--batch-size'?"),
    ("train -wd 1e-4", "unknown option -wd; did you mean '--weight-decay'?"),
    ("train --batch=4", "unknown option --batch; did you mean '--batch-size'?"),
    ("train --opt sgd", "did you mean '--optimizer'?"),
    ("train --label_smooth 0.1", "did you mean '--label-smoothing'?"),
    ("train dropout_cnn", "unexpected argument 'dropout_cnn' | --help"),
    (f"{TRAIN} --optimizer adamm", "unknown optimizer | did you mean 'adam'"),
    (f"{TRAIN} --schedule cosin", "unknown schedule | did you mean 'cosine'"),
    (f"{TRAIN} --normalize halv", "'halv' | did you mean 'half'"),
    (f"{TRAIN} --augment flip,cutot", "'cutot' | did you mean 'cutout'"),
    (f"{TRAIN} --precision float61", "unknown precision | float32"),
    (f"{TRAIN} --feed streem", "unknown --feed | did you mean 'stream'"),
    (f"{TRAIN} --conv winogard", "unknown --conv | did you mean 'winograd'"),
    (f"{TRAIN} --device gpuu", "unknown device | did you mean 'gpu'"),
    (f"{TRAIN} --device gpu", "--device gpu: JAX finds no such device | cuda"),
    ("datasets prepar cifar10", "invalid choice: 'prepar' | --help"),
    ("datasets prepare cifar10 --archiv x", "did you mean '--archive'"),
    ("datasets prepare cifar12 --data-dir data", "did you mean 'cifar10'"),
    ("evaluate", "required: run | --help"),
    ("predict run", "required: images | --help"),
    # numbers
    ("train --epochs 0", "--epochs must be at least 1"),
    ("train --epochs -3", "--epochs must be at least 1"),
    ("train --epochs 2.5", "argument --epochs: invalid int value: '2.5'"),
    ("train --epochs many", "argument --epochs | 'many'"),
    ("train --epochs", "argument --epochs: expected one argument"),
    ("train --batch-size 0", "--batch-size must be at least 1"),
    ("train --batch-size 99999999999", "--batch-size must be at least 1 and at most 1e+06"),
    (f"{TRAIN} --batch-size 481", "--batch-size 481 is larger than the training split (480)"),
    ("train --eval-batch-size -1", "--eval-batch-size must be at least 1"),
    ("train --learning-rate nan", "--learning-rate must be a number"),
    ("train --learning-rate inf", "--learning-rate must be"),
    ("train --learning-rate -0.1", "--learning-rate must be at least 0"),
    ("train --learning-rate 1e9", "--learning-rate must be at least 0 and at most 1000"),
    ("train --momentum 1", "--momentum must be"),
    ("train --validation-fraction 1", "--validation-fraction must be"),
    (f"{TRAIN} --validation-fraction 0.0001", "--validation-fraction 0.0001 | empty split"),
    ("train --label-smoothing 1.5", "--label-smoothing must be"),
    ("train --nesterov", "--nesterov needs"),
    ("train --model tutorial_cnn --select-best", "--validation-fraction"),
    ("train --warmup-epochs 31", "--warmup-epochs 31 is longer than --epochs 30"),
    ("train --seed -1", "--seed | between 0 and"),
    ("train --seed 1e3", "--seed | whole number"),
    ("train --save-minutes 0", "--save-minutes must be above 0"),
    ("train --save-minutes nan", "--save-minutes must be above 0"),
    (f"{TRAIN} --image-size 0", "--image-size"),
    (f"{TRAIN} --image-size 5000", "--image-size must be a whole number from 1 to 4096"),
    (f"{TRAIN} --image-size 4", "images of 4x4 are too small"),
    ("evaluate run --batch-size 0", "--batch-size | at least 1"),
    ("predict run good.png --top-k 0", "--top-k | at least 1"),
    # data
    ("train --no-download --data-dir empty", "--archive | --data-dir | --dataset shapes10"),
    ("train --data-dir file", "--data-dir file is a file"),
    ("train --data-dir /proc/nosuch/x --no-download", "cannot write a data set"),
    ("train --data-dir empty --archive nosuch.tar.gz", "nosuch.tar.gz does not exist"),
    ("train --data-dir empty --archive file", "cannot read --archive | fetch it again from http"),
    ("datasets prepare cifar10 --data-dir empty --archive foreign.tar.gz", "is not CIFAR-10"),
    ("datasets prepare cifar10 --data-dir empty --archive empty", "is not CIFAR-10"),
    ("datasets prepare cifar10 --data-dir empty --archive cut.tar.gz", "cut.tar.gz | damaged"),
    ("datasets prepare cifar10 --data-dir empty --archive part.tar.gz", "incomplete | test_batch"),
    ("datasets prepare cifar10 --data-dir empty --archive short.tar.gz", "data_batch_1.bin holds"),
    ("datasets prepare cifar10 --data-dir empty --url ftp://x/y", "http:// or https://"),
    ("datasets prepare shapes10 --data-dir empty --archive file", "leave --archive out"),
    (f"{TRAIN} --dataset texts", "texts"),
    (f"{TRAIN} --archive foreign.tar.gz", "foreign.tar.gz is not CIFAR-10"),
    (f"{TRAIN} --archive file", "cannot read --archive file"),
    ("train --fallback-shapes10 --data-dir empty --archive file", "cannot read --archive file"),
    (f"{TRAIN} --test-fraction 0.2", "has a test split: leave --test-fraction away"),
    (f"{TRAIN} --dataset cifar100 --data-dir data/cifar10", "holds cifar10 3.0.2, not cifar100"),
    ("train --data-dir gs://b/d", "argument --data-dir: gs://b/d is an address"),
    ("train --workdir=", "argument --workdir: the path is empty"),
    # run directories
    (f"{TRAIN} --workdir file", "--workdir | file is a file"),
    (f"{TRAIN} --workdir file/run", "--workdir | cannot be written"),
    (f"{TRAIN} --workdir /proc/nosuch", "--workdir /proc/nosuch cannot be written"),
    (f"{TRAIN} --workdir r\udce9", "--workdir | r\\udce9: checkpoints need a name in UTF-8"),
    (f"{TRAIN} --workdir notes", "holds other files (a.txt"),
    (f"{TRAIN} --workdir notes --overwrite", "holds other files (a.txt"),
    (f"{TRAIN} --workdir {'x' * 300}", "File name too long"),
    (f"{TRAIN} --workdir run --seed 7 --epochs 3", "epochs: 1 -> 3 | seed: 42 -> 7 | --overwrite"),
    (f"{TRAIN} --workdir run --model deep_cnn", "model: tutorial_cnn -> deep_cnn"),
    (
        f"{TRAIN} --workdir onecycle --schedule onecycle --epochs 3",
        "holds a run of 1 epochs | --epochs 3 | onecycle schedule depend on --epochs | --overwrite",
    ),
    (
        f"{TRAIN} --workdir several --seeds 1:3 --epochs 3",
        "holds a run of 1 epochs | --epochs 3 | state to go on from is removed | --overwrite",
    ),
    (f"{TRAIN} --workdir other-data", "data set fingerprint"),
    (f"{TRAIN} --workdir broken-config", "config.json cannot be read"),
    (f"{TRAIN} --workdir empty-config", "config.json is damaged"),
    (f"{TRAIN} --workdir no-config", "no config.json | --overwrite"),
    (f"{TRAIN} --workdir locked", "in use by another process"),
    (f"{TRAIN} --workdir dangling", "dangling is a link to nowhere, which is not there"),
    ("evaluate nosuch --data-dir data", "nosuch does not exist"),
    ("evaluate file --data-dir data", "file is a file"),
    ("evaluate empty --data-dir data", "no checkpoint in"),
    ("evaluate no-config --data-dir data", "no config.json"),
    ("evaluate broken-config --data-dir data", "config.json cannot be read"),
    ("evaluate empty-config --data-dir data", "config.json is damaged"),
    ("evaluate wrong-config --data-dir data", "config.json is damaged"),
    ("evaluate new-config --data-dir data", "format 99"),
    ("evaluate run --data-dir data --checkpoint bets", "best, latest or a step, got 'bets'"),
    ("evaluate run --data-dir data --checkpoint 77", "no checkpoint of step 77 | 8"),
    ("evaluate run --data-dir data --split tets", "no split 'tets' | train (600), test (200)"),
    ("evaluate no-validation --data-dir data --split validation", "no validation images | (200)"),
    ("evaluate other-data --data-dir data --split validation", "the run held out | holds others"),
    ("evaluate run --data-dir data --dataset shape10", "did you mean 'shapes10'"),
    ("evaluate run --data-dir data --image-size 40", "images of 32 pixels | --image-size 32"),
    ("evaluate run --data-dir empty --no-download", "--archive | --data-dir"),
    ("evaluate other-model --data-dir data", "of another model"),
    ("evaluate damaged --data-dir data", "no usable checkpoint | 8: | damaged"),
    # images
    ("predict run nosuch.png", "no such image: nosuch.png"),
    ("predict run good.png nosuch*.png", "no such image: nosuch*.png"),
    ("predict run notes", "no images in the folder notes"),
    ("predict run empty", "no images in the folder empty"),
    ("predict run file", "cannot read the image file"),
    ("predict run cut.png", "cannot read the image cut.png"),
    ("predict run cut.jpg", "cannot read the image cut.jpg"),
    ("predict run nothing.png", "cannot read the image nothing.png"),
    (f"predict run {'x' * 300}", "File name too long"),
    ("predict damaged good.png", "no usable checkpoint"),
    ("predict nosuch good.png", "nosuch does not exist"),
]


def tar(path, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make(place, name):
    """Makes the things that only some cases name."""
    binary = [f"data_batch_{k}.bin" for k in range(1, 6)]
    rng = np.random.default_rng(0)
    if name == "foreign.tar.gz":
        tar(place / name, {"readme.txt": b"hello"})
    elif name == "part.tar.gz":
        tar(place / name, dict.fromkeys(binary, b"x" * 3073))
    elif name == "short.tar.gz":
        tar(place / name, dict.fromkeys([*binary, "test_batch.bin", "batches.meta.txt"], b"x"))
    elif name == "cut.tar.gz":
        content = {name: rng.bytes(20000) for name in binary}
        tar(place / "whole.tar.gz", content)
        data = (place / "whole.tar.gz").read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])
    elif name == "texts":
        folder = place / "data" / "texts" / "1.0.0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"')
    elif name == "onecycle":
        change(place, name, lambda c: c["recipe"].update(schedule="onecycle"))
    elif name == "several":
        change(place, name, lambda c: c.update(seed=1, seeds=[1, 2]))
    elif name == "other-data":
        change(place, name, lambda c: c["dataset"].update(fingerprint="0" * 64))
    elif name == "no-validation":
        # As many steps an epoch as the run of 480 images in batches of 60.
        change(place, name, lambda c: c["recipe"].update(validation_fraction=0.0, batch_size=75))
    elif name == "dangling":
        (place / name).symlink_to("nowhere")
    elif name == "broken-config":
        copy_run(place / "run", place / name)
        (place / name / "config.json").write_text('{"format": 1, "reci')
    elif name == "empty-config":
        change(place, name, lambda c: c.pop("dataset"))
    elif name == "wrong-config":
        change(place, name, lambda c: c["dataset"].update(sizes={"train": "many"}))
    elif name == "new-config":
        change(place, name, lambda c: c.update(format=99))
    elif name == "other-model":
        change(place, name, lambda c: c["recipe"].update(model="deep_cnn"))
    elif name == "no-config":
        copy_run(place / "run", place / name)
        (place / name / "config.json").unlink()
    elif name == "locked":
        copy_run(place / "run", place / name)
    elif name == "damaged":
        copy_run(place / "run", place / name)
        for manifest in (place / name / "checkpoints").glob(f"*/{MANIFEST}"):
            manifest.write_text("{}")


def change(place, name, edit):
    copy_run(place / "run", place / name)
    path = place / name / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line[:60] for line, _ in CASES])
def test_one_line_and_nothing_lost(line, expected, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    command, *arguments = words(line)
    for word in dict.fromkeys(arguments):
        make(place, word)
    before = snapshot(place)
    capsys.readouterr()
    with open(place / "file") as lock:
        if "locked" in arguments:
            lock = open(place / "locked" / ".lock", "w")  # noqa: SIM115 - closed at the end
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            code = start(COMMANDS[command], arguments)
        finally:
            lock.close()
            shutil.rmtree(place / "data" / "texts", ignore_errors=True)
    check(capsys, place, code, expected, before)


def test_there_are_enough_cases():
    assert len(CASES) >= 40
    assert len({line for line, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("train", "--model dropout_cn", "did you mean 'dropout_cnn'"),
        ("train", "--device gpu --data-dir empty", "--device gpu: JAX finds no such device"),
        ("predict", "run good.png cut.png", "cannot read the image cut.png"),
        ("datasets", "prepare nosuch", "no prepared data set 'nosuch'"),
    ],
)
def test_as_a_user_sees_it(module, arguments, expected, place, tmp_path_factory):
    environment = command_environment(tmp_path_factory.mktemp("xla"))
    if module == "train":
        environment.pop("JAX_PLATFORMS")
    before = snapshot(place)
    done = subprocess.run(
        [sys.executable, "-m", f"cifar_jax.{module}", *words(arguments)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    after = snapshot(place)
    assert all(after.get(name) == content for name, content in before.items())
    assert str(ROOT) not in line


def test_another_hash_than_expected(place, capsys, monkeypatch):
    """A server that sends a file of the right size and other content."""
    import http.server
    import threading

    content = b"x" * 5000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    import dataclasses

    spec = dataclasses.replace(archives.ARCHIVES["cifar10"], size=len(content))
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", spec)
    before = snapshot(place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        arguments = ["prepare", "cifar10", "--data-dir", str(place / "empty"), "--url", url]
        code = start(datasets_command.main, arguments)
        server.shutdown()
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "another hash than expected" in line
    assert snapshot(place).items() >= before.items()
    assert not list((place / "empty").rglob("*.tar.gz*")), "a wrong file must not stay"


def test_a_corrupt_cache_is_mended_with_a_notice(tmp_path, trained, capsys):
    data = prepare_tiny(tmp_path / "data")
    (images,) = data.rglob("test-*/images.npy")
    good = images.read_bytes()
    content = bytearray(good)
    content[-1] ^= 255
    images.write_bytes(content)
    capsys.readouterr()
    result = evaluate.main([str(trained), "--data-dir", str(data)], say=id)
    assert "corrupt and will be made again" in capsys.readouterr().err
    assert images.read_bytes() == good
    expected = json.loads((trained / "summary.json").read_text())
    assert result["test_correct"] == expected["test_correct"]


def test_a_damaged_summary_is_written_anew(tmp_path, trained, tiny):
    workdir = copy_run(trained, tmp_path / "run")
    (workdir / "summary.json").write_text('{"test_loss": 1')
    lines = []
    arguments = [*words(QUICK), "--data-dir", str(tiny), "--workdir", str(workdir)]
    summary = train.main(arguments, say=lines.append)
    assert "summary.json is damaged" in lines[0]
    expected = json.loads((trained / "summary.json").read_text())
    assert summary["test_loss"] == expected["test_loss"]
    assert json.loads((workdir / "summary.json").read_text())["test_loss"] == summary["test_loss"]


def test_random_bytes_for_an_archive(tmp_path, monkeypatch, capsys):
    """No damage brings anything but the one line."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    good = gzip.compress(rng.bytes(2000))
    path = tmp_path / "archive.tar.gz"
    for k in range(20):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        path.write_bytes(rng.bytes(300) if k % 4 == 0 else data)
        arguments = ["prepare", "cifar10", "--data-dir", str(tmp_path), "--archive", str(path)]
        assert start(datasets_command.main, arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
