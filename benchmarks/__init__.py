"""Benchmarks: `python -m benchmarks --help`; how to write one is in `benchmarks.harness`."""
