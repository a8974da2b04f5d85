"""`python -m experiments.sweep`: the command `cifar-jax sweep`, where it used to be."""

import sys

from cifar_jax.runtime.errors import run_command
from cifar_jax.sweep import main

if __name__ == "__main__":
    sys.exit(run_command(main))
