"""CIFAR-10 training in pure-functional JAX, for people who know the PyTorch tutorial."""

__version__ = "0.1.0"
