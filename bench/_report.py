"""Results as tables for the terminal, and as CSV and JSON files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench._case import Case
from bench._harness import Row

__all__ = ["COLUMNS", "check_targets", "read", "records", "table", "write"]

#: The columns of a CSV; the facts of the machine (``_environment.describe``) follow.
COLUMNS = (
    *("family", "case", "provider", "pass", "metric", "p20", "p50", "p80", "ratio_to_floor"),
    *(
        "speedup_vs_eager",
        "speedup_vs_compile",
        "time_vs_ours",
        "neighbours",
        "noisy",
        "kernel",
        "status",
        "dtype",
    ),
)


def records(
    family: str, rows: Iterable[Row], facts: Mapping[str, str | int]
) -> list[dict[str, str | int | float | None]]:
    """Return one flat record for each row, as it is written; None where nothing was measured."""
    found = []
    for row in rows:
        record = {"family": family, **asdict(row)}
        record["pass"] = record.pop("pass_")
        record = {key: _rounded(record[key]) for key in COLUMNS}
        found.append(record | dict(facts))
    return found


def write(
    folder: Path, family: str, found: Sequence[Mapping[str, str | int | float | None]]
) -> list[Path]:
    """Write ``<family>.csv`` and ``<family>.json`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{family}.csv", folder / f"{family}.json"]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    paths[1].write_text(json.dumps(list(found), indent=1) + "\n")
    return paths


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of a ``<family>.json``, and the facts of the machine that all share."""
    found = json.loads(path.read_text())
    names = {field.name for field in fields(Row)}
    rows = []
    for record in found:
        record["pass_"] = record.pop("pass")
        measured = {key: math.nan if record[key] is None else record[key] for key in names}
        rows.append(Row(**measured))
    return rows, {key: value for key, value in found[0].items() if key not in names}


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one case as a markdown table."""
    lines = [
        f"### {rows[0].case} ({rows[0].dtype})",
        "",
        "| pass | provider | p20 | p50 | p80 | x floor | vs eager | vs compile | time / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        who = "ours (reference)" if row.kernel == "no" else row.provider
        head = f"| {row.pass_} ({row.metric}) | {who} |"
        if row.status == "ok":
            numbers = [row.p20, row.p50, row.p80, row.ratio_to_floor]
            numbers += [row.speedup_vs_eager, row.speedup_vs_compile, row.time_vs_ours]
            lines.append(head + " | ".join(["", *map(_short, numbers)]).removeprefix(" |") + " |")
        else:
            lines.append(head + f" {row.status} | | | | | | |")
    if busy := [row.neighbours for row in rows if row.noisy]:
        lines += [
            "",
            f"NOISY: other processes kept up to {max(busy):.1f} cores busy; measure again.",
        ]
    return "\n".join(lines) + "\n"


def check_targets(case: Case, rows: Sequence[Row]) -> list[tuple[str, bool | None]]:
    """Return a line for each target and whether it was met, None where it was not measured on a quiet machine."""
    ours = {row.pass_: row for row in rows if row.provider == "ours"}
    found: list[tuple[str, bool | None]] = []
    for target, wanted in case.targets.items():
        pass_, _, other = target.partition(" vs ")
        row = ours.get(pass_)
        upper = other == "floor"
        got = math.nan
        if row is not None:
            known = {
                "floor": row.ratio_to_floor,
                "eager": row.speedup_vs_eager,
                "compile": row.speedup_vs_compile,
            }
            peers = {r.provider: r.time_vs_ours for r in rows if r.pass_ == pass_}
            got = (peers | known).get(other, math.nan)  # a peer may be absent, or not asked for
        met = None if math.isnan(got) else (got <= wanted if upper else got >= wanted)
        if row is not None and row.noisy:
            met = None
        verdict = {True: "met", False: "MISSED", None: "not measured on a quiet machine"}[met]
        found.append(
            (f"target {target} {'<=' if upper else '>='} {wanted:g}: {_short(got)} {verdict}", met)
        )
    return found


def _rounded(value: str | int | float) -> str | int | float | None:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""
