"""What the training loop drives: a run by itself, or a group of runs with a replica axis."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cifar_jax import input_pipeline, steps
from cifar_jax.input_pipeline import record_source
from cifar_jax.parallel import agreement, placement, programs
from cifar_jax.parallel.placement import Examples, Placement
from cifar_jax.reporting import console
from cifar_jax.runtime.streams import bold
from cifar_jax.training import checks, setup
from cifar_jax.training.setup import Run

Print = Callable[[str], None]


@dataclasses.dataclass
class Arrays:
    """What changes from step to step, on the devices; of a group everything is [R, ...].

    Attributes:
      state: `steps.TrainState`.
      step_metrics: the sums of each step of the epoch under way.
      best: of a group, the states of each run's lowest validation loss so far; else {}.
    """

    state: Any
    step_metrics: dict[str, jax.Array]
    best: Any


class Chunk(NamedTuple):
    """What a training program takes beside the state: see `programs.train_many`."""

    examples: Examples
    batch_indices: jax.Array
    row: int
    start: int
    length: int


class Runs:
    """R runs, called members, of the same programs and shapes: what `OneRun` and `Group` share.
    Arrays on the host are [R, ...], for one run too.

    Each of the two has `alone`, `chunk_seconds` (how long a dispatch should take), and
      place(tree): a tree, of a group [R, ...], on the devices; on_host(tree): from there, [R, ...];
      put(trees): a tree for each member, on the devices;
      abstract_payload(), payload(arrays): what a checkpoint holds, the first as shapes;
      train(arrays, alive, chunk): the arrays after a chunk; the old ones are donated, and a run
        that is not `alive`, bool [R], takes no step;
      finite(arrays): bool [R], whether all weights are;
      label(i): what the rows of a member carry beside their values;
      show_window(row), show_epoch(rows, improved): shows rows of members that are not frozen;
      diverged(i, what, step, latest_step): says that a member's `loss` or `weights` are not finite.
    """

    alone: bool
    chunk_seconds: float

    def __init__(self, members: Sequence[Run], mesh: Mesh | None, programs, say: Print):
        self.members, self.mesh, self.programs, self.say = members, mesh, programs, say
        self.run = members[0]
        self.recipe = self.run.config.recipe
        self.validates = len(self.run.validation) > 0
        windows = self.run.steps_per_epoch if self.alone and self.recipe.log_every else 0
        self.label_width = console.label_width(self.recipe.epochs, windows)
        self.columns = shutil.get_terminal_size().columns
        self._headed = False

    def say_row(self, line: str, *, runs: int = 1, marked: bool = False) -> None:
        """Says a line of the table that training prints, below its heading; in bold where it is
        `marked` and the terminal has that."""
        if not self._headed:
            options = {"validation": self.validates, "runs": runs, "columns": self.columns}
            self.say(console.header(self.label_width, **options))
            self._headed = True
        self.say(bold(line) if marked else line)

    def empty_metrics(self) -> dict[str, jax.Array]:
        shape = () if self.alone else (len(self.members),)
        return self.place(programs.empty_metrics(*shape, self.run.steps_per_epoch))

    def load(self) -> None:
        """Puts the training images on the devices, and what validation reads of them."""
        run, split, place = self.run, self.run.dataset.splits["train"], self.run.place
        images, labels = split.images, split.labels
        validation = [member.validation for member in self.members]
        with run.clock("data"):
            if place is Placement.STREAM and self.validates:  # its own images only, in their order
                images, labels = images[run.validation], labels[run.validation]
                validation = [np.arange(len(labels), dtype=np.int32)]
                place = Placement.SPLIT if agreement.several() else Placement.RESIDENT
            if place is not Placement.STREAM:
                self.examples = placement.put(images, labels, self.mesh, place)
        if self.validates:
            size = min(self.recipe.eval_batch_size, len(run.validation))
            self.validation = self.put(
                [input_pipeline.batches(positions, size) for positions in validation]
            )

    def begin(self) -> Arrays:
        """Returns what the first step starts from."""
        clock = contextlib.nullcontext() if self.alone else self.run.clock("initialisation")
        with clock:
            states = [member.create(initial=member.initial) for member in self.members]
            if self.alone:
                states = [agreement.broadcast_arrays(states[0])]
                self.say(checks.check_first_forward(self.run, states[0]))
            state = self.put(states)
        # No alias of the state: both are donated.
        best = {} if self.alone or not self.validates else self.put(states)
        return Arrays(state, self.empty_metrics(), best)

    def restored(self, payload: dict) -> Arrays:
        """Returns what a checkpoint holds on the devices."""
        payload = self.place(payload)
        return Arrays(payload["state"], payload["record"], payload.get("best", {}))

    def chunks(self, epoch: int, step: int, lengths: programs.Chunks) -> Iterator[Chunk]:
        """Yields the rest of an epoch, as much at a time as `lengths` says."""
        run, size = self.run, self.recipe.batch_size
        orders = [
            input_pipeline.epoch_order(
                m.keys["order"], epoch, m.training, size, self.recipe.drop_last
            )
            for m in self.members
        ]
        if run.place is Placement.STREAM:
            # A process reads the images of its own devices only.
            mine = input_pipeline.columns(
                orders[0], jax.process_index(), jax.process_count(), run.devices
            )
            source = record_source(run.dataset.splits["train"])
            for data, rows, length in input_pipeline.stream(
                source, mine, step, lengths.streamed(size)
            ):
                # An error of one process is told here, before a program on all devices.
                agreement.allgather(length)
                yield Chunk(*placement.put_chunk(data, rows, run.mesh), 0, step, length)
                step += length
            return
        batch_indices = self.put(orders)
        while step < run.steps_per_epoch:
            length = lengths.next(run.steps_per_epoch - step)
            length = agreement.broadcast(length)
            yield Chunk(self.examples, batch_indices, step, step, length)
            step += length

    def validate(self, arrays: Arrays) -> dict[str, np.ndarray] | None:
        """Returns the sums over the validation images, [R, ...]; None where there are none."""
        if not self.validates:
            return None
        with self.run.clock("validation"):
            variables = steps.inference_variables(arrays.state)
            sums = self.programs.evaluate(variables, self.examples, self.validation)
            return self.on_host(sums)

    def next_epoch(self, arrays: Arrays, improved: np.ndarray) -> Arrays:
        """Returns the arrays an epoch starts with; of runs that `improved`, bool [R], the state is
        the best so far."""
        return Arrays(arrays.state, self.empty_metrics(), arrays.best)


class OneRun(Runs):
    """A run by itself. Its best state is a checkpoint, and checkpoints hold finite weights only;
    the command ends where it diverges. Its images may be split over the devices or streamed, and
    several processes may share each batch. Every window and every epoch is a line, and its row goes
    to `events` as well."""

    alone = True
    chunk_seconds = 0.3

    def __init__(self, run: Run, say: Print):
        super().__init__([run], run.mesh, run, say)
        self.events: Callable[[dict], None] = lambda row: None

    def place(self, tree: Any) -> Any:
        return placement.replicate(tree, self.mesh)

    def put(self, trees: Sequence) -> Any:
        return self.place(trees[0])

    def on_host(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.array(x)[None], tree)

    def abstract_payload(self) -> dict:
        return setup.abstract_payload(self.run.shapes, self.run.steps_per_epoch)

    def payload(self, arrays: Arrays) -> dict:
        return setup.payload(arrays.state, arrays.step_metrics)

    def train(self, arrays: Arrays, alive: np.ndarray, chunk: Chunk) -> Arrays:
        changing = (arrays.state, arrays.step_metrics)
        return Arrays(*self.run.train_many(changing, *chunk), {})

    def finite(self, arrays: Arrays) -> np.ndarray:
        return self.on_host(checks.all_finite(arrays.state.params))

    def label(self, i: int) -> dict:
        return {}

    def show_window(self, row: dict) -> None:
        self.events(row)
        steps = self.run.steps_per_epoch
        self.say_row(console.window_line(row, steps, self.label_width))

    def show_epoch(self, rows: list[dict], improved: np.ndarray) -> None:
        (row,) = rows
        self.events(row)
        best, width = bool(improved[0]), self.label_width
        line = console.epoch_line(row, self.recipe.epochs, best=best, width=width)
        self.say_row(line, marked=best)
        if row["epoch"] == 1:
            classes = len(self.run.dataset.class_names)
            for line in checks.stuck_advice(row["train_loss"], classes):
                self.say(line)

    def diverged(self, i: int, what: str, step: int, latest_step: Callable) -> None:
        saved = latest_step()
        raise checks.diverged(what, step, self.recipe, self.run.steps_per_epoch, saved)
