"""Where the results of these scripts lie, and the table that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench import _environment

__all__ = ["RESULTS", "read", "table", "write"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "faults"


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result with the facts about the machine, and the table of all results anew."""
    facts = _environment.describe(torch.device("cpu"))
    kept = {key: facts[key] for key in ("torch", "pyflowkern", "commit", "date", "machine")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**result, **kept}, indent=1) + "\n")
    (folder / "table.md").write_text(table(folder))
    return path


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the results of a folder by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def table(folder: Path = RESULTS) -> str:
    """Return the results as rows: what was tried, how much of it, what was found, the command."""
    lines = ["| what was tried | how much | found | command |", "|---|---|---|---|"]
    lines += [
        f"| {r['tried']} | {r['amount']} | {r['found']} | `{r['command']}` |"
        for r in read(folder).values()
    ]
    return "\n".join(lines) + "\n"
