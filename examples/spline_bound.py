"""How large must the bound of an NSF's splines be?  Posteriors of known width, and a density that needs fine bins.

Outside of ``[-B, B]`` a spline is the identity: the share ``2 Q(B)`` of the latents that lie there, 0.27% for
``B = 3``, stays where it is.  A posterior of width ``w`` in standardised parameters then has samples at
``|theta| > B``, and its variance grows by about ``2 Q(B) B^2``: for ``B = 3`` and ``w = 0.1`` that alone makes it
1.9 times too wide.  A larger bound costs resolution, as the bins share the interval.  This script trains flows for
each bound and each width and writes the table from which the default of ``flows.NSF``, 5, was chosen:

| bound | width 0.48: ratio, nats | width 0.09: ratio, nats | width 0.03: ratio, nats | rings, nats |
|---|---|---|---|---|
| 3 | 1.03, 0.004 | 1.79, 0.033 | 3.56, 0.109 | 1.547 |
| 4 | 1.00, 0.002 | 1.05, 0.006 | 1.45, 0.046 | 1.545 |
| 5 | 1.00, 0.001 | 1.02, 0.007 | 1.31, 0.029 | 1.549 |
| 6 | 1.00, 0.000 | 1.02, 0.004 | 1.34, 0.027 | 1.558 |
| 8 | 1.00, 0.001 | 1.02, 0.002 | 1.32, 0.021 | 1.633 |

    python examples/spline_bound.py           # three minutes; writes spline_bound.md and spline_bound.png
    python examples/spline_bound.py --draw    # the picture of the table above, without training
    python examples/spline_bound.py --quick   # seconds

Columns: standard deviation of posterior samples over the exact one (1 is right), and the Kullback-Leibler divergence
of the flow from the exact posterior in nats; in the last column the loss on two rings, which is
1.53 nats at best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from common import fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

DESIGN = torch.tensor([[1.0, 0.5], [-0.4, 1.0]])
NOISES = (0.6, 0.1, 0.03)


def simulate(n: int, noise: float) -> tuple[Tensor, Tensor]:
    """Draw parameters from the prior, a standard normal, and an observation for each."""
    theta = torch.randn(n, 2)
    return theta, theta @ DESIGN.T + noise * torch.randn(n, 2)


def exact_posterior(x: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return mean ``[N, 2]`` and covariance ``[2, 2]`` of the parameters, given observations."""
    covariance = torch.linalg.inv(torch.eye(2) + DESIGN.T @ DESIGN / noise**2)
    return x @ DESIGN @ covariance / noise**2, covariance


def rings(n: int) -> Tensor:
    """Draw from two rings of radius 0.75 and 1.9 and width 0.075: about unit variance."""
    radius = 0.75 * (torch.where(torch.rand(n) < 0.5, 1.0, 2.5) + 0.1 * torch.randn(n))
    angle = 2 * math.pi * torch.rand(n)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


@torch.no_grad()
def compare(
    flow: flows.Flow, noise: float, observations: int, samples: int
) -> tuple[float, float]:
    """Return the ratio of posterior deviations, the flow's over the exact ones, and the divergence in nats."""
    theta, x = simulate(observations, noise)
    mean, covariance = exact_posterior(x, noise)
    drawn = flow.sample(observations * samples, x.repeat_interleave(samples, 0))
    deviation = drawn.view(observations, samples, 2) - mean[:, None]
    ratio = deviation.square().mean((0, 1)).div(covariance.diagonal()).sqrt().mean()
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(theta)
    return float(ratio), float((exact - flow.log_prob(theta, x)).mean())


def posterior(bound: float, noise: float, steps: int, quick: bool) -> tuple[float, float]:
    """Train a flow of the posterior; return the result of :func:`compare`."""
    flow = flows.NSF(2, transforms=3, hidden=(50, 50), bound=bound, context_features=2)

    def loss() -> Tensor:
        theta, x = simulate(256, noise)
        return -flow.log_prob(theta, x).mean()

    fit(loss, flow.parameters(), steps, lr=3e-3)
    return compare(flow.eval(), noise, *((50, 200) if quick else (500, 1000)))


