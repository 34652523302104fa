"""Benchmarks: `python -m benchmarks --help`; how to write one is told in `benchmarks.harness`."""
