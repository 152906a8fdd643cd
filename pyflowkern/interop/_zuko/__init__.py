"""Lazy transforms of zuko as steps of a chain, and the objects that they return."""