def density(bound: float, steps: int) -> float:
    """Train a flow of the rings; return its loss on fresh samples."""
    flow = flows.NSF(2, transforms=4, hidden=(50, 50), bound=bound)
    fit(lambda: -flow.log_prob(rings(256)).mean(), flow.parameters(), steps, lr=3e-3)
    with torch.no_grad():
        return float(-flow.log_prob(rings(20_000)).mean())


def picture(
    widths: Sequence[float], ratios: dict[float, list[float]], rings_nats: list[float], path: Path
) -> None:
    """Draw the ratios over the true widths, a line for each bound, and beside them the loss on the rings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for i, (bound, column) in enumerate(ratios.items()):
        colour = plt.get_cmap("viridis")(0.9 * i / max(1, len(ratios) - 1))
        left.loglog(widths, column, "o-", color=colour, label=f"bound {bound:g}")
        right.plot(bound, rings_nats[i], "o", color=colour)
    left.axhline(1, color="black", linewidth=0.8)
    ticks = [1, 1.5, 2, 3, 4]
    for axis, at in ((left.xaxis, widths), (left.yaxis, ticks)):
        axis.set_ticks(at, labels=[f"{v:.2g}" for v in at])
        axis.set_minor_locator(plt.NullLocator())
    left.set(xlabel="true width of the posterior", ylabel="width of samples over true width")
    left.legend(fontsize=8)
    right.axhline(1.53, color="black", linewidth=0.8, label="at best")
    right.set(xlabel="bound of the splines", ylabel="loss on two rings, nats")
    right.legend(fontsize=8)
    save(figure, path)


def read_table(text: str) -> tuple[list[float], dict[float, list[float]], list[float]]:
    """Return the widths, the ratios of each bound and the losses on the rings of a table like the one above."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)
    widths = [float(cell.split()[1].rstrip(":")) for cell in head[1:-1]]
    ratios = {float(row[0]): [float(cell.split(",")[0]) for cell in row[1:-1]] for row in rows}
    return widths, ratios, [float(row[-1]) for row in rows]


def main(argv: Sequence[str] | None = None) -> dict[float, list[float]]:
    """Train and compare, or draw what was found; return the ratios of each bound, in the order of the noises."""
    parser = options(__doc__, "spline_bound")
    parser.add_argument("--bounds", type=float, nargs="+", default=[3.0, 4.0, 5.0, 6.0, 8.0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--draw", action="store_true", help="the table above, without training")
    args = parser.parse_args(argv)
    if args.draw:
        found = read_table(__doc__)
        picture(*found, args.out / "spline_bound.png")
        return found[1]
    noises: tuple[float, ...] = NOISES
    if args.quick:
        args.bounds, args.seeds, args.steps, noises = [3.0, 5.0], 1, 300, NOISES[1:2]
    widths = [
        float(exact_posterior(torch.zeros(1, 2), n)[1].diagonal().sqrt().mean()) for n in noises
    ]
    head = [f"width {w:.2f}: ratio, nats" for w in widths]
    lines = ["| bound | " + " | ".join(head) + " | rings, nats |", "|---" * (len(head) + 2) + "|"]
    ratios: dict[float, list[float]] = {}
    rings_nats: list[float] = []
    for bound in args.bounds:
        cells, ratios[bound] = [], []
        for noise in noises:
            found = []
            for seed in range(args.seeds):
                torch.manual_seed(args.seed + seed)
                found.append(posterior(bound, noise, args.steps, args.quick))
            ratio, nats = (sum(column) / args.seeds for column in zip(*found, strict=True))
            cells.append(f"{ratio:.2f}, {nats:.3f}")
            ratios[bound].append(ratio)
        torch.manual_seed(args.seed)
        rings_nats.append(density(bound, args.steps))
        cells.append(f"{rings_nats[-1]:.3f}")
        lines.append(f"| {bound:g} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "spline_bound.md").write_text("\n".join(lines) + "\n")
    picture(widths, ratios, rings_nats, args.out / "spline_bound.png")
    return ratios


if __name__ == "__main__":
    main()
