"""For programs of few calls on small arrays: they take longer to optimise than to run."""

import functools

import jax

UNOPTIMISED = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=UNOPTIMISED)
