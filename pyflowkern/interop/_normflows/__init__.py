"""Flows of normflows as steps of a chain; its spline functions."""
