"""Checkpoints under damage, full disks and kills: never garbage, never a traceback."""

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
import pytest
from checkpoint_states import assert_same, fill, make_state

from cifar_jax.checkpoints import manifests
from cifar_jax.checkpoints.save_restore import Checkpoints, restore
from cifar_jax.runtime.errors import UserError

pytestmark = pytest.mark.extended

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


def test_a_step_saved_again_after_its_damaged_checkpoint_was_deleted_is_kept(tmp_path):
    fill(tmp_path, 10, 20)
    (tmp_path / "20" / "state" / "_METADATA").write_text("{}")
    with Checkpoints(tmp_path, keep_latest=2) as c:
        assert c.restore(make_state(0)).step == 10
        c.save(15, make_state(15), metric=2.0, block=True)
        assert not (tmp_path / "20").exists()
        c.save(20, make_state(20), metric=0.01, block=True)
        c.save(25, make_state(25), metric=1.0, block=True)
        assert c.steps() == [20, 25]
        assert c.best_step() == 20
        assert_same(c.restore(make_state(0), which="best").state, make_state(20))


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
from cifar_jax.checkpoints.save_restore import Checkpoints
from cifar_jax.runtime.errors import UserError, run_command
like = {"w": jnp.zeros(())}
def main():
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
        assert (found.step, float(found.state["w"])) == (1, 1), found
    c.save(2, {"w": jnp.float32(2)}, block=True)
    assert float(c.restore(like).state["w"]) == 2
    assert c.steps() == [1, 2]
sys.exit(run_command(main))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are a POSIX feature")
def test_writes_that_fail_in_the_operating_system(tmp_path):
    # A file size limit makes write(2) fail just as a full disk does, and needs no privileges.
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"},  # other tests read from it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


LATE_WRITE = """
import sys
import jax.numpy as jnp
from cifar_jax.checkpoints.save_restore import Checkpoints
from cifar_jax.runtime.errors import run_command
def main():
    with Checkpoints(sys.argv[1]) as c:
        c.save(1, {"w": jnp.zeros(())})
run_command(main)
class Late:
    def __del__(self):
        raise self.error
for text in ("Event loop is closed", "something else"):
    late = Late()
    late.error = RuntimeError(text)
    del late
"""


def test_writes_that_end_after_a_failed_save_print_nothing(tmp_path):
    """What they raise nobody can catch; every other such error is still printed."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_WRITE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "something else" in done.stderr
    assert "Event loop is closed" not in done.stderr


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
    context.set_forkserver_preload(
        ["cifar_jax.checkpoints.save_restore", "optax", "orbax.checkpoint", "pytest"]
    )
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
