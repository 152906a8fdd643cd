"""Run each client twice, without and with ``accelerate()``, each in a process of its own, and write a table.

``python -m bench.clients`` runs all, ``python -m bench.clients sbi`` those whose name begins so; packages that are not
installed are left out and named.  Results go to ``bench/results/<device>/clients.json`` and ``clients.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import _environment
from bench._results import read, too_busy, write
from bench._timing import Neighbours
from bench.clients import lampe, nessai, sbi, tutorials

Client = Callable[[], dict[str, Any]]
CLIENTS: dict[str, Client] = {
    **{
        f"sbi {estimator}, {simulator}, {count:,} simulations": partial(
            sbi.run, estimator, simulator, count
        )
        for count in (2000, 20000)
        for simulator in ("two_moons", "slcp")
        for estimator in ("maf", "nsf", "zuko_nsf", "maf_rqs")
        if count == 2000 or (simulator == "slcp" and estimator in ("maf", "nsf"))
    },
    "lampe MAF, two_moons": partial(lampe.run, "MAF", "two_moons", 8192, 20),
    "lampe NSF, slcp": partial(lampe.run, "NSF", "slcp", 8192, 20),
    "zuko MAF, two moons": partial(tutorials.zuko, "MAF"),
    "zuko NSF, two moons": partial(tutorials.zuko, "NSF"),
    "normflows NSF (AR), two moons": tutorials.normflows_nsf,
    "normflows Glow, 3x32x32": tutorials.normflows_glow,
    "FrEIA AllInOne, conditional": tutorials.freia,
    "nessai, mixture D=2": partial(nessai.run, 2),
    "nessai, mixture D=10": partial(nessai.run, 10),
}
_MARK = "result: "


def run_here(name: str, accelerated: bool, threads: int) -> None:
    """Run one client in this process and print what it found."""
    torch.set_num_threads(threads)
    if accelerated:
        import pyflowkern

        pyflowkern.accelerate()
    print(_MARK + json.dumps(CLIENTS[name]()))


def run_apart(name: str, accelerated: bool, threads: int) -> dict[str, Any]:
    """Run one client in a process of its own."""
    words = [sys.executable, "-m", "bench.clients", "--here", name, "--threads", str(threads)]
    before = Neighbours()
    done = subprocess.run(
        words + ["--accelerated"] * accelerated, capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            found: dict[str, Any] = json.loads(line[len(_MARK) :])
            return found | {"neighbours": before.cores()}
    return {"failed": done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]}


def rows(name: str, plain: dict[str, Any], fast: dict[str, Any]) -> list[str]:
    """Return the lines of a table: times, their ratio, and what both came to."""
    if "failed" in plain or "failed" in fast:
        return [f"| {name} | failed | {plain.get('failed', '')} | {fast.get('failed', '')} | |"]
    lines = []
    for key, before in plain.items():
        after = fast[key]
        if key == "neighbours":
            continue
        if key.endswith("(s)"):
            lines.append(
                f"| {name} | {key} | {before:.3g} | {after:.3g} | {before / after:.2f}x |"
            )
        elif isinstance(before, list):
            gap = max((abs(a - b) for a, b in zip(before, after, strict=False)), default=0.0)
            ends = f"{before[-1]:.4g} | {after[-1]:.4g}"
            lines.append(
                f"| {name} | {key}, last of {len(before)} | {ends} | differ by {gap:.2g} at most |"
            )
        else:
            lines.append(f"| {name} | {key} | {before:.4g} | {after:.4g} | |")
    return lines


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only clients whose name begins so")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--accelerated", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        run_here(args.name, args.accelerated, args.threads)
        return
    device = torch.device("cpu")
    facts = _environment.describe(device) | {"threads": args.threads}
    folder = args.out or Path(__file__).parents[1] / "results" / _environment.slug(facts, device)
    path = folder / "clients.json"
    kept = read(path)
    for name in CLIENTS:
        if name.startswith(args.name):
            pair = [run_apart(name, accelerated, args.threads) for accelerated in (False, True)]
            print("\n".join(rows(name, *pair)), flush=True)
            busy = max(each.get("neighbours", 0.0) for each in pair)
            if not too_busy(busy, args.threads):
                kept[name] = {"library": pair[0], "accelerated": pair[1], "facts": facts}
    head = ["| client | what | library | accelerated | |", "|---|---|---|---|---|"]
    lines = [
        line
        for name, each in kept.items()
        for line in rows(name, each["library"], each["accelerated"])
    ]
    write(path, kept, [*head, *lines])


if __name__ == "__main__":
    main()
