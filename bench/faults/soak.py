"""``python -m bench.faults.soak --minutes 60``: one process that trains and samples flows, and must not grow.

Each round makes a flow of a random class, size and dtype, trains it on batches of random sizes, scores and samples.
Between rounds the process is asked for its resident memory, threads and open files.  Unused pages go back to the
system first (``malloc_trim``), so that memory is what the process still holds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import random
import statistics
import sys
import time
import warnings
from array import array
from pathlib import Path
from typing import Any

import torch

from bench.faults import _record
from pyflowkern import flows, transport

__all__ = ["soak"]

SOLVER = {"method": "rk4", "step_size": 0.5}
BLOCKS = 12
#: What is noted at each look.
LOOK = ("hours", "resident_mib", "threads", "files")
#: Shapes of images and sizes of their batches: few, as oneDNN, which torch's convolutions use, keeps what it compiled
#: for up to 1024 of them.  The first quarter of a run meets all, so that what grows later is a leak.
IMAGES = ((1, 8, 8), (3, 4, 12), (2, 12, 4))
IMAGE_BATCHES = (1, 7, 64)
BATCHES = (1, 2, 7, 64, 257)


def _vectors(draw: random.Random) -> dict[str, Any]:
    """Return ways to make a flow of vectors, by name."""
    dims, hidden = draw.randint(1, 12), draw.choice((8, 16, 33))
    context = draw.choice((0, 0, 3))
    given: dict[str, Any] = {"context_features": context}
    masked = given | {"transforms": draw.randint(1, 3), "hidden": (hidden, hidden)}
    return {
        "MAF": lambda: flows.MAF(dims, **masked),
        "IAF": lambda: flows.IAF(dims, **masked),
        "NSF": lambda: flows.NSF(dims + 1, **masked, bins=draw.randint(3, 9)),
        "NSF, autoregressive": lambda: flows.NSF(dims, **masked, autoregressive=True),
        "NSF, circular": lambda: flows.NSF(dims + 1, **masked, circular=True),
        "RealNVP": lambda: flows.RealNVP(dims + 1, steps=draw.randint(1, 4), hidden=hidden),
        "RealNVP, reversible": lambda: flows.RealNVP(dims + 1, steps=3, memory="reversible"),
        "FFJORD": lambda: flows.FFJORD(dims, hidden=(hidden,), **SOLVER),
        "FlowMatching": lambda: flows.FlowMatching(dims, hidden=(hidden,), **SOLVER),
    }


def _images(draw: random.Random) -> dict[str, Any]:
    shape = draw.choice(IMAGES)
    return {
        "Glow": lambda: flows.Glow(shape, levels=2, steps=draw.randint(1, 2), hidden=8, bits=8),
        "RealNVP, images": lambda: flows.RealNVP(shape, levels=1, steps=1, hidden=8, bits=8),
    }


def _round(draw: random.Random, only: str | None = None) -> str:
    """Make a flow, train it a little, score and sample; return what it was."""
    makers = _vectors(draw) | _images(draw)
    name = only or draw.choice((*makers, "Sinkhorn"))
    if name == "Sinkhorn":
        x, y = (torch.randn(draw.randint(1, 200), 3) for _ in range(2))
        transport.sinkhorn(x, y, epsilon=0.5).pairs(10)
        return name
    dtype = draw.choice((torch.float32, torch.float32, torch.float64))
    flow = makers[name]().to(dtype)
    optimizer = torch.optim.Adam(flow.parameters())
    for _ in range(draw.randint(1, 6)):
        n = draw.choice(IMAGE_BATCHES if len(flow.event_shape) > 1 else BATCHES)
        shape = (n, *flow.event_shape)
        pixels = flow.preprocess is not None
        x = (
            torch.randint(0, 256, shape, dtype=torch.uint8)
            if pixels
            else torch.rand(shape).to(dtype)
        )
        context = torch.randn(n, flow.context_features, dtype=dtype)
        given = (context,) if flow.context_features else ()
        optimizer.zero_grad()
        loss = flow.loss(x) if hasattr(flow, "loss") else -flow.log_prob(x, *given).mean()
        loss.backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        flow.log_prob(x, *given)
        flow.sample(n, *given)
        flow.sample(n + 3, *(c[0] for c in given), temperature=0.7)
    return name


def _state() -> tuple[float, float, float]:
    """Return resident MiB, threads and open files of this process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    files = len(os.listdir("/proc/self/fd")) - 1  # that of the listing itself
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, threads, files


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Return the least-squares slope and half of its 95 % confidence interval.

    Of the means of :data:`BLOCKS` blocks in time, since neighbouring values depend on each other.
    """
    size = len(times) // BLOCKS
    blocks = [slice(k * size, (k + 1) * size) for k in range(BLOCKS)]
    t = [statistics.fmean(times[b]) for b in blocks]
    y = [statistics.fmean(values[b]) for b in blocks]
    fit = statistics.linear_regression(t, y)
    middle = statistics.fmean(t)
    squares = sum((b - fit.intercept - fit.slope * a) ** 2 for a, b in zip(t, y, strict=True))
    spread = sum((a - middle) ** 2 for a in t)
    student = 2.228  # 97.5 % of Student's distribution with BLOCKS - 2 = 10 degrees of freedom
    return fit.slope, student * math.sqrt(squares / (BLOCKS - 2) / spread)


def soak(
    minutes: float, seed: int = 0, every: float = 1.0, only: str | None = None
) -> dict[str, Any]:
    """Run rounds of one class of flows, or all; return what the process held over the last three quarters."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    names: dict[str, int] = {}
    # memory of all looks from the start, each page of it written: what is noted later makes nothing grow
    looks = {key: array("d", bytes(8 * (int(60 * minutes / every) + 1))) for key in LOOK}
    count = 0
    begin = time.monotonic()
    looked = begin
    while (now := time.monotonic()) - begin < 60 * minutes:
        name = _round(draw, only)
        names[name] = names.get(name, 0) + 1
        if now - looked >= every:
            looked = now
            for key, value in zip(LOOK, ((now - begin) / 3600, *_state()), strict=True):
                looks[key][count] = value
            count += 1
    rows = {key: values[count // 4 : count].tolist() for key, values in looks.items()}
    if count - count // 4 < 2 * BLOCKS:
        raise ValueError(
            f"minutes must give {2 * BLOCKS} looks after warming up, got {count - count // 4}"
        )
    memory = slope(rows["hours"], rows["resident_mib"])
    held = {key: sorted({int(v) for v in rows[key]}) for key in ("threads", "files")}
    return {
        "minutes": minutes,
        "seed": seed,
        "rounds": names,
        "resident_mib": [round(rows["resident_mib"][0], 1), round(rows["resident_mib"][-1], 1)],
        "mib_per_hour": [round(memory[0], 2), round(memory[1], 2)],
        **held,
    }


def main() -> int:
    """Run from the command line, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="flows of one class: to see which of them grow")
    parser.add_argument("--out", type=Path, default=_record.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = soak(args.minutes, args.seed, only=args.only)
    rate, half = result["mib_per_hour"]
    counts = "; ".join(
        f"{key} {result[key][0]}" + (f" to {result[key][-1]}" if len(result[key]) > 1 else "")
        for key in ("threads", "files")
    )
    first, last = result["resident_mib"]
    grows = rate - half > 0
    result |= {
        "tried": "soak: flows of random classes, sizes and dtypes made, trained, scored and sampled in one process",
        "amount": f"{sum(result['rounds'].values()):,} flows in {args.minutes:g} minutes",
        "found": f"memory {first} MiB after a quarter, {last} MiB at the end: {rate} ± {half} MiB an hour; {counts}",
        "command": f"python -m bench.faults.soak --minutes {args.minutes:g}",
    }
    if args.only is None:
        print(_record.write("soak", result, args.out))
    print(result["found"])
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
