"""A run's state on disk: saved, verified by digests, and restored, on other devices too."""
