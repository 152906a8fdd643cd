"""Whole runs of packages that use flows, by their own unchanged code, with and without ``accelerate()``."""
