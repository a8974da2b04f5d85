"""What a run shows and writes: rows of metrics, lines of text, the progress bar, pictures."""
