"""What flows on vectors keep for their backward pass: layers called one by one, one op, and layers that keep nothing.

The numbers are those of autograd, the same at each run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import _environment
from bench._results import write
from pyflowkern import flows

__all__ = ["measure", "table"]

ROWS, DIMS, TRANSFORMS = 1000, 10, 16
FLOWS: dict[str, tuple[type[flows.Flow], int]] = {
    "NSF(10, hidden=(128, 128))": (flows.NSF, 128),
    "NSF(10, hidden=(256, 256))": (flows.NSF, 256),
    "MAF(10, hidden=(512, 512))": (flows.MAF, 512),
}


def kept_mib(kind: type[flows.Flow], width: int, memory: str, *, by_layers: bool = False) -> float:
    """Return the MiB that autograd holds between forward and backward, parameters aside."""
    from bench._memory import kept_for_backward

    torch.manual_seed(0)
    make: Any = kind
    flow = make(DIMS, transforms=TRANSFORMS, hidden=(width, width), memory=memory)
    if by_layers:  # a hook wants its layer called
        for layer in flow.bijection:
            layer.register_forward_hook(lambda *_: None)
    return round(kept_for_backward(flow, torch.randn(ROWS, DIMS)), 2)


def measure(out: Path) -> list[dict[str, Any]]:
    """Write ``memory_vectors.json`` and ``memory_vectors.md``."""
    rows = [
        {
            "flow": name,
            "layers_mib": kept_mib(*of, "stored", by_layers=True),
            "stored_mib": kept_mib(*of, "stored"),
            "reversible_mib": kept_mib(*of, "reversible"),
        }
        for name, of in FLOWS.items()
    ]
    facts = _environment.describe(torch.device("cpu"))
    write(out / "memory_vectors.json", {"rows": rows} | facts, table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a row for each flow."""
    names = ("layers one by one", '`"stored"`', '`"reversible"`')
    lines = [f"| flow, {TRANSFORMS} transforms | {' | '.join(f'{n} (MiB)' for n in names)} |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        kept = (f"{row[f'{way}_mib']:.3g}" for way in ("layers", "stored", "reversible"))
        lines.append(f"| `{row['flow']}` | {' | '.join(kept)} |")
    return lines
