"""What a run keeps on disk: history, checkpoints, params, and the run directory itself."""
