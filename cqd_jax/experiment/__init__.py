"""Experiments from settings to results: models, evolution, comparison, the table on the test split."""
