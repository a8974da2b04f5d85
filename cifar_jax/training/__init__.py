"""One run from its recipe to its summary: set-up, loop, checks, evaluation, and its directory."""
