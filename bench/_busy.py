"""``python -m bench busy``: training steps while another process keeps a core busy.

Where threads outnumber free cores, a thread that waits for another one waits for the scheduler: each parallel region
then costs milliseconds.  A flow that is one op has two regions a step, a flow of layers several for each layer.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import _environment
from bench.models import small_flows

__all__ = ["measure"]

ROUNDS, CALLS = 10, 40
MODELS = (small_flows.MAF, small_flows.NSF, small_flows.REALNVP)


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that computes for ever, stopped."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def providers(model: small_flows.Model) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return training steps with their optimizer: of the flow as one op, of its layers, and of zuko if there is one."""
    device = torch.device("cpu")
    ours, layers = (small_flows.built.__wrapped__(model, "ours", device) for _ in range(2))
    for layer in layers.bijection:
        layer.register_forward_hook(lambda *_: None)  # keeps the layers
    found = {"ours": ours, "layers": layers}
    with suppress(ImportError):
        found["zuko"] = small_flows.built.__wrapped__(model, "zuko", device)
    return {name: partial(small_flows.whole_step, flow) for name, flow in found.items()}


def milliseconds(run: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def measure(out: Path) -> list[dict[str, object]]:
    """Print and write the median times of steps, alone and beside a busy process, in turns."""
    facts = _environment.describe(torch.device("cpu"))
    rows: list[dict[str, object]] = []
    print(f"# {facts['device']}, {facts['threads']} threads, {facts['cores']} cores")
    print("| step | provider | alone (ms) | beside a busy process (ms) | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for model in MODELS:
        x = torch.randn(200, model.dims)
        steps = providers(model)
        times: dict[tuple[str, bool], list[float]] = {}
        with busy_process() as process:
            for _ in range(ROUNDS):
                for busy in (False, True):
                    process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                    time.sleep(0.05)  # until the scheduler has noticed
                    for name, step in steps.items():
                        times.setdefault((name, busy), []).extend(milliseconds(partial(step, x)))
        for name in steps:
            alone, beside = (statistics.median(times[name, busy]) for busy in (False, True))
            rows.append(
                {
                    "model": f"{model}, batch {len(x)}",
                    "provider": name,
                    "alone_ms": round(alone, 4),
                }
                | {"busy_ms": round(beside, 4), "ratio": round(beside / alone, 3)}
                | facts
            )
            print(f"| {model} | {name} | {alone:.3g} | {beside:.3g} | {beside / alone:.2f} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "busy.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows
