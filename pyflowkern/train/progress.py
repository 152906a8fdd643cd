"""A bar on stderr for commands that read or write many rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress"]

#: Seconds before a bar appears, so that quick commands have none.
DELAY = 1.0


@contextmanager
def progress(
    what: str, total: int | None, shown: bool | None = None
) -> Iterator[Callable[[int], Any]]:
    """Give the block a function that is told of each part how many rows it had.

    Args:
        what: stands in front of the bar.
        total: how many rows there are; None where nobody knows.
        shown: whether there is a bar; None for one if stderr is a terminal, of the first process alone where several
            are started together.
    """
    from tqdm import tqdm

    given = shown is not None
    with tqdm(
        desc=what,
        total=total,
        unit=" rows",
        unit_scale=True,
        file=sys.stderr,
        disable=not (shown if given else sys.stderr.isatty() and _is_first()),
        delay=0.0 if given else DELAY,
        leave=given,
    ) as bar:
        yield bar.update


def _is_first() -> bool:
    """Whether this is the first of the processes that torchrun, Lightning or SLURM have started."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
