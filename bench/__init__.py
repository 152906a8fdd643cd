"""Benchmarks: ``python -m bench <family>`` from the root of a checkout."""
