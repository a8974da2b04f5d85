"""Paths as users write them; locks, links and files that others use at the same time."""

import contextlib
import errno
import fcntl
import os
import pwd
from pathlib import Path

import pytest

from cifar_jax import convert, evaluate, export, predict, sweep, train
from cifar_jax.datasets import decoded, locate
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import UserError
from cifar_jax.training.workdir import open_workdir
from cifar_jax.weights import pretrained


@pytest.fixture
def without_home(monkeypatch):
    """A process of a user nobody knows, as in many containers."""

    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("parser", "line"),
    [
        (train.make_parser, "--workdir=~/x --data-dir=~/x --archive=~/x --init-from=~/x"),
        (train.make_parser, "--pretrained=~/x"),
        (evaluate.make_parser, "~/x --data-dir=~/x"),
        (predict.make_parser, "~/x ~/x"),
        (convert.make_parser, "~/x ~/x"),
        (export.make_parser, "~/x ~/x"),
        (sweep.make_parser, "--workdir=~/x --data-dir=~/x"),
    ],
)
def test_a_home_directory_is_known_in_every_option(parser, line, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = vars(parser().parse(line.split()))
    given = [value for value in options.values() if "x" in str(value) and "/" in str(value)]
    assert len(given) == line.count("~")
    assert set(map(str, given)) <= {"/home/me/x", "['/home/me/x']"}


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert files.expanded("~") == "/home/me"
    assert files.expanded("a/~") == "a/~"
    assert files.expanded("~nobody-of-this-name.png") == "~nobody-of-this-name.png"
    assert files.absolute("a") == tmp_path / "a"
    for address in ("gs://bucket/a", "s3://a", "https://a/b", "file:///a"):
        with pytest.raises(UserError, match=r"is an address"):
            files.expanded(address)
    with pytest.raises(UserError, match="empty"):
        files.expanded("")


def test_a_current_folder_that_was_deleted_is_missed_by_relative_paths_alone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert files.absolute(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(UserError, match=r"a lies in the current folder, which was deleted"):
        files.absolute("a")


def test_what_needs_no_home_does_not_ask_for_it(without_home, tmp_path, monkeypatch):
    assert locate.search_dirs(tmp_path) == [tmp_path]
    assert decoded.cache_roots(tmp_path / "s/1.0.0", None) == [tmp_path / "s/1.0.0/cifar_jax_cache"]
    for ask in (lambda: locate.search_dirs(None), pretrained.cache_dir):
        with pytest.raises(UserError, match="no home directory is known; set HOME"):
            ask()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert locate.search_dirs(None) == [tmp_path]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_dir() == tmp_path / "torch/hub/checkpoints"


def test_a_remote_data_directory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/data is an address"):
        locate.search_dirs(None)
    assert locate.search_dirs(tmp_path) == [tmp_path]


@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK"])
def test_without_locks_it_goes_on_with_a_notice(name, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(getattr(errno, name), "no such thing")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with files.lock(tmp_path / ".lock", waiting=lambda: pytest.fail("nobody holds it")):
            pass
    assert capsys.readouterr().err.count(f"no locks in {tmp_path} (no such thing)") == 1


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_a_held_lock_is_in_use(name, tmp_path, monkeypatch):
    calls = []

    def flock(_, how):
        calls.append(how)
        if how & fcntl.LOCK_NB:
            raise OSError(getattr(errno, name), "held")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(tmp_path / ".lock", waiting=lambda: calls.append("in use")):
        assert calls == [fcntl.LOCK_EX | fcntl.LOCK_NB, "in use", fcntl.LOCK_EX]
    with pytest.raises(UserError, match="in use by another process"), open_run(tmp_path / "run"):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), files.replacing(path) as part:
        part.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


class Config:
    """All that `open_workdir` wants of a config that it does not compare."""

    code = None

    def __init__(self, kind):
        self.kind = kind

    def to_dict(self):
        return {"kind": self.kind}


def open_run(path, **options):
    return open_workdir(path, Config("new"), **options)


KINDS = {
    "run": ["metrics.jsonl", "summary.json", "checkpoints/8/state", "plots/a.png"],
    "seeds": ["summary.json", "seed-0/config.json", "seed-0/checkpoints/8", "plots/b.png"],
    "killed seeds": ["groups/0/checkpoints/8", "groups/size.json"],
    "sweep": ["results.csv", "summary.json", "plots/c.png", "groups/program-0/0/complete.json"],
    "nothing but a folder of macOS": [".DS_Store"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [True, False])
def test_overwriting_leaves_nothing_of_a_run_of_another_kind(kind, config, tmp_path):
    path = tmp_path / "run"
    for name in [*KINDS[kind], *["config.json"] * config]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    with open_run(path, overwrite=True) as resume:
        assert not resume
    left = {name for name in os.listdir(path) if not name.startswith(".")}
    assert left == {"config.json"}
    assert "new" in (path / "config.json").read_text()


@pytest.mark.parametrize("name", ["checkpoints", "plots", "seed-3"])
def test_overwriting_deletes_a_link_and_not_what_it_points_to(name, tmp_path, capsys):
    path, far = tmp_path / "run", tmp_path / "far"
    for folder in (path, far):
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
    (path / "config.json").write_text("{}")
    (path / name).symlink_to(far)
    with open_run(path, overwrite=True):
        pass
    assert {p.name for p in path.iterdir()} == {"config.json", ".lock"}
    assert (far / "metrics.jsonl").exists()
    assert (
        f"{name} is a link: deleted; what it points to, {far}, is left" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["link", "link/run"])
def test_a_link_to_nowhere(name, tmp_path):
    (tmp_path / "link").symlink_to("unmounted")
    with pytest.raises(UserError, match=r"link is a link to unmounted, which is not there"):
        open_run(tmp_path / name).__enter__()
    assert not (tmp_path / "unmounted").exists()


def test_removing(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "nowhere").symlink_to("nothing")
    for name in ("link", "nowhere", "absent"):
        files.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"]
    files.remove(Path(tmp_path / "folder"))
    assert not os.listdir(tmp_path)
