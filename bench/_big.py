"""``python -m bench big``: ten million rows scored, drawn and trained on, with the peak memory of each process.

Every figure is that of a process of its own, which imports, loads a run and works; the first does so for a few rows.
"""

from __future__ import annotations

import json
import os
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

DIMS = 6
FLOW = ["--flow", "RealNVP", "--set", "flow_args.steps=4", "--set", "hidden=64"]
#: Written by each process when it ends: the largest memory of its own.  What the system says of a child counts the
#: memory of its parent, too.
PEAK = """
import atexit, sys
from pathlib import Path
from pyflowkern.train.measure import peak
atexit.register(lambda: Path("peak.txt").write_text(str(peak())))
"""
COMMAND = f"{PEAK}\nfrom pyflowkern.cli import main; main()"
CHUNKS = f"""
{PEAK}
import numpy as np, torch
from pyflowkern.train.checkpoint import load_trained
torch.set_num_threads(int(sys.argv[1]))
flow = load_trained(Path("run")).model.flow
with torch.no_grad():
    x = np.load("rows.npy", mmap_mode="r")
    print(len(flow.log_prob(x, chunk=2**16)), flow.log_prob(x[:2**16], chunk=2**16).mean())
"""


def _command(*words: object) -> list[str]:
    return [sys.executable, "-c", COMMAND, *map(str, words)]


def _works(rows: int, threads: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yield what is measured, its rows, and the command."""
    train = _command(
        "train", "--data", "rows.npy", *FLOW, "--steps", 500, "--set", "stream=always"
    )
    few = "evaluate 1,000 rows"
    yield few, 1000, _command("evaluate", "run", "--data", "few.npy")
    yield "evaluate .npy", rows, _command("evaluate", "run", "--data", "rows.npy")
    yield "sample to .npy", rows, _command("sample", "run", "-n", rows, "--out", "s.npy")
    yield "sample to .parquet", rows, _command("sample", "run", "-n", rows, "--out", "s.parquet")
    yield "evaluate .parquet", rows, _command("evaluate", "run", "--data", "s.parquet")
    chunks = [sys.executable, "-c", CHUNKS, str(threads)]
    yield "log_prob(memmap, chunk=65536)", rows, chunks
    yield "train: statistics, 500 steps", rows, [*train, "--out", "trained"]


def _write_rows(count: int) -> None:
    """Write the rows part by part; some of them are what the flow is trained on."""
    rows = np.lib.format.open_memmap("rows.npy", "w+", np.float32, (count, DIMS))
    random = np.random.default_rng(0)
    mix = random.normal(size=(DIMS, DIMS))
    for begin in range(0, count, 2**18):
        part = rows[begin : begin + 2**18]
        part[:] = np.tanh(random.normal(size=part.shape) @ mix) + 0.1 * random.normal(
            size=part.shape
        )
    np.save("some.npy", rows[:100_000])
    np.save("few.npy", rows[:1000])


def _run(command: list[str], threads: int) -> tuple[float, float, float]:
    """Return seconds, processor time (s) and peak memory (MB) of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    begin = time.perf_counter()
    with open("log.txt", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"{command}: {Path('log.txt').read_text()}")
    return seconds, usage.ru_utime + usage.ru_stime, float(Path("peak.txt").read_text())


def measure(out: Path, threads: int, count: int) -> list[dict[str, Any]]:
    """Print and write seconds, rows a second and peak memory."""
    facts = _environment.describe(torch.device("cpu"))
    rows, before = list[dict[str, Any]](), Path.cwd()
    lines = [
        "| what | rows | time (s) | processor (s) | million rows/s | peak memory (MB) | more than for few rows (MB) |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            _write_rows(count)
            _run(
                _command("train", "--data", "some.npy", *FLOW, "--steps", 300, "--out", "run"),
                threads,
            )
            for what, done, command in _works(count, threads):
                seconds, cpu, peak = _run(command, threads)
                if not rows:
                    first = seconds, peak
                row = {
                    "what": what,
                    "rows": count,
                    "seconds": round(seconds, 2),
                    "processor_seconds": round(cpu, 2),
                    "peak_mb": round(peak),
                }
                row["more_mb"] = round(peak - first[1])
                rows.append(row | facts)
                speed = f"{done / (seconds - first[0]) / 1e6:.2g}" if len(rows) > 1 else ""
                more = f"{row['more_mb']}" if len(rows) > 1 else ""
                lines.append(
                    f"| {what} | {done:,} | {seconds:.1f} | {cpu:.1f} | {speed} | {peak:.0f} | {more} |"
                )
                print(lines[-1], flush=True)
        finally:
            os.chdir(before)
    out.mkdir(parents=True, exist_ok=True)
    (out / "big.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "big.md").write_text("\n".join(lines) + "\n")
    return rows
