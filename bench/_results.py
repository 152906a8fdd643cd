"""Results that are kept one by one, and what makes one worth keeping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench._environment import usable_cores

__all__ = ["read", "too_busy", "write"]


def too_busy(neighbours: float, threads: int) -> bool:
    """Whether other processes left too few cores for our threads, and say so: such a result replaces no other."""
    if not neighbours > usable_cores() - threads + 0.2:
        return False
    print(
        f"NOISY: other processes kept {neighbours} cores busy; not kept, measure again.",
        flush=True,
    )
    return True


def read(path: Path) -> dict[str, Any]:
    """Return what was kept in a file; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def write(path: Path, kept: Mapping[str, Any], lines: list[str]) -> None:
    """Write results, and beside them a table of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, default=str) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
