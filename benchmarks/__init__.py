"""Benchmarks, each one command, with the rival in the same process, JSON out: ``python -m benchmarks.sampler --help``."""
