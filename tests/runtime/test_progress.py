"""The progress bar: drawn on a terminal only, and nothing without a stream."""

import io
import sys

import pytest

from cifar_jax.runtime.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_loss_and_rate_on_a_terminal_only(capsys):
    for stream in (_Terminal(), io.StringIO()):
        with Progress(1000, done=200, stream=stream) as progress:
            progress._bar.refresh()
            before = stream.getvalue()
            progress.update(300, epoch=2, loss=1.2345)
            progress._bar.refresh()
            progress.print("a line")
        progress.print("after the end")
        shown = stream.getvalue()
        if stream.isatty():
            assert "compiling ..." in before
            assert "images/s" not in before
            assert "epoch 2" in shown
            assert "loss 1.234" in shown
            assert "50%" in shown
            assert "images/s" in shown
            assert "left" in shown
        else:
            assert shown == ""
        assert capsys.readouterr().out == "a line\nafter the end\n"


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_without_a_stream_nothing_is_printed(monkeypatch, stream):
    found = _Terminal() if stream == "closed" else None
    if found:
        found.close()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setattr(sys, "stdout", None)
    with Progress(10) as progress:
        progress.update(5, epoch=1, loss=1.0)
        progress.print("a line")
