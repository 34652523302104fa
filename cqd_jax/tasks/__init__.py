"""Tasks: what a model is judged by."""
