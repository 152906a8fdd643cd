"""Irregular time series: a recurrent network whose state follows a differential equation between observations.

    python examples/irregular_series.py           # a minute; writes irregular_series.png

Each series is a damped oscillation of unknown frequency, damping, amplitude and phase, seen with noise at random times.
A network reads the observations one by one, and predicts the curve after each.

    ODE-RNN   the state follows dh/dt = f(h) until the next observation, which a GRU cell reads (Rubanova et al. 2019)
    RNN, dt   a GRU cell reads the value and the time since the last one; the prediction is a network of the state
              and the time ahead
    GRU       the same without any times

All predict the value at the next time, and are trained by the squared error.  The error is measured against the
curve without noise: at the next observation, by the length of the gap, and up to twice the longest gap seen in
training.  What one should see: without times the error is large at once, and beyond the gaps of
training the state of the ODE goes on oscillating, which a network of the time ahead was not taught to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import fit, options, plt, save
from torch import Tensor, nn

from pyflowkern import ode

HIDDEN, LONGEST, NOISE, SOLVER = 24, 1.5, 0.05, {"method": "rk4", "checkpoint": False}


class Curves:
    """Damped oscillations ``a exp(-d t) sin(w t + p)``, one for each row."""

    def __init__(self, n: int) -> None:
        low, high = torch.tensor([0.7, 0.0, 1.5, 0.0]), torch.tensor([1.3, 0.15, 3.0, 6.2832])
        self.parameters = (low + (high - low) * torch.rand(n, 4)).unbind(1)

    def at(self, t: Tensor) -> Tensor:
        """Return the values at times ``[N]`` or ``[N, T]``."""
        shape = (-1, *[1] * (t.dim() - 1))
        a, d, w, p = (value.view(shape) for value in self.parameters)
        return a * (-d * t).exp() * (w * t + p).sin()


def observe(n: int, length: int) -> tuple[Curves, Tensor, Tensor]:
    """Draw curves and their noisy values at random times, each gap uniform: ``[N, length]`` both."""
    curves = Curves(n)
    t = (0.05 + (LONGEST - 0.05) * torch.rand(n, length)).cumsum(1)
    value = curves.at(t)
    return curves, t, value + NOISE * torch.randn_like(value)


class Model(nn.Module):
    """A GRU cell, and one of the three ways to the time of a prediction."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.cell = nn.GRUCell(1 if kind != "RNN, dt" else 2, HIDDEN)
        self.field = nn.Sequential(nn.Linear(HIDDEN, 50), nn.Tanh(), nn.Linear(50, HIDDEN))
        more = 1 if kind == "RNN, dt" else 0
        self.head = nn.Sequential(nn.Linear(HIDDEN + more, 50), nn.Tanh(), nn.Linear(50, 1))

    def later(self, h: Tensor, gap: Tensor) -> Tensor:
        """Return the state after a gap ``[N, 1]``, one for each row: the time of the solve is a share of it."""
        if self.kind != "ODE-RNN":
            return h
        step = 1 / 3 if gap.max() <= LONGEST else 1 / 6
        return ode.odeint(
            lambda _, y: gap * self.field(y), h, [0.0, 1.0], step_size=step, **SOLVER
        )[-1]

    def value(self, h: Tensor, gap: Tensor) -> Tensor:
        """Return the prediction ``[N]`` from the state at the time of prediction."""
        return self.head(torch.cat((h, gap), 1) if self.kind == "RNN, dt" else h).squeeze(1)

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction of each value but the first ``[N, T - 1]``, and the state after the last one."""
        h, gap, found = x.new_zeros(len(x), HIDDEN), x.new_zeros(len(x), 1), []
        for i in range(x.shape[1]):
            if i > 0:
                gap = t[:, i : i + 1] - t[:, i - 1 : i]
                h = self.later(h, gap)
                found.append(self.value(h, gap))
            seen = x[:, i : i + 1]
            h = self.cell(torch.cat((seen, gap), 1) if self.kind == "RNN, dt" else seen, h)
        return torch.stack(found, 1), h

    def ahead(self, h: Tensor, gaps: Tensor) -> Tensor:
        """Return predictions ``[N, G]`` at each of ``gaps`` ``[G]`` after the last observation."""
        values = [
            self.value(self.later(h, gap.expand(len(h), 1)), gap.expand(len(h), 1)) for gap in gaps
        ]
        return torch.stack(values, 1)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train the three; return root mean squared errors: at the next value, ahead within and beyond training."""
    parser = options(__doc__, "irregular_series")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    length, count = (6, 8) if args.quick else (12, args.steps)
    gaps = torch.linspace(0.02, 2 * LONGEST, 9 if args.quick else 40)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    found: dict[str, dict[str, float]] = {}
    for colour, kind in zip(("C0", "C1", "C2"), ("ODE-RNN", "RNN, dt", "GRU"), strict=True):
        torch.manual_seed(args.seed)
        model = Model(kind)

        def loss(model: Model = model) -> Tensor:
            _, t, x = observe(64, length)
            return (
                (model(t, x)[0] - x[:, 1:]).square()[:, 3:].mean()
            )  # after four the curve is known

        fit(loss, model.parameters(), count, 5e-3, say=kind)
        torch.manual_seed(args.seed + 1)
        curves, t, x = observe(50 if args.quick else 1000, length)
        with torch.no_grad():
            guess, h = model(t, x)
            error = (guess - curves.at(t)[:, 1:])[:, 3:].square().mean().sqrt()
            later = t[:, -1:] + gaps
            ahead = model.ahead(h, gaps)
            by_gap = (ahead - curves.at(later)).square().mean(0).sqrt()
        known = gaps <= LONGEST
        found[kind] = {
            "next": float(error),
            "ahead": float(by_gap[known].square().mean().sqrt()),
            "beyond": float(by_gap[~known].square().mean().sqrt()),
        }
        print(kind, {key: round(value, 3) for key, value in found[kind].items()}, flush=True)
        axes[0].plot(later[0], ahead[0], color=colour, label=kind)
        axes[1].plot(gaps, by_gap, color=colour, label=kind)
    line = torch.linspace(float(t[0, -6]), float(later[0, -1]), 300)
    axes[0].plot(
        line, curves.at(line.expand(len(x), -1))[0], "--", color="gray", label="the curve"
    )
    axes[0].plot(t[0, -6:], x[0, -6:], "o", color="black", label="seen")
    axes[0].set(xlabel="time", title="after the last observation")
    axes[1].set(xlabel="time since the last observation", title="error by the time ahead")
    axes[1].axvline(LONGEST, color="gray", linewidth=1, linestyle=":")
    axes[0].axvline(float(t[0, -1]) + LONGEST, color="gray", linewidth=1, linestyle=":")
    axes[0].legend(fontsize=7, loc="lower left")
    axes[1].legend(fontsize=8)
    save(figure, args.out / "irregular_series.png")
    return found


if __name__ == "__main__":
    main()
