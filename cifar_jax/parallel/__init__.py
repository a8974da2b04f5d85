"""From pure steps to programs on devices: which devices, where arrays lie on them, jit and
shardings, and several processes as one.
"""
