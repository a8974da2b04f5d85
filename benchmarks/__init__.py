"""Speed and accuracy against PyTorch. The only package, besides the tests, that imports torch."""
