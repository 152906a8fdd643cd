"""Rows together with what their density depends on: some numbers, or a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.data.dataset import Conditioned, DataError, column_at

__all__ = ["Columns", "class_numbers", "find_columns", "take_context"]

#: Most classes; a column of more different numbers is no column of classes.
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are contexts, by name or number: numbers, or one with classes.

    Args:
        names: of the columns, or their numbers from 1 on, as text.
        classes: whether it is one column of whole numbers that are classes.

    Example:
        >>> from pyflowkern.data import Columns
        >>> Columns.parse("age, 3", "").names
        ['age', '3']
    """

    names: list[str]
    classes: bool

    @classmethod
    def parse(cls, context: str, label: str) -> Columns | None:
        """Return what a run's options ask for, None for no context; at most one of them may be given."""
        given = label or context
        return cls([name.strip() for name in given.split(",")], bool(label)) if given else None


def find_columns(name: str, header: Sequence[str], width: int, wanted: Sequence[str]) -> list[int]:
    """Return the places of columns, which are given by their names or by their numbers from 1 on.

    Args:
        name: of the file, for errors.
        header: names of the columns, or none.
        width: how many columns there are.
        wanted: the columns.

    Raises:
        DataError: for a column that is not there or given twice, and where no other is left.

    Example:
        >>> from pyflowkern.data import find_columns
        >>> find_columns("t.csv", ["age", "dose", "size"], 3, ["size", "1"])
        [2, 0]
    """
    places = []
    for column in wanted:
        if column in header:
            places.append(list(header).index(column))
        elif column.isdecimal() and 1 <= int(column) <= width:
            places.append(int(column) - 1)
        else:
            known = ", ".join(header) if header else f"1 to {width}"
            raise DataError(f"{name}: has no column {column!r}; its columns are {known}")
    if len(set(places)) < len(places):
        raise DataError(f"{name}: a column is given twice as a context ({', '.join(wanted)})")
    if len(places) == width:
        raise DataError(f"{name}: all its columns are contexts, none is left to model")
    return places


def take_context(
    name: str, rows: Tensor, header: list[str], wanted: Columns, classes: list[int] | None = None
) -> tuple[Conditioned, list[int], list[int]]:
    """Split the columns of a table into those of the data and the context.

    Args:
        name: of the file, for errors.
        rows: ``[N, columns]``.
        header: names of the columns, or none.
        wanted: the columns of the context.
        classes: the classes that are known already; else those of the column.

    Returns:
        The rows with their context, the places of the context's columns, and the classes, none for numbers.

    Raises:
        DataError: for images, columns that are not there, and classes that are no whole numbers or not known.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Columns, take_context
        >>> table = torch.tensor([[0.5, 3.0], [0.7, 4.0]])
        >>> rows, places, classes = take_context("t.csv", table, ["a", "kind"], Columns(["kind"], True))
        >>> tuple(rows.shape), rows.context.tolist(), places, classes
        ((2, 1), [0, 1], [1], [3, 4])
    """
    if rows.dim() != 2:
        raise DataError(f"{name}: holds images, which have no columns for a context")
    places = find_columns(name, header, rows.shape[1], wanted.names)
    rest = [i for i in range(rows.shape[1]) if i not in places]
    context, known = rows[:, places], list[int]()
    if wanted.classes:
        where = f"{name}, {column_at(places[0], header)}"
        context, known = class_numbers(where, context[:, 0], classes)
    return Conditioned(rows[:, rest].contiguous(), context), places, known


def class_numbers(
    name: str, values: Tensor, classes: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Return the class of each value, counted from 0, and the values that the classes have, in order.

    Raises:
        DataError: for values that are not whole, too many of them or one alone, and for one that is not a known class.
    """
    whole = values.long()
    if not torch.equal(whole.to(values.dtype), values):
        bad = float(values[whole.to(values.dtype) != values][0])
        raise DataError(f"{name}: holds {bad:g}, but classes are whole numbers")
    found = whole.unique().tolist()
    if classes is None:
        if not 2 <= len(found) <= MOST_CLASSES:
            raise DataError(
                f"{name}: must hold from 2 to {MOST_CLASSES} different classes, got {len(found)}"
            )
        classes = found
    elif unknown := sorted(set(found) - set(classes)):
        raise DataError(f"{name}: holds the class {unknown[0]}, which the flow was not trained on")
    return torch.searchsorted(torch.tensor(classes), whole), classes
