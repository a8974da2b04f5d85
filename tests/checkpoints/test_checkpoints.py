"""Checkpoints: exact round trips, other devices, retention, and the user's mistakes."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_same, fill, make_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cifar_jax.checkpoints import manifests
from cifar_jax.checkpoints.manifests import locate
from cifar_jax.checkpoints.save_restore import Checkpoints, restore
from cifar_jax.runtime.errors import UserError


def no_space(*_):
    raise OSError(28, "No space left on device")


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
        ([2.0, 0.0, 1.0, 1.0], 1, [1, 2, 3]),
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
        c.save(4, {"w": jnp.float32(5)}, block=True)
        assert float(c.restore(like).state["w"]) == 5
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


def test_older_runs_have_no_average_of_the_statistics(tmp_path):
    """They were evaluated with the running ones, which begin the average."""
    old = {"batch_stats": {"bn": {"mean": jnp.arange(4.0)}}, "ema_params": {"w": jnp.ones(2)}}
    with Checkpoints(tmp_path) as c:
        c.save(1, {"state": old})
    new = old | {"ema_batch_stats": old["batch_stats"]}
    for device in (None, jax.devices()[1]):
        like = jax.tree.map(jnp.zeros_like, {"state": new})
        got = restore(tmp_path, jax.device_put(like, device) if device else like).state["state"]
        assert_same(got, new)
        mean, average = got["batch_stats"]["bn"]["mean"], got["ema_batch_stats"]["bn"]["mean"]
        assert mean.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()
    other = new | {"ema_batch_stats": {"bn": {"mean": jnp.zeros(5)}}}
    with pytest.raises(UserError, match="entries differ"):
        restore(tmp_path, {"state": other})


def test_what_cannot_be_found(tmp_path):
    like = make_state(0)
    for directory in (tmp_path, tmp_path / "absent"):
        assert manifests.latest_step(directory) is None
        assert manifests.best_step(directory) is None
        assert manifests.steps(directory) == []
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
        "import sys; from cifar_jax.checkpoints.save_restore import Checkpoints\n"
        "from cifar_jax.checkpoints.manifests import latest_step\n"
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
