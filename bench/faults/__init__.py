"""Faults on purpose: fuzzing under sanitizers, kills, a soak. docs/reliability.md shows what was found."""
