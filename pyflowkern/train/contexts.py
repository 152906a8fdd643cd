"""Contexts and labels that a trained flow is given: on the command line, or in a file of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyflowkern.data import (
    Columns,
    Condition,
    Conditioned,
    DataError,
    find_columns,
    read,
    take_context,
)
from pyflowkern.train.checkpoint import Trained
from pyflowkern.train.config import ConfigError

__all__ = ["ContextOf", "contexts_of", "with_context"]

#: Gives the contexts of the samples from one number to before another, as :meth:`DataFlow.sample` takes them.
ContextOf = Callable[[int, int], Tensor | None]


def contexts_of(trained: Trained, context: str | None, label: int | None) -> ContextOf:
    """Return what gives the contexts of samples.

    Raises:
        ConfigError: one line, for a context that the flow does not take or that is missing.
        DataError: one line, for a file of contexts that cannot be used.
    """
    stored = trained.facts.get("condition")
    condition = Condition(**stored) if stored else None
    if condition is None or not condition.classes:
        if label is not None:
            raise ConfigError("label is for runs with labels, this one has none")
        return _numbers(trained, condition, context)
    if context is not None:
        raise ConfigError("context is for runs with context columns; this one has labels")
    if label is None:
        classes = len(condition.classes)
        return lambda begin, end: torch.arange(begin, end) % classes
    if label not in condition.classes:
        known = ", ".join(map(str, condition.classes))
        raise ConfigError(f"label must be one of {known}, got {label}")
    number = condition.classes.index(label)
    return lambda begin, end: torch.full((end - begin,), number)


def _numbers(trained: Trained, condition: Condition | None, given: str | None) -> ContextOf:
    if condition is None:
        if given is not None:
            raise ConfigError("context is for runs with context columns, this one has none")
        return lambda begin, end: None
    wanted = f"{len(condition.columns)} numbers ({', '.join(condition.columns)})"
    if given is None:
        if getattr(trained.model.flow, "context_dropout", 0):
            return lambda begin, end: None  # the flow knows what stands for no context
        raise ConfigError(f"context must be given: {wanted}, or a file of them")
    if Path(given).suffix.lower() in (".csv", ".npy", ".parquet"):
        rows = _of_file(given, condition)
        return lambda begin, end: rows[torch.arange(begin, end) % len(rows)]
    try:
        row = torch.tensor([float(number) for number in given.split(",")])
    except ValueError:
        raise ConfigError(f"context must be {wanted}, or a file of them, got {given!r}") from None
    if len(row) != len(condition.columns) or not all(map(math.isfinite, row.tolist())):
        raise ConfigError(f"context must be {wanted}, got {given!r}")
    return lambda begin, end: row.expand(end - begin, -1)


def _of_file(source: str, condition: Condition) -> Tensor:
    """Return the contexts of a file that has those columns alone, or the whole table."""
    rows, header = read(Path(source))
    width = len(condition.columns)
    if rows.dim() == 2 and rows.shape[1] == width and (not header or header == condition.columns):
        return rows
    if rows.dim() != 2:
        raise DataError(
            f"{source}: holds images, wants the context {', '.join(condition.columns)}"
        )
    return rows[:, find_columns(source, header, rows.shape[1], condition.columns)]


def with_context(trained: Trained, source: str, rows: Tensor, header: list[str]) -> Conditioned:
    """Return the rows of a file with the contexts that it holds in the columns of the run.

    Raises:
        DataError: one line, for a file without them, or with a class that the flow was not trained on.
    """
    config, condition = trained.config, Condition(**trained.facts["condition"])
    columns = Columns.parse(config.context_columns, config.label_column)
    if columns is None:
        raise DataError(f"{source}: has no labels, which the flow was trained with")
    if set(condition.columns) <= set(header):  # by name, also where a run has their numbers
        columns = replace(columns, names=condition.columns)
    return take_context(source, rows, header, columns, condition.classes or None)[0]
