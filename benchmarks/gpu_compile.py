"""Compiles this project's programs for a GPU that is not there, and counts what they launch.

    python -m benchmarks.gpu_compile                        the table of README.md
    python -m benchmarks.gpu_compile --cases tutorial:4,eval/dropout:512,vmap-64/tutorial:4
    python -m benchmarks.gpu_compile --show FILE            the table of a result file again

It needs the CUDA plugin (`pip install '.[cuda12]'` or `'.[cuda13]'`) and no GPU. XLA compiles for
the H100 that `h100.txtpb` describes, without measuring kernels against one another: what runs on
one may be other kernels, but how many there are and what a CUDA graph holds shows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from cifar_jax.runtime.errors import UserError, run_command

CASES = "tutorial:4,adam:128,dropout:20,deep:16,vmap-64/tutorial:4,vmap-64/dropout:20"
TARGET = Path(__file__).with_name("h100.txtpb")
# A line of XLA's dump of what the host starts, in order: depth, number, kind, the rest.
THUNK = re.compile(r"(?P<indent> *)\d+: k(?P<kind>\w+)(?P<rest>.*)")
CONTAINERS = ("CommandBuffer", "While", "Sequential", "Conditional")


def topology():
    """Returns the absent H100's only device.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"the CUDA plugin is needed: pip install '.[cuda13]' ({error})") from None
    jax.default_backend()  # the CPU's, before the name changes: what is compiled is for the GPU
    jax.default_backend = lambda: "gpu"
    return described.devices[0]


def split_of(count: int):
    """Returns so many images without memory for them: one, repeated."""
    import numpy as np

    from cifar_jax.datasets import Split

    images = np.broadcast_to(np.uint8(0), (count, 32, 32, 3))
    return Split(images, np.broadcast_to(np.int32(0), (count,)))


