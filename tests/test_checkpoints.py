"""Checkpoints: exact round trips, retention, and every kind of damage a run meets."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cifar_jax import checkpoints, manifests
from cifar_jax.checkpoints import Checkpoints, locate, restore
from cifar_jax.errors import UserError


def make_state(step):
    """A state of every kind of leaf, each of which follows from `step`."""
    values = np.random.default_rng(step).standard_normal((5, 64), np.float32)
    params = {
        "conv1": {"kernel": jnp.asarray(values), "bias": None},
        "fc": {"kernel": jnp.asarray(values[:3, :2], jnp.bfloat16), "bias": jnp.zeros((0,))},
    }
    return {
        "params": params,
        "opt_state": optax.adam(1e-3).init(params),
        "step": jnp.int32(step),
        "key": jax.random.fold_in(jax.random.key(7), step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "flags": np.array([True, step % 2 == 0]),
        "total": np.float64(step / 3),
        "epoch": step,
    }


def host(leaf):
    if jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert type(a) is type(b), path
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), path
        np.testing.assert_array_equal(host(a), host(b), strict=True, err_msg=str(path))


def fill(directory, *steps, **options):
    with Checkpoints(directory, **options) as c:
        for step in steps:
            c.save(step, make_state(step), {"epoch": step}, metric=1 / (1 + step))


# Round trips


def test_restores_exactly_what_was_saved(tmp_path):
    extra = {"epoch": 2, "sum": 0.1 + 0.2, "rows": [{"a": None}], "name": "é"}
    with Checkpoints(tmp_path / "new" / "c") as c:
        assert c.latest_step() is None
        c.save(5, make_state(5), extra, metric=0.25)
        found = c.restore(make_state(0))
    assert (found.step, found.extra, found.metric, found.skipped) == (5, extra, 0.25, [])
    assert_same(found.state, make_state(5))
    # Typed keys draw the same numbers.
    assert jax.random.bits(found.state["key"]) == jax.random.bits(make_state(5)["key"])
    # Shapes alone describe a state as well.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
        make_state(0),
    )
    assert_same(restore(tmp_path / "new" / "c", shapes).state, make_state(5))


def test_a_saved_state_may_be_donated_and_host_arrays_overwritten(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state):
        w, key = state
        return w + 1, jax.random.fold_in(key, 1)

    size = 1_000_000  # large enough that writing outlasts the steps that follow
    state, log, keys = (jnp.zeros((size,)), jax.random.key(0)), np.zeros((size,), np.int32), []
    with Checkpoints(tmp_path, keep_latest=6) as c:
        for step in range(20):
            state = advance(state)
            log += 1
            keys.append(np.array(jax.random.key_data(state[1])))
            if step % 4 == 0:
                c.save(step, (state, log))
        for step in range(0, 20, 4):
            (w, key), saved_log = c.restore((state, log), which=step).state
            assert (np.asarray(w) == step + 1).all()
            assert (saved_log == step + 1).all()
            np.testing.assert_array_equal(jax.random.key_data(key), keys[step])


def on_mesh(state, count, axis):
    """The state on `count` devices, arrays whose first axis divides split along it."""
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))

    def place(leaf):
        split = axis and leaf.ndim and leaf.shape[0] % count == 0
        return jax.device_put(
            leaf,
            NamedSharding(
                mesh, PartitionSpec("d" if split else None) if leaf.ndim else PartitionSpec()
            ),
        )

    return jax.tree.map(place, state)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 2), (2, 4)])
def test_a_run_moves_to_other_devices(tmp_path, before, after):
    state = {
        "w": jnp.arange(48.0).reshape(16, 3),
        "b": jnp.float32(2),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 8),
    }
    with Checkpoints(tmp_path) as c:
        c.save(1, on_mesh(state, before, axis=True))
        target = on_mesh(jax.tree.map(lambda x: x, state), after, axis=True)
        for like in (
            target,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
            ),
        ):
            got = c.restore(like).state
            assert_same(got, state)
            for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
                assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        free = c.restore(jax.eval_shape(lambda: state)).state
    assert_same(free, state)
    # No sharding asked for: uncommitted, so that a computation on any device accepts it.
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))


# Which are kept, which is best


@pytest.mark.parametrize(
    ("metrics", "best", "kept"),
    [
        ([3.0, 2.0, 1.0, 2.0, 3.0], 2, [2, 3, 4]),
        ([1.0, 2.0, 3.0, 4.0], 0, [0, 2, 3]),
        ([4.0, 3.0, 2.0], 2, [1, 2]),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 1, [1, 3, 4]),
        ([float("nan"), 5.0, float("nan"), float("-inf"), float("inf")], 1, [1, 3, 4]),
        ([float("nan"), None, float("nan")], None, [1, 2]),
        ([None, 7.0, None, None, None], 1, [1, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, metrics, best, kept):
    with Checkpoints(tmp_path, keep_latest=2) as c:
        for step, metric in enumerate(metrics):
            c.save(step, {"w": jnp.float32(step)}, metric=metric)
        assert c.steps() == kept
        assert c.best_step() == best
        assert c.latest_step() == len(metrics) - 1
        like = {"w": jnp.float32(0)}
        if best is None:
            with pytest.raises(UserError, match="has a metric yet"):
                c.restore(like, which="best")
        else:
            found = c.restore(like, which="best")
            assert (found.step, float(found.state["w"])) == (best, best)
            assert found.metric == metrics[best]
    assert sorted(os.listdir(tmp_path)) == [str(step) for step in kept]


def test_a_step_saved_again_replaces_the_first_only_when_committed(tmp_path, monkeypatch):
    like = {"w": jnp.float32(0)}
    with Checkpoints(tmp_path) as c:
        c.save(4, {"w": jnp.float32(1)}, block=True)
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "write", no_space)
            with pytest.raises(UserError):
                c.save(4, {"w": jnp.float32(2)}, block=True)
        assert float(c.restore(like).state["w"]) == 1
        c.save(4, {"w": jnp.float32(3)}, block=True)
        assert float(c.restore(like).state["w"]) == 3
        assert float(c.restore(like, which=4).state["w"]) == 3
        assert c.steps() == [4]
        assert len(os.listdir(tmp_path)) == 1


def test_keep_latest_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        Checkpoints(tmp_path, keep_latest=0)


# Errors of the user


def test_another_model_is_refused_with_both_shapes(tmp_path):
    fill(tmp_path, 1)
    other = make_state(1)
    other["params"]["conv1"]["kernel"] = jnp.zeros((3, 64))
    other["step"] = jnp.float32(0)
    other["params"]["extra"] = jnp.zeros(4)
    other["keys"] = jax.random.split(jax.random.key(0), 3)
    other["epoch"] = None
    with pytest.raises(UserError) as caught:
        restore(tmp_path, other)
    text = str(caught.value)
    assert "5 of 17 entries differ" in text
    assert "epoch is Python int there and absent here" in text
    assert "keys is key<rbg>[3] there and key<fry>[3] here" in text
    assert "params/conv1/kernel is float32[5, 64] there and float32[3, 64] here" in text
    assert "params/extra is absent there and float32[4] here" in text
    assert "and 1 more" in text
    assert "\n" not in text


def test_what_cannot_be_found(tmp_path):
    like = make_state(0)
    for directory in (tmp_path, tmp_path / "absent"):
        assert checkpoints.latest_step(directory) is None
        assert checkpoints.best_step(directory) is None
        assert checkpoints.steps(directory) == []
        with pytest.raises(UserError, match="no checkpoint in"):
            restore(directory, like)
    fill(tmp_path, 1, 2)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*complete: 1, 2"):
        restore(tmp_path, like, which=3)
    with pytest.raises(UserError, match="give latest, best or a step"):
        restore(tmp_path, like, which="newest")


def test_directories_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    places = [(file, "it is a file"), (file / "below", "Not a directory")]
    if sys.platform == "linux":
        places.append(("/proc/checkpoints", "cannot make directory"))
    if os.geteuid() != 0:  # root writes everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        places += [(closed, "Permission denied"), (closed / "below", "Permission denied")]
    for place, message in places:
        with pytest.raises(UserError, match=message):
            Checkpoints(place)


def test_locate(tmp_path):
    run = tmp_path / "run"
    fill(run / "checkpoints", 1, 2)
    where = run / "checkpoints"
    assert locate(run) == (where, "latest")
    assert locate(where, "best") == (where, "best")
    assert locate(where / "1", "best") == (where, 1)
    (run / "empty").mkdir()
    (run / "file").write_text("")
    for path, message in [
        ("absent", "does not exist"),
        ("file", "is a file"),
        ("empty", "no checkpoint in"),
    ]:
        with pytest.raises(UserError, match=message):
            locate(run / path)
    directory, which = locate(where / "1")
    assert restore(directory, make_state(0), which=which).step == 1


def test_asking_for_steps_does_not_import_orbax(tmp_path):
    fill(tmp_path, 3)
    code = (
        "import sys; from cifar_jax.checkpoints import Checkpoints, latest_step\n"
        "assert latest_step(sys.argv[1]) == 3 and latest_step(sys.argv[1] + '/none') is None\n"
        "with Checkpoints(sys.argv[1]) as c: assert c.steps() == [3]\n"
        "assert not any(name.split('.')[0] in ('orbax', 'tensorstore') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_other_orbax_tools_can_read_the_state(tmp_path):
    import orbax.checkpoint as ocp

    fill(tmp_path, 3)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "3" / "state")
    kernel = tree["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, make_state(3)["params"]["conv1"]["kernel"])


# Damage


def damages(path, rng):
    """(description, new content or None for a deletion) for one file of a checkpoint."""
    content = path.read_bytes()
    yield "deleted", None
    for size in {0, len(content) // 2, len(content) - 1} - {len(content), -1}:
        yield f"cut to {size}", content[:size]
    if content:
        yield "longer", content + b"\0"
        for offset in rng.integers(0, len(content), 3 if path.name != manifests.MANIFEST else 40):
            flipped = bytearray(content)
            flipped[offset] ^= 1 << rng.integers(0, 8)
            yield f"bit flipped at {offset}", bytes(flipped)


def test_any_damage_is_noticed_and_the_former_checkpoint_used(tmp_path):
    small = {"w": jnp.arange(300.0), "key": jax.random.key(1)}
    former = {"w": -small["w"], "key": jax.random.key(2)}
    with Checkpoints(tmp_path) as c:
        c.save(1, former, {"epoch": 1})
        c.save(2, small, {"epoch": 2})
    rng = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    assert len(files) > 5
    noticed = tried = 0
    for path in files:
        intact = path.read_bytes()
        for what, content in list(damages(path, rng)):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            found = restore(tmp_path, small)
            tried += 1
            if found.step == 2:  # harmless damage, e.g. to a letter's case in a number's exponent
                assert path.name == manifests.MANIFEST, (path, what)
                assert (found.extra, found.skipped) == ({"epoch": 2}, []), (path, what)
                assert_same(found.state, small)
            else:
                noticed += 1
                assert (found.step, found.extra) == (1, {"epoch": 1}), (path, what)
                assert len(found.skipped) == 1, (path, what)
                assert found.skipped[0].startswith("checkpoint 2: "), (path, what)
                assert_same(found.state, former)
            path.write_bytes(intact)
    assert restore(tmp_path, small).step == 2
    assert noticed >= tried - 2
    shutil.rmtree(tmp_path / "2" / "state")
    assert restore(tmp_path, small).step == 1


def test_none_good_lists_what_is_wrong_with_each(tmp_path):
    fill(tmp_path, 1, 2, 3, keep_latest=3)
    (tmp_path / "1" / manifests.MANIFEST).unlink()
    (tmp_path / "2" / manifests.MANIFEST).write_text("{}")
    (tmp_path / "3" / "state" / "_METADATA").write_text("{}")
    for which in ("latest", "best"):
        with pytest.raises(UserError) as caught:
            restore(tmp_path, make_state(0), which=which)
        text = str(caught.value)
        assert "3: state/_METADATA has 2 bytes" in text
        assert "2: checkpoint.json is damaged" in text
        assert "1: incomplete" in text
    with pytest.raises(UserError, match=r"no usable checkpoint in .*: 2: checkpoint.json is dam"):
        restore(tmp_path, make_state(0), which=2)


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path):
    fill(tmp_path, 1, 2, 3, keep_latest=3)  # the metric falls: 3 is best
    (tmp_path / "3" / "state" / "manifest.ocdbt").unlink()
    found = restore(tmp_path, make_state(0), which="best")
    assert found.step == 2
    assert found.skipped == ["checkpoint 3: state/manifest.ocdbt is missing"]


def test_a_run_goes_on_past_a_damaged_checkpoint(tmp_path):
    fill(tmp_path, 1, 2)
    (tmp_path / "2" / "state" / "_METADATA").write_text("{}")
    with Checkpoints(tmp_path, keep_latest=2) as c:
        assert c.restore(make_state(0)).step == 1
        c.save(2, make_state(2), {"epoch": 2}, metric=0.5, block=True)
        found = c.restore(make_state(0))
        assert (found.step, found.skipped) == (2, [])
        assert_same(found.state, make_state(2))
        assert c.steps() == [1, 2]
        assert len(os.listdir(tmp_path)) == 2  # the damaged folder is gone


def test_a_newer_format_is_not_guessed_at(tmp_path):
    fill(tmp_path, 1)
    path = tmp_path / "1" / manifests.MANIFEST
    body = json.loads(path.read_text())["body"] | {"format": 2}
    path.write_text(json.dumps({"crc32": manifests._checksum(body), "body": body}))
    with pytest.raises(UserError, match="newer version"):
        restore(tmp_path, make_state(0))


# Failing writes


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_asynchronous_save_is_reported_once(tmp_path, monkeypatch):
    like = make_state(0)
    with Checkpoints(tmp_path) as c:
        c.save(1, make_state(1), block=True)
        for report in (c.wait, c.steps, lambda: c.save(3, like), lambda: c.restore(like)):
            with monkeypatch.context() as patch:
                patch.setattr(manifests, "write", no_space)
                c.save(2, make_state(2))  # returns: the failure lies in the background
                with pytest.raises(UserError, match=r"checkpoint 2 .*No space left.*are intact"):
                    report()
            assert c.steps() == [1]
            assert os.listdir(tmp_path) == ["1"]
        c.save(2, make_state(2), block=True)
        assert_same(c.restore(like).state, make_state(2))


def fail_while_saving(c):
    c.save(1, make_state(1))
    raise ZeroDivisionError


def test_leaving_the_context_reports_too_but_hides_no_other_error(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "write", no_space)
    with pytest.raises(UserError, match="No space left"), Checkpoints(tmp_path) as c:
        c.save(1, make_state(1))
    with pytest.raises(ZeroDivisionError) as caught, Checkpoints(tmp_path) as c:
        fail_while_saving(c)
    assert "No space left" in caught.value.__notes__[0]


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from cifar_jax.checkpoints import Checkpoints
from cifar_jax.errors import UserError
like = {"w": jnp.zeros(())}
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"w": jnp.float32(1)}, block=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 20, 300, 2000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            c.save(2, {"w": jnp.ones((1_000_000,)).at[::3].set(0.1) * jnp.arange(1e6)}, block=True)
            raise SystemExit(f"no error with files limited to {limit} bytes")
        except UserError as error:
            assert "could not save checkpoint 2" in str(error), error
            assert "File too large" in str(error), error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found = c.restore(like)
        assert (found.step, float(found.state["w"]), found.skipped) == (1, 1, []), found
    c.save(2, {"w": jnp.float32(2)}, block=True)
    assert float(c.restore(like).state["w"]) == 2
    assert c.steps() == [1, 2]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are a POSIX feature")
def test_writes_that_fail_in_the_operating_system(tmp_path):
    # A file size limit makes write(2) fail just as a full disk does, and needs no privileges.
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Kills


def run_to_be_killed(directory, pipe):
    """Resumes and saves without end; reports each committed step."""
    with Checkpoints(directory, keep_latest=2) as c:
        step = c.restore(killed_state(0)).step if c.steps() else 0
        while True:
            step += 1
            c.save(step, killed_state(step), {"epoch": step}, metric=abs(step % 7 - 3) + 1 / step)
            c.wait()
            pipe.send(step)


def killed_state(step):
    values = np.random.default_rng(step).random((3, 20_000), np.float32)
    return {"w": values[0], "m": list(values[1:]), "key": jax.random.key(step)}


def test_killed_at_any_moment_the_last_committed_save_is_restored(tmp_path):
    # A server that has imported everything but started no JAX backend forks runs in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cifar_jax.checkpoints", "optax", "orbax.checkpoint", "pytest"])
    rng = random.Random(0)
    committed = 0
    interrupted = 0
    kills = 20
    for kill in range(kills):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=run_to_be_killed, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        assert ours.poll(60), "the run did not get as far as its first save"
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while ours.poll():
                committed = ours.recv()
        except EOFError:
            pass
        assert process.exitcode == -signal.SIGKILL, kill
        names = os.listdir(tmp_path)
        whole = [n for n in names if (tmp_path / n / manifests.MANIFEST).exists()]
        interrupted += len(whole) < len(names)
        found = restore(tmp_path, killed_state(0))
        assert found.step in (committed, committed + 1), kill
        assert found.extra == {"epoch": found.step}
        assert_same(found.state, killed_state(found.step))
        best = restore(tmp_path, killed_state(0), which="best")
        assert best.metric == min(abs(s % 7 - 3) + 1 / s for s in range(1, found.step + 1))
        assert_same(best.state, killed_state(best.step))
    assert interrupted >= kills // 3  # or the kills have missed what they were for
