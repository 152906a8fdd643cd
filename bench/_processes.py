"""``python -m bench processes``: one run by 1, 2 and 4 processes, and what is left of it when one of them is killed.

Each run is started by torchrun, with one thread a process and the same batch for all processes together.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import _environment

__all__ = ["measure"]

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4)
STEPS = 200
#: One process on rows that are moved by their last bit: what rounding alone does to the curve.
MOVED = "1, rows moved by their last bit"
ROWS, DIMS = 20_000, 8
#: Options of runs: rows, where nothing else is random, and pixels, whose noise each process draws for itself.
RUNS: dict[str, list[str]] = {
    "NSF, 8 columns, batch 1024": ["--data", "rows.npy", "--flow", "NSF", "--batch-size", "1024"],
    "Glow, 8x8 digits, batch 256": [
        *("--data", "digits", "--flow", "Glow", "--batch-size", "256"),
        *("--set", "hidden=64", "--set", "flow_args.steps=8", "--set", "levels=2"),
    ],
}


def _command(ranks: int, *words: object) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "-m", "pyflowkern", "train", *map(str, words)]


def _environment_of_runs() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _run(ranks: int, *words: object) -> None:
    command = _command(ranks, *words)
    done = subprocess.run(command, env=_environment_of_runs(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")


def _curve(out: str) -> dict[str, list[float]]:
    """Return the columns of a run's metrics."""
    with (Path(out) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _milliseconds(curve: dict[str, list[float]]) -> float:
    """Return the time of a step, with its share of the evaluations."""
    return (
        1e3 * (curve["seconds"][-1] - curve["seconds"][1]) / (curve["step"][-1] - curve["step"][1])
    )


def _difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Return the largest difference of training and held-out scores."""
    pairs = [*zip(one["train"], other["train"], strict=True)]
    pairs += zip(one["held_out"], other["held_out"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def _curves() -> Iterator[dict[str, Any]]:
    """Yield the curve and the step time of each run, by each number of processes."""
    for i, (name, options) in enumerate(RUNS.items()):
        alone: dict[str, list[float]] = {}
        for ranks in RANKS:
            out = f"{i}-{ranks}"
            _run(ranks, *options, "--steps", STEPS, "--set", f"every={STEPS // 5}", "--out", out)
            curve = _curve(out)
            alone = alone or curve
            yield _row(name, ranks, alone, curve)
        if "rows.npy" in options:
            moved = ["moved.npy" if word == "rows.npy" else word for word in options]
            _run(1, *moved, "--steps", STEPS, "--set", f"every={STEPS // 5}", "--out", "moved")
            yield _row(name, MOVED, alone, _curve("moved")) | {"step_ms": None}  # as above


def _row(
    name: str, ranks: int | str, alone: dict[str, list[float]], curve: dict[str, list[float]]
) -> dict[str, Any]:
    """Return what is kept of one run, beside that of one process."""
    return {
        "run": name,
        "processes": ranks,
        "step_ms": round(_milliseconds(curve), 2),
        "difference": _difference(alone, curve),
        "last": curve["held_out"][-1],
        "train": curve["train"],
        "held_out": curve["held_out"],
    }


def _check_runs(agent: subprocess.Popen[bytes]) -> None:
    """Stop where torchrun has ended before it should, which nobody is to wait for."""
    if agent.poll() is not None:
        raise SystemExit(f"a run to kill ended by itself: {Path('killed.log').read_text()}")


def _worker(agent: subprocess.Popen[bytes], rank: int) -> int:
    """Return the id of the process that torchrun has started as this rank, waiting for it."""
    while True:
        _check_runs(agent)
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1])  # type: ignore[index]
                if parent == agent.pid and f"\0RANK={rank}\0" in (path / "environ").read_text():
                    return int(path.name)
            except OSError:  # it has ended
                continue
        time.sleep(0.1)


def _recovery() -> Iterator[dict[str, Any]]:
    """Kill one of two processes half-way; yield how long the other took to end, and the curves of runs that go on."""
    name, options = next(iter(RUNS.items()))
    whole = _curve("0-2")
    every = STEPS // 5
    words = (*options, "--steps", STEPS, "--set", f"every={every}", "--out", "killed")
    with open("killed.log", "w+") as log:
        command = _command(2, *words)
        agent = subprocess.Popen(command, env=_environment_of_runs(), stdout=log, stderr=log)
        while f"step {2 * every:>6}/" not in Path("killed.log").read_text():
            _check_runs(agent)
            time.sleep(0.05)
        os.kill(_worker(agent, 1), signal.SIGKILL)
        begin = time.perf_counter()
        agent.wait()
        seconds = time.perf_counter() - begin
    said = re.findall(
        r"pyflowkern: another process of the run ended.*", Path("killed.log").read_text()
    )
    for ranks in RANKS:
        subprocess.run(["cp", "-r", "killed", f"resumed-{ranks}"], check=True)
        _run(ranks, "--resume", f"resumed-{ranks}")
        yield {
            "run": f"{name}: killed after {2 * every} of {STEPS} steps",
            "processes": f"2, then {ranks}",
            "ended_s": round(seconds, 1),
            "said": len(said),
            "difference": _difference(whole, _curve(f"resumed-{ranks}")),
        }


def _time(row: dict[str, Any]) -> str:
    return "" if row["step_ms"] is None else f"{row['step_ms']:.1f}"


def _table(rows: list[dict[str, Any]], cores: int) -> str:
    """Return what docs/scale.md shows."""
    lines = [
        f"Measured on {cores} cores, with one thread a process (`python -m bench processes`):",
        "",
        "| run | processes | step, with evaluations (ms) | held out at the end | largest difference from one process |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['run']} | {r['processes']} | {_time(r)} | {r['last']:.4f} | {r['difference']:.1e} |"
        for r in rows
        if "last" in r
    ]
    lines += [
        "",
        "| one of two processes | goes on with | the others end after (s) | largest difference from the whole run |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['run']} | {r['processes'].split()[-1]} | {r['ended_s']:.1f} | {r['difference']:.1e} |"
        for r in rows
        if "ended_s" in r
    ]
    return "\n".join(lines) + "\n"


def _into_page(table: Path) -> None:
    """Write the table into docs/scale.md, between the marks with its name."""
    name = table.absolute().relative_to(ROOT).as_posix()
    page = ROOT / "docs/scale.md"
    begin, _, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    page.write_text(f"{begin}<!-- {name} -->\n{table.read_text()}{end}{after}")


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the curves of all numbers of processes over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, len(RUNS)), RUNS, strict=True):
        shown = [row for row in rows if row["run"] == name and row["processes"] in RANKS]
        for i, row in enumerate(shown):
            steps = np.linspace(0, STEPS, len(row["held_out"]))
            style = {"marker": "osx"[i], "markersize": 9 - 3 * i, "linewidth": 3 - i}
            panel.plot(steps, row["held_out"], label=f"{row['processes']} processes", **style)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.set_ylabel("held out", fontsize=8)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(out: Path) -> list[dict[str, Any]]:
    """Print and write curves, step times and recoveries."""
    facts = _environment.describe(torch.device("cpu")) | {"threads": 1}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            random = np.random.default_rng(0)
            mixed = random.normal(size=(ROWS, DIMS)) @ random.normal(size=(DIMS, DIMS))
            values = (np.tanh(mixed) + 0.1 * mixed).astype(np.float32)
            np.save("rows.npy", values)
            np.save("moved.npy", np.nextafter(values, np.float32(np.inf)))
            rows = [*_curves(), *_recovery()]
        finally:
            os.chdir(before)
    table = _table(rows, int(facts["cores"]))
    print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "processes.json").write_text(json.dumps([row | facts for row in rows], indent=1) + "\n")
    _draw(out / "processes.png", rows)
    if not out.absolute().is_relative_to(ROOT / "bench/results"):
        (out / "processes.md").write_text(table)
        return rows
    picture = f"../{(out / 'processes.png').absolute().relative_to(ROOT).as_posix()}"
    table += f"\n![Curves of one, two and four processes]({picture})\n"
    (out / "processes.md").write_text(table)
    _into_page(out / "processes.md")
    return rows