def lower(text: str, device, precision: str, lowering: str, length: int):
    """Returns the lowered program that `cifar_jax.train` runs for a case: a chunk of `length`
    steps (0: its own length), or an evaluation of the test images; and its steps."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, SingleDeviceSharding

    from benchmarks.cases import parse
    from cifar_jax.datasets import Dataset
    from cifar_jax.parallel import programs
    from cifar_jax.parallel.placement import Examples
    from cifar_jax.replicas import programs as replica_programs
    from cifar_jax.runtime.timing import Clock
    from cifar_jax.training import setup
    from cifar_jax.training.workdir import Config, describe_data

    where = SingleDeviceSharding(device)

    def shape(*size, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=where)

    def shapes(tree, *lead):
        return jax.tree.map(lambda x: shape(*lead, *x.shape, dtype=x.dtype), tree)

    form, _, replicas = text.partition("/")[0].partition("-")
    case = parse(text.partition("/")[2] if replicas else text)
    splits = {"train": split_of(50_000), "test": split_of(10_000)}
    dataset = Dataset("cifar10", "3.0.2", "", tuple("abcdefghij"), "", splits)
    lowering = replica_programs.choose_lowering(form, lowering) if replicas else lowering
    config = Config(case.recipe, case.settings(precision), 0, describe_data(dataset))
    run = setup.make_run(config, dataset, setup.Options(lowering=lowering, devices="1"), Clock())
    images = 50_000 if case.kind == "train" else 10_000
    examples = Examples(shape(images, 32, 32, 3, dtype=jnp.uint8), shape(images, dtype=jnp.int32))
    if case.kind == "eval":
        batches = shape(images // case.batch_size, case.batch_size, dtype=jnp.int32)
        variables = {"params": run.shapes.params, "batch_stats": run.shapes.batch_stats}
        return run.evaluate.jitted.lower(shapes(variables), examples, batches), batches.shape[0]
    rows = images // case.batch_size
    length = length or programs.Chunks(rows).next(rows)
    lead = (int(replicas),) if replicas else ()
    changing = (run.shapes, jax.eval_shape(lambda: programs.empty_metrics(rows)))
    changing = shapes(changing, *lead)
    batches = shape(*lead, rows, case.batch_size, dtype=jnp.int32)
    train = run.train_many
    if replicas:
        mesh = Mesh([[device]], (replica_programs.AXIS, "data"))
        changing = (*changing, shape(*lead, dtype=jnp.bool_))
        train = replica_programs.make_programs(run, form, mesh).train
    place = shape(dtype=jnp.int32)
    arrays = (changing, {}, examples, batches, place, place)
    return train.jitted.lower(*arrays, length=length), length


def compiled(text: str, device, **how) -> dict:
    """Compiles a case and returns its row: what `counted` finds, and bytes a step."""
    before = set(dumps())
    program, steps = lower(text, device, **how)
    cost = program.compile().cost_analysis() or {}
    (dump,) = (path for path in set(dumps()) - before if "jit_program" in path.name)
    found = counted(dump.read_text())
    return {"case": text, "steps": steps, **found, "bytes_a_step": cost.get("bytes accessed")}


def dumps() -> list[Path]:
    """Returns the files in which XLA has written down what the host starts."""
    folder = re.search(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[1]
    return list(Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))


def counted(dump: str) -> dict:
    """Counts what one turn of the longest loop in a thunk sequence launches.

    Returns:
      {"kernels", "convolutions" (cuDNN's), "host_calls" (CUDA graphs, and kernels outside of them),
      "graphs", "one_block" (kernels of a single block, on one of the GPU's processors)}.
    """
    # A loop of known length does not run its condition.
    run = re.sub(r"^ *condition:\n(?s:.*?)^ *body:\n", "", dump, flags=re.MULTILINE)
    lines = [found for line in run.splitlines() if (found := THUNK.match(line))]
    bodies = [_inside(lines, i) for i, line in enumerate(lines) if line["kind"] == "While"]
    body = max(bodies, key=len, default=lines)
    depth = min(len(line["indent"]) for line in body)
    kernels = [line for line in body if line["kind"] not in CONTAINERS]
    calls = [line for line in body if len(line["indent"]) == depth]
    return {
        "kernels": len(kernels),
        "convolutions": sum(line["kind"] == "Convolution" for line in kernels),
        "host_calls": len(calls),
        "graphs": sum(line["kind"] == "CommandBuffer" for line in body),
        "one_block": sum("grid: [1, 1, 1]" in line["rest"] for line in kernels),
    }


def _inside(lines: list[re.Match], at: int) -> list[re.Match]:
    """Returns the lines that belong to the container at a place: those after it, further in."""
    depth = len(lines[at]["indent"])
    return list(itertools.takewhile(lambda line: len(line["indent"]) > depth, lines[at + 1 :]))


def table(result: dict) -> str:
    """Returns the result as Markdown."""
    lines = [
        f"Compiled for an H100 by jax {result['jax']}, {result['precision']}, "
        f"convolutions {result['lowering']}; "
        f"{results.stamp(result)}. Of one step (of an evaluation: of one batch):",
        "",
        "| program | kernels | cuDNN convolutions | host calls | CUDA graphs | one-block kernels |",
        "|---|---|---|---|---|---|",
    ]
    names = ("case", "kernels", "convolutions", "host_calls", "graphs", "one_block")
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in result["cases"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, help="as in benchmarks.throughput, by commas")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--conv", default="auto", help="as of cifar_jax.train")
    parser.add_argument("--length", type=int, default=0, help="steps of a program; 0: its own")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    results.add_show(parser)
    args = parser.parse_args()
    if results.shown(args, table):
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=jit_program"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # before JAX starts
        import jax

        device = topology()
        how = {"precision": args.precision, "lowering": args.conv, "length": args.length}
        cases = [compiled(case, device, **how) for case in args.cases.split(",")]
    result = results.header() | {"jax": jax.__version__, **how, "cases": cases}
    results.write(args.out, result)
    print(table(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
