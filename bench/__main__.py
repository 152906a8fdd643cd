"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import bench.models
import bench.ops
import pyflowkern
from bench import (
    _big,
    _busy,
    _environment,
    _gallery,
    _memory,
    _papers,
    _processes,
    _report,
)
from bench._case import Case
from bench._cuda_report import report
from bench._harness import Row, run_case
from bench._html import write_page
from bench._overview import draw_overview, headlines
from bench._plot import plot
from bench._scaling import plot_scaling
from bench._steps import measure
from bench._summary import summary
from bench._timing import Plan

ROOT = Path(__file__).parent
#: What takes a folder alone.
WHOLE: dict[str, Callable[[Path], object]] = {
    "busy": _busy.measure,
    "memory": _memory.measure,
    "papers": _papers.measure,
    "processes": _processes.measure,
}


def families() -> dict[str, str]:
    """Return the names of all families of ops and models, and their modules."""
    return {
        module.name: f"{package.__name__}.{module.name}"
        for package in (bench.ops, bench.models)
        for module in pkgutil.iter_modules(package.__path__)
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "family",
        choices=[
            *families(),
            "all",
            "summary",
            "pictures",
            "overview",
            "cuda-report",
            "steps",
            "big",
            "gallery",
            *WHOLE,
        ],
        help="summary: the tables of docs/performance.md; overview: README.md's picture and rows; "
        "pictures: those of all families again, from their results; "
        "cuda-report: registers, accesses and bytes of the kernels; "
        "steps: launches and graphs of training steps; "
        "busy: training steps beside a process that keeps a core busy; "
        "big: ten million rows, with the peak memory of each process; "
        "memory: memory, time and gradients of a training step of Glow by depth; "
        "papers: steps of the flows of the papers' table, and their hours; "
        "processes: one run by 1, 2 and 4 processes, and after one of them was killed; "
        "gallery: docs/gallery.md, after a run of the named examples",
    )
    parser.add_argument("names", nargs="*", help="of examples, for gallery")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no extra cases")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder; default bench/results/<device>, out/bench/<device> unless complete and quiet",
    )
    parser.add_argument(
        "--providers", nargs="+", default=[], help="these only: ours compile nflows ..."
    )
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--passes", nargs="+", default=[], help="these only: forward memory ...")
    parser.add_argument("--graphs", action="store_true", help="time CUDA graph replays")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="pyflowkern.keep_memory() first, which concerns all providers",
    )
    parser.add_argument(
        "--html",
        type=Path,
        help="write what was measured, or with summary all that is committed, as one page",
    )
    return parser.parse_args()


def run_family(
    family: str, cases: list[Case], plan: Plan, args: argparse.Namespace
) -> tuple[bool, list[Path]]:
    """Run, print and write the cases of one family.

    Returns whether all installed providers agreed with eager, and the files that were written.
    """
    facts = _environment.describe(plan.device) | {
        "keep_memory": "yes" if args.keep_memory else "no"
    }
    print(
        f"# {family}: "
        + ", ".join(f"{key} {value}" for key, value in facts.items() if value != "")
    )
    rows: list[Row] = []
    verdicts: list[str] = []
    for case in cases:
        begin = time.monotonic()
        found = run_case(case, plan)
        rows += found
        lines = [line for line, _ in _report.check_targets(case, found)]
        verdicts += [f"{case.name}: {line}" for line in lines]
        print("\n" + _report.table(found))
        print("\n".join([*lines, f"({time.monotonic() - begin:.0f} s)"]), flush=True)
    folder = _folder(args, _environment.slug(facts, plan.device), any(row.noisy for row in rows))
    written = _report.write(folder, family, _report.records(family, rows, facts))
    written += draw(folder, family, rows, facts)
    print("\n" + "\n".join([*verdicts, *(f"wrote {path}" for path in written)]))
    good = all(row.status == "ok" or row.status.startswith("not installed") for row in rows)
    return good, written


def draw(folder: Path, family: str, rows: list[Row], facts: Mapping[str, Any]) -> list[Path]:
    """Draw the results of one family, and return the pictures."""
    title = f"{family} on {facts['device']}, {facts['threads']} threads"
    pictures = {folder / f"{family}.png": plot, folder / f"{family}_scaling.png": plot_scaling}
    return [path for path, drawn in pictures.items() if drawn(path, title, rows)]


def _folder(args: argparse.Namespace, device: str, noisy: bool) -> Path:
    """Return where results go: a quick, partial or noisy run never replaces a good one."""
    if args.out is not None:
        return Path(args.out)
    partial = args.quick or args.case or args.passes or args.providers or args.graphs
    return (ROOT.parent / "out" / "bench" if partial or noisy else ROOT / "results") / device


def _results(device: torch.device) -> Path | None:
    """Return the folder of committed results: of this processor, or of a GPU, even if this machine has none."""
    if device.type == "cuda":
        return next(iter(sorted((ROOT / "results").glob("cuda-*"))), None)
    return ROOT / "results" / _environment.slug(_environment.describe(device), device)


def run_families(args: argparse.Namespace, device: torch.device) -> int:
    """Measure the chosen family, or all; return the exit status."""
    plan = Plan(
        device=device,
        cache_bytes=_environment.cache_bytes(device),
        rounds=15 if args.quick else 60,
        seconds=1.0 if args.quick else 5.0,
        providers=args.providers,
        passes=args.passes,
        graphs=args.graphs,
    )
    good = True
    files: list[Path] = []
    for family, module in families().items():
        if args.family in (family, "all"):
            cases = importlib.import_module(module).CASES
            chosen = [
                c
                for c in cases
                if args.case in c.name
                and args.device in c.devices
                and not (args.quick and c.extra)
            ]
            if chosen:
                agreed, written = run_family(family, chosen, plan, args)
                good = good and agreed
                files += written
                if args.html is not None:  # after each family: a run of hours may be interrupted
                    write_page(args.html, files)
    if not files:
        print("no case was chosen (--quick leaves out the extra ones)")
    return 0 if good and files else 1


def main() -> int:
    args = arguments()
    if args.html is not None and args.family not in (*families(), "all", "summary"):
        raise SystemExit("--html belongs to a family, all or summary")
    torch.set_num_threads(args.threads)
    if args.keep_memory and not pyflowkern.keep_memory():
        raise SystemExit("--keep-memory needs glibc's allocator")
    device = torch.device(args.device)
    if args.family == "summary":
        folder = args.out or _results(device)
        print(summary(folder))
        if args.html is not None and folder is not None:
            write_page(args.html, [*folder.glob("*.json"), *folder.glob("*.md")])
        return 0
    if args.family == "pictures":
        folder = args.out or _results(device)
        for family in families():
            if (folder / f"{family}.json").is_file():
                draw(folder, family, *_report.read(folder / f"{family}.json"))
        return 0
    if args.family == "overview":
        folder = args.out or _results(device)
        draw_overview(folder, folder / "overview.png")
        print(headlines(folder))
        return 0
    if args.family == "steps":
        measure(device, args.out)
        return 0
    if args.family in WHOLE:
        folder = ROOT / "results" / _environment.slug(_environment.describe(device), device)
        WHOLE[args.family](args.out or folder)
        return 0
    if args.family == "big":
        folder = _folder(args, _environment.slug(_environment.describe(device), device), False)
        _big.measure(folder, args.threads, 10**6 if args.quick else 10**7)
        return 0
    if args.family == "cuda-report":
        print(report())
        return 0
    if args.family == "gallery":
        _gallery.write(args.names)
        return 0
    return run_families(args, device)


if __name__ == "__main__":
    raise SystemExit(main())
