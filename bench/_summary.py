"""The table of README.md, from committed results and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["summary"]

#: What the table shows: the results' file, the case's first words and the pass.
HEADLINES = (
    ("affine", "coupling 64x24x32x32", "forward"),
    ("affine", "coupling 64x24x32x32", "forward+backward"),
    ("affine", "coupling 64x10", "forward+backward"),
    ("actnorm", "actnorm 64x48x16x16", "forward"),
    ("actnorm", "actnorm 64x48x16x16", "forward+backward"),
    ("linear", "glow step 64x48x16x16", "forward"),
    ("linear", "glow step 64x48x16x16", "forward+backward"),
    ("linear", "glow step 64x12x32x32", "forward+backward"),
    ("linear", "linear 4096x32", "forward+backward"),
    ("matrix", "slogdet_inverse 1x48", "forward"),
    ("matrix", "plu_matrix 48", "forward+backward"),
    ("preprocess", "dequantize+logit 512x3x32x32", "forward"),
    ("preprocess", "logit 512x3x32x32", "forward+backward"),
    ("density", "standard 512x3x32x32", "forward+backward"),
    ("density", "conditional 512x3x32x32", "forward+backward"),
    ("glow", "training step", "call"),
    ("glow", "log_prob", "call"),
    ("glow", "sample", "call"),
)
LARGE = 20.0  # above that many floors a call is what costs, and the ratio says nothing


def summary(folder: Path | None) -> str:
    """Return the headline rows of one device's results as a markdown table."""
    if folder is None:
        return "Not measured yet."
    lines = [
        "| case | pass | ms | vs eager | vs compile | time / floor |",
        "|---|---|---|---|---|---|",
    ]
    where: dict[str, None] = {}
    for family, case, pass_ in HEADLINES:
        row = _row(folder / f"{family}.csv", case, pass_)
        where[f"{row['device']}, {row['threads']} threads, torch {row['torch']}"] = None
        name = row["case"] if row["case"].startswith(family) else f"{family}: {row['case']}"
        floor = row["ratio_to_floor"]
        cells = [name, row["pass"], _milliseconds(float(row["p50"]))]
        cells += [f"{_short(row[key])}x" if row[key] else "" for key in _SPEEDUPS]
        cells += [_short(floor) if floor and float(floor) < LARGE else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{'; '.join(where)}; float32."])


_SPEEDUPS = ("speedup_vs_eager", "speedup_vs_compile")


def _row(path: Path, case: str, pass_: str) -> dict[str, str]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["provider"] == "ours" and row["pass"] == pass_ and row["case"].startswith(case):
                return row
    raise ValueError(f"{path} has no row for the {pass_} of {case!r}")


def _milliseconds(p50: float) -> str:
    return f"{p50:.0f}" if p50 >= 10 else f"{p50:.2g}"


def _short(number: str) -> str:
    return f"{float(number):.1f}"
