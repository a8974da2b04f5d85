"""Weights from elsewhere and for elsewhere: PyTorch's names and files, published ones, and
starting from them.
"""
