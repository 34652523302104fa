"""What a run shows: the HTML page and its figures, drawn from a run's record."""
