"""``python -m bench cuda-report``: what can be said about the CUDA kernels without a GPU."""

from __future__ import annotations

from bench import _kernels, _traffic

__all__ = ["report"]


def report() -> str:
    """Return the tables of the kernels' resources and of the bytes that they move."""
    found = _kernels.kernels()
    nothing = "no build with nvcc to report on: run `make build` where nvcc is installed"
    resources = _kernels.table(found) if found else nothing
    lines = [
        "## Resources, and global memory accesses of the innermost loops (of all paths: packs and single elements)",
        "",
        resources,
        "",
        "## Data moved, counted on the host (each 32-byte sector once per block), over the least possible",
        "",
        "| call | dtype | moved / floor | accesses below 8 bytes |",
        "|---|---|---|---|",
    ]
    for t in _traffic.measure():
        cells = [t.name, str(t.dtype).removeprefix("torch."), f"{t.moved / t.floor:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{t.scalar_share:.1%}'])} |")
    return "\n".join(lines)
