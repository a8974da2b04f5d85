"""Many runs as one program: seeds and sweeps, trained together, and what they say together."""
