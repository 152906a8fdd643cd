"""What :func:`pyflowkern.accelerate` did with a model, and what it left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Entry", "Report"]

#: Letters of a note that stands below the table, once, where several modules have it.
_LONG = 30
_HEADS = ("module", "class", "what runs now", "gain", "why, or what to know")


@dataclass(frozen=True)
class Entry:
    """One module that was recognised.

    Args:
        name: where it is in the model, as ``named_modules`` says; empty for the model itself.
        kind: its library and class.
        runs: what runs now: ``"one op"`` with its neighbours, ``"own op"``, or empty where it was left alone.
        gain: what to expect of that, from committed measurements; empty where nothing was measured.
        note: why it was left alone, under which condition it runs, or a known defect of the library.

    Example:
        >>> from pyflowkern.interop import Entry
        >>> Entry("transform", "nflows.LULinear", runs="one op").note
        ''
    """

    name: str
    kind: str
    runs: str = ""
    gain: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What was accelerated and what was left alone; as a text it is a table, with long notes that repeat below it.

    In a ``with`` statement, the end of the block undoes what was done.

    Args:
        entries: one for each module that was recognised.
        undo: what undoes it.

    Example:
        >>> from pyflowkern.interop import Entry, Report
        >>> linear = Entry("transform", "nflows.LULinear", runs="one op")
        >>> report = Report([linear, Entry("made", "mine.MADE", note="a subclass of nflows.MADE may do anything")])
        >>> len(report.accelerated), len(report.left)
        (1, 1)
    """

    entries: list[Entry] = field(default_factory=list)
    undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def accelerated(self) -> list[Entry]:
        """The modules that an op of this package runs now."""
        return [entry for entry in self.entries if entry.runs]

    @property
    def left(self) -> list[Entry]:
        """The modules that run as before."""
        return [entry for entry in self.entries if not entry.runs]

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self.undo is not None:
            self.undo()

    def __str__(self) -> str:
        times = Counter(entry.note for entry in self.entries)
        below = [note for note, count in times.items() if count > 1 and len(note) > _LONG]
        marks = {note: f"[{i}]" for i, note in enumerate(below, start=1)}
        rows = [_HEADS] + [
            (e.name or "(model)", e.kind, e.runs or "as before", e.gain, marks.get(e.note, e.note))
            for e in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *(f"{mark} {note}" for note, mark in marks.items())])
