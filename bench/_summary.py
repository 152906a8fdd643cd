"""The tables of docs/performance.md, from the committed results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

__all__ = ["find_row", "milliseconds", "summary"]

#: Rows of the first table: results' file, start of the case's name, and pass.
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
    ("relu_network", "residual 200 x", "forward+backward"),
    ("relu_network", "residual 512 x", "forward+backward"),
    ("conv_network", "plain 32 x 16x16", "forward+backward"),
    ("conv_network", "plain 32 x 8x8", "forward+backward"),
    ("matrix", "slogdet_inverse 1x48", "forward"),
    ("matrix", "plu_matrix 48", "forward+backward"),
    ("preprocess", "dequantize+logit 512x3x32x32", "forward"),
    ("preprocess", "logit 512x3x32x32", "forward+backward"),
    ("density", "standard 512x3x32x32", "forward+backward"),
    ("density", "conditional 512x3x32x32", "forward+backward"),
    ("spline", "rq 4096x32 K=8", "forward"),
    ("spline", "rq 4096x32 K=8", "forward+backward"),
    ("spline", "rq 4096x32 K=8", "inverse"),
    ("field", "field 1000x6 60x3", "forward+backward"),
    ("field", "exact 1000x6 64x2", "forward+backward"),
    ("transport", "1000 x 1000, d=2", "forward"),
    ("transport", "1000 x 1000, d=64", "forward"),
    ("transport", "512 problems", "forward"),
    ("glow", "training step", "call"),
    ("glow", "log_prob", "call"),
    ("glow", "sample", "call"),
)
#: Rows of the second table, with the providers that are compared.
PEERS = (
    ("spline", "rq 4096x32 K=8", "forward", ("nflows", "zuko", "zuko compile")),
    ("spline", "rq 4096x32 K=8", "forward+backward", ("nflows", "zuko", "zuko compile")),
    ("autoregressive", "MAF D=43 5 x (512, 512)", "call", ("zuko",)),
    ("autoregressive", "NSF D=43 5 x (256, 256)", "call", ("zuko",)),
    ("nsf", "training step D=6 batch 200", "call", ("nflows",)),
    ("nsf", "training step D=10 batch 1000", "call", ("nflows",)),
    ("nsf", "training step D=20 batch 4096", "call", ("nflows",)),
    ("nsf", "training step D=6 batch 512", "call", ("nflows",)),
    ("small_flows", "step without optimizer MAF D=6", "call", ("zuko", "nflows")),
    ("small_flows", "step MAF D=6", "call", ("zuko", "nflows")),
    ("small_flows", "step without optimizer NSF D=6", "call", ("zuko", "nflows")),
    ("small_flows", "step NSF D=6", "call", ("zuko", "nflows")),
    ("small_flows", "step without optimizer RealNVP", "call", ("zuko",)),
    ("small_flows", "step RealNVP", "call", ("zuko",)),
    ("small_flows", "step without optimizer NSF (AR)", "call", ("zuko",)),
    ("small_flows", "step without optimizer MAF D=43", "call", ("zuko",)),
    ("small_flows", "log_prob MAF D=43", "call", ("zuko",)),
    ("small_flows", "log_prob MAF D=6 5 x (50, 50), batch 1", "call", ("zuko",)),
    ("small_flows", "log_prob NSF D=6 5 x (50, 50), batch 1", "call", ("zuko",)),
    ("ffjord", "training step D=6", "call", ("eager", "checkpointed")),
    ("transport", "1000 x 1000, d=2", "forward", ("POT", "POT on tensors")),
    ("flow_matching", "step without transport d=2 ", "call", ("torchcfm", "torchcfm compiled")),
    ("flow_matching", "step without transport d=50 ", "call", ("torchcfm", "torchcfm compiled")),
    ("flow_matching", "training step d=2 ", "call", ("torchcfm", "independent")),
    ("flow_matching", "training step d=50 ", "call", ("torchcfm", "independent")),
    (
        "flow_matching",
        "plan of 16384 samples, d=2",
        "call",
        ("POT, 1 iterations", "POT lazy, 1 iterations"),
    ),
    ("ode", "dopri5 2-64x3-2", "call", ("eager", "our solver")),
    ("ode", "dopri5 of 1000000", "call", ("eager",)),
)
#: Families whose "eager" is another library, and providers whose names need an explanation.
EAGER = {"ffjord": "torchdiffeq", "ode": "torchdiffeq"}
EXPLAINED = {
    "our solver": "our solver with torch's layers",
    "checkpointed": "ours, checkpointed",
    "independent": "ours without transport",
}
LARGE = 20.0  # ratios to the floor above this say nothing: most of the time is the overhead of the call


def summary(folder: Path | None) -> str:
    """Return the headline rows of one device's results as a markdown table."""
    if folder is None:
        return "Not measured yet."
    lines = [
        "| case | pass | ms | vs eager | vs compile | time / floor | SIMD |",
        "|---|---|---|---|---|---|---|",
    ]
    where: dict[str, None] = {}
    for family, case, pass_ in HEADLINES:
        row = find_row(folder / f"{family}.csv", case, pass_)
        where[f"{row['device']}, {row['threads']} threads, torch {row['torch']}"] = None
        name = row["case"] if row["case"].startswith(family) else f"{family}: {row['case']}"
        floor = row["ratio_to_floor"]
        cells = [name, row["pass"], milliseconds(float(row["p50"]))]
        cells += [f"{_short(row[key])}x" if row[key] else "" for key in _SPEEDUPS]
        cells += [_short(floor) if floor and float(floor) < LARGE else "", row["simd"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| case | pass | ms | other libraries take | SIMD |", "|---|---|---|---|---|"]
    for family, case, pass_, peers in PEERS:
        path = folder / f"{family}.csv"
        row = find_row(path, case, pass_)
        times = [
            f"{float(find_row(path, case, pass_, peer)['time_vs_ours']):.1f}x ({_named(family, peer)})"
            for peer in peers
        ]
        name = f"sampling {row['case']}" if family == "autoregressive" else row["case"]
        name = f"{family}: {name}" if family in (*EAGER, "flow_matching") else name
        cells = [name, row["pass"], milliseconds(float(row["p50"])), ", ".join(times), row["simd"]]
        lines.append(f"| {' | '.join(cells)} |")
    if (path := folder / "busy.json").is_file():
        lines += ["", *_beside_a_busy_process(json.loads(path.read_text()))]
    return "\n".join([*lines, "", f"{'; '.join(where)}; float32."])


def _beside_a_busy_process(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of ``python -m bench busy`` as a table: a row for each model, ours first."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    found = {(row["model"], row["provider"]): row for row in rows}
    lines = [
        f"| whole step, alone / beside a busy process, ms | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for model in models:
        cells = [
            f"{milliseconds(row['alone_ms'])} / {milliseconds(row['busy_ms'])} ({row['ratio']:.1f}x)"
            for row in (found[model, name] for name in names)
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


_SPEEDUPS = ("speedup_vs_eager", "speedup_vs_compile")


def find_row(path: Path, case: str, pass_: str, provider: str = "ours") -> dict[str, str]:
    """Return the first row of a results' file whose case starts with ``case``, of a pass and a provider."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found = row["provider"] == provider and row["pass"] == pass_
            if found and row["case"].startswith(case):
                return row
    raise ValueError(f"{path} has no row for the {pass_} of {case!r} by {provider}")


def _named(family: str, peer: str) -> str:
    return EAGER.get(family, peer) if peer == "eager" else EXPLAINED.get(peer, peer)


def milliseconds(p50: float) -> str:
    """Return a time as text, with at least two digits."""
    return f"{p50:.0f}" if p50 >= 10 else f"{p50:.2g}"


def _short(number: str) -> str:
    return f"{float(number):.1f}"
