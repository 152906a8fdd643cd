"""Flows of nflows, and of copies of it, as steps of a chain; its spline functions."""
