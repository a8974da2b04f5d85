"""Array functions that the networks and steps are computed with: convolutions and pooling in the
form that is fast on each backend, and sums over devices.
"""
