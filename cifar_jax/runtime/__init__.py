"""What every part stands on and knows nothing of training: errors, files, downloads, time, and
the machine.
"""
