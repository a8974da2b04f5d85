"""What a run writes down: `metrics.jsonl`, `summary.json`, TensorBoard events.

A row of `metrics.jsonl` is one JSON object with a `kind`:

- `window`: `epoch`, `step`, `loss` (the mean over the steps since the window before);
- `epoch`: `epoch`, `step`, `train_loss`, `train_accuracy`, `learning_rate`, and where there are
  validation images `validation_loss`, `validation_accuracy`;
- `test`: what `cifar_jax.reporting.console.results` returns.

`epoch` counts from 1, `step` from the start of the run, losses are means an image in nats,
accuracies lie in [0, 1]. What depends on the clock stands under `timing`, so that two runs of
equal results differ in nothing else. Numbers that are not finite are written as null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import write_json


def to_json(value):
    """Returns `value` in JSON's own types: arrays become lists, nan and infinities None.

    Raises:
      TypeError: a value that has no JSON form.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return to_json(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _encode(row: Mapping) -> bytes:
    text = json.dumps(to_json(row), ensure_ascii=False, allow_nan=False)
    # Lone surrogates (undecodable bytes in a file name) become JSON escapes.
    return text.encode("utf-8", "backslashreplace") + b"\n"


class MetricsLog:
    """An append-only `metrics.jsonl` that a resumed run cuts back to its checkpoint.

    Save `offset()` with a checkpoint (after `sync()`), and `truncate` to it on resuming: rows
    written after the checkpoint go, and the run writes them again. Opening the file drops an
    unfinished last line, which a crash may have left.

    Raises (from every method that touches the file):
      UserError: the file cannot be opened or written; a row that did not fit on the disk is
        taken back whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._blame("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._cut(os.fstat(self._file).st_size)

    @contextlib.contextmanager
    def _blame(self, action: str):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot {action} {self.path}: {error.strerror}") from error

    def _cut(self, offset: int) -> None:
        """Shortens the file to the last whole line that ends at `offset` or before."""
        at = min(offset, os.fstat(self._file).st_size)
        while at:
            start = max(0, at - 65536)
            newline = os.pread(self._file, at - start, start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        os.ftruncate(self._file, at)
        self._offset = at

    def append(self, kind: str, **values) -> dict:
        """Writes one row and returns it as given; a killed process loses no row written before.

        Args:
          kind: `window`, `epoch` or `test`.
          **values: numbers, strings, arrays, and mappings or sequences of them.
        """
        row = {"kind": kind, **values}
        line = _encode(row)
        with self._blame("write"):
            done = 0
            try:
                while done < len(line):
                    done += os.write(self._file, line[done:])
            except OSError:
                os.ftruncate(self._file, self._offset)
                raise
        self._offset += len(line)
        return row

    def offset(self) -> int:
        """Returns the file's length in bytes: where the next row will begin."""
        return self._offset

    def truncate(self, offset: int) -> int:
        """Drops the rows past `offset`; returns how many bytes the file falls short of it.

        Anything but 0 means that rows from before the checkpoint are gone (the file was edited
        or removed): training can go on, but the log has a gap and the user should be told.
        """
        with self._blame("shorten"):
            self._cut(offset)
            os.fsync(self._file)
        return offset - self._offset

    def sync(self) -> None:
        """Returns once all rows are on the disk."""
        with self._blame("write"):
            os.fsync(self._file)

    def close(self) -> None:
        """Syncs and closes the file. Closing twice is harmless."""
        if self._file >= 0:
            file, self._file = self._file, -1
            with self._blame("write"):
                try:
                    os.fsync(file)
                finally:
                    os.close(file)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | Path, kind: str | None = None, *, timing: bool = True) -> list[dict]:
    """Returns the rows of a `metrics.jsonl`, an unfinished last line left out.

    Args:
      path: the file.
      kind: only rows of this kind.
      timing: False leaves out what depends on the clock.

    Raises:
      UserError: the file cannot be read, or a line before the last is not a row.
    """
    try:
        *lines, _unfinished = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if kind is not None and row["kind"] != kind:
                continue
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a row of metrics; remove it") from None
        rows.append(row if timing else {k: v for k, v in row.items() if k != "timing"})
    return rows


def numbers_of(row: Mapping) -> dict[str, float]:
    """Returns {`kind/name`: value} of a row's numbers, apart from where it stands."""
    return {
        f"{row['kind']}/{name}": value
        for name, value in {**row, **row.get("timing", {})}.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in ("step", "epoch")
    }


class TensorBoardLog:
    """Writes rows as TensorBoard event files; needs the extra `tensorboard`.

    The package, tensorboardX, needs neither TensorFlow nor TensorBoard to write them. (It
    imports torch where torch is installed, which costs a few seconds at the start.)

    Args:
      directory: where the event files go, for `tensorboard --logdir`.
      resumed_at: the step a resumed run starts from; TensorBoard then hides later points of
        the event files before. None for a new run.

    Raises:
      UserError: tensorboardX is not installed, or, from every method, the files cannot be written.
    """

    def __init__(self, directory: str | Path, *, resumed_at: int | None = None):
        try:
            from tensorboardX import event_file_writer
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise UserError(
                "TensorBoard files need tensorboardX: pip install 'cifar_jax[tensorboard]'"
            ) from None
        self._directory = directory
        with self._blame():
            Path(directory).mkdir(parents=True, exist_ok=True)
            # Not their SummaryWriter, whose threads print what fails, and then wait for ever.
            self._writer = event_file_writer.EventsWriter(os.path.join(directory, "events"))
            if resumed_at is not None:
                # TensorBoard drops points at or after this step.
                start = SessionLog(status=SessionLog.START)
                event = Event(step=resumed_at + 1, session_log=start, wall_time=time.time())
                self._writer.write_event(event)

    @contextlib.contextmanager
    def _blame(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write TensorBoard files to {self._directory}: {error.strerror}"
            ) from error

    def append(self, row: Mapping) -> None:
        """Writes the row's numbers as scalars `kind/name` at its step (0 where it has none)."""
        from tensorboardX.summary import scalar

        for name, value in numbers_of(row).items():
            self._write(scalar(name, value), int(row.get("step", 0)))
        if row["kind"] == "epoch":
            with self._blame():
                self._writer.flush()

    def add_text(self, name: str, text: str) -> None:
        """Writes a text, in Markdown."""
        from tensorboardX.summary import text as text_summary

        self._write(text_summary(name, text), 0)

    def _write(self, summary, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with self._blame():
            event = Event(step=step, summary=summary, wall_time=time.time())
            self._writer.write_event(event)

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        with self._blame():
            self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def write_summary(path: str | Path, summary: Mapping) -> None:
    """Writes `summary.json` in one piece: readers see the old file or the new one, never half.

    Raises:
      UserError: it cannot be written; the old file is as it was.
    """
    write_json(Path(path), to_json(summary))
