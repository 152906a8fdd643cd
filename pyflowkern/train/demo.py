"""The demonstration: a Glow trained on photographs within minutes, and what the kernels gain."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyflowkern import flows
from pyflowkern._library import require_kernels
from pyflowkern.core.files import write_atomic
from pyflowkern.data import load, parts_of
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.measure import peak_memory, seconds_of, step_seconds
from pyflowkern.train.runner import Run, check_folder, resume_config, train

__all__ = ["Comparison", "compare", "demo", "round_trip_error"]

CONFIG = TrainConfig(
    data="photos",
    flow="Glow",
    flow_args={"levels": 3, "steps": 4, "hidden": 64},
    batch_size=32,
    lr=2e-3,
    warmup=30,
    final_lr=0.02,
    ema=0.98,
)
ROUNDS = 8  #: evaluations of a demo
_MEMORY_SECONDS = 20  #: about how long two separate processes take to measure the memory
CLOSING = 20.0  #: seconds left for what follows training, and for a wrong estimate of the speed


@dataclass(frozen=True)
class Comparison:
    """A training step with kernels beside the reference: seconds, and MB of memory; and seconds of other work."""

    seconds: tuple[float, float]
    memory: tuple[float, float]
    others: dict[str, tuple[float, float]]


def compare(config: TrainConfig, limit: float = 20.0) -> Comparison:
    """Measure both paths on the same flow, data and machine, and small flows on vectors in a tenth of the time each."""
    data = load(config.data, size=config.size, seed=config.seed)
    seconds = step_seconds(config, data, limit=limit)
    memory = peak_memory(config, reference=False), peak_memory(config, reference=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        others = {name: seconds_of(work, limit=limit / 10) for name, work in _others().items()}
    return Comparison(seconds, memory, others)


def _others() -> dict[str, Callable[[int], None]]:
    """Return work of flows on vectors by a name for the table."""
    maf = flows.MAF(21, transforms=5, hidden=(128, 128))
    return {
        "spline-flow step": _step(flows.NSF(6, transforms=5, hidden=(50, 50)), 200),
        "1000 MAF samples": lambda number: _forget(maf.sample(1000)),
        "continuous-flow step": _step(flows.FFJORD(6, hidden=(60, 60)), 200),
    }


def _forget(result: object) -> None:
    """Work whose result is not wanted returns nothing."""


def _step(flow: flows.Flow, samples: int) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=True)
    x = torch.randn(samples, flow.dims)

    def step(number: int) -> None:
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()

    return step


def _planned(config: TrainConfig, comparison: Comparison, seconds: float) -> TrainConfig:
    """Choose as many steps as fit; an evaluation costs about as much as eight steps."""
    steps = max(ROUNDS, int((seconds - CLOSING) / comparison.seconds[0]) - 8 * ROUNDS)
    every = -(-steps // ROUNDS)
    minutes = max(seconds - CLOSING / 2, 1.0) / 60
    return replace(config, steps=every * ROUNDS, every=every, minutes=minutes)


@torch.no_grad()
def round_trip_error(run: Run, rows: int = 64) -> float:
    """Return the largest ``|inverse(forward(x)) - x|`` over held-out images, as pixels in ``[0, 1]``."""
    model: Any = run.module.evaluated.eval()
    levels = 2 ** (run.module.data.bits or 8)
    x = (parts_of(run.module.data.validation)[0][:rows].float() + 0.5) / levels
    return float((model.inverse(model(x)[0])[0] - x).abs().max())


def demo(out: Path, *, minutes: float = 4.0, resume: bool = False) -> Run:
    """Compare the paths, train, and print a short table; ``minutes`` is the budget of all of it."""
    start = time.monotonic()
    if not 0.1 <= minutes < 1e6:
        raise ConfigError(f"minutes must be a number from 0.1 to 1000000, got {minutes}")
    check_folder(out)
    measured = out / "comparison.json"
    if resume and measured.exists() and (out / "config.yaml").exists():
        config, comparison = resume_config(out), _read_comparison(measured)
    else:
        if resume:
            print(f"{out}: no demo to go on with; starting one", flush=True)
        limit = minutes * 5
        print(
            "1/2  measuring training steps, samples and memory, kernels beside reference: "
            f"about {1.3 * limit + _MEMORY_SECONDS:.0f} s ...",
            flush=True,
        )
        config = replace(CONFIG, out=str(out))
        comparison = compare(config, limit=limit)
        config = _planned(config, comparison, minutes * 60 - (time.monotonic() - start))
    g = config.flow_args
    print(
        f"2/2  training Glow ({g['levels']} levels x {g['steps']} steps, hidden {g['hidden']}) on 32x32 patches of "
        f"five photographs,\n     {config.steps} steps of {config.batch_size}; two other photographs are held out; "
        f"at most {config.minutes:.1f} minutes, a line every {config.every} steps",
        flush=True,
    )
    write_atomic(measured, json.dumps(asdict(comparison)).encode())
    run = train(config, resume=resume, overwrite=True)
    print(report(run, comparison, time.monotonic() - start))
    return run


def _read_comparison(path: Path) -> Comparison:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        (fast, slow), (small, large) = stored["seconds"], stored["memory"]
        others = {name: (float(a), float(b)) for name, (a, b) in stored["others"].items()}
        return Comparison((float(fast), float(slow)), (float(small), float(large)), others)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({type(error).__name__}); start again without --resume"
        ) from None


def report(run: Run, comparison: Comparison, seconds: float) -> str:
    """Return the closing table."""
    before, after = run.history[0], run.history[-1]
    (fast, slow), (small, large) = comparison.seconds, comparison.memory
    lines = [
        "",
        f"  {'held out':24}{'before':>12}{'after':>12}",
        f"  {'bits/dim':24}{before['held_out']:>12.3f}{after['held_out']:>12.3f}   ({after['step']} steps)",
        f"  {'round-trip error':24}{'':>12}{round_trip_error(run):>12.1e}   (a grey level is {1 / 256:.1e})",
        "",
        f"  {'one training step':24}{'kernels':>12}{'reference':>12}{'gain':>9}",
        f"  {'steps/s':24}{1 / fast:>12.2f}{1 / slow:>12.2f}{slow / fast:>8.2f}x",
        f"  {'peak memory, MB':24}{small:>12.0f}{large:>12.0f}{large / max(small, 1e-9):>8.2f}x",
        "",
        f"  {'flows on vectors, ms':24}{'kernels':>12}{'reference':>12}{'gain':>9}",
        *(
            f"  {name:24}{1e3 * a:>12.2f}{1e3 * b:>12.2f}{b / a:>8.2f}x"
            for name, (a, b) in comparison.others.items()
        ),
        "",
        f"  {run.out}/: samples.png, curve.png, metrics.csv, last.ckpt; {seconds:.0f} s in all",
    ]
    try:
        require_kernels()
    except RuntimeError as error:
        lines.append(f"  both columns ran the reference: {error}")
    return "\n".join(lines)
