"""Simulation-based inference: a conditional spline flow learns the posterior of a simulator's parameters.

The simulator is linear with Gaussian noise, x = A theta + noise, so that its posterior is known in closed
form; the flow learns it from pairs (theta, x) only.  There are three checks: means and covariances are compared
with the exact ones, and in simulation-based calibration (Talts et al. 2018) the rank of the true parameter
among posterior samples must be uniformly distributed, and a region that holds a share of the flow's posterior, those
parameters where its density is highest, must hold the truth as often (expected coverage, Hermans et al. 2022).

    python examples/simulation_inference.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import density_picture, fit, options, plt, save
from torch import Tensor

from pyflowkern import flows

DESIGN = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.7, 0.4]])
NOISE = 0.5


def simulate(n: int) -> tuple[Tensor, Tensor]:
    """Draw parameters from the prior, a standard normal, and an observation for each."""
    theta = torch.randn(n, 2)
    return theta, theta @ DESIGN.T + NOISE * torch.randn(n, 3)


def exact_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean ``[N, 2]`` and covariance ``[2, 2]`` of the parameters, given observations."""
    covariance = torch.linalg.inv(torch.eye(2) + DESIGN.T @ DESIGN / NOISE**2)
    return x @ DESIGN @ covariance / NOISE**2, covariance


@torch.no_grad()
def compare(flow: flows.Flow, observations: int, samples: int) -> tuple[float, float]:
    """Return the root mean square error of means, in posterior deviations, and of log-densities in nats."""
    theta, x = simulate(observations)
    mean, covariance = exact_posterior(x)
    drawn = flow.sample(observations * samples, x.repeat_interleave(samples, 0))
    error = drawn.view(observations, samples, 2).mean(1) - mean
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(theta)
    log_error = flow.log_prob(theta, x) - exact
    deviations = error / covariance.diagonal().sqrt()
    return float(deviations.square().mean().sqrt()), float(log_error.square().mean().sqrt())


@torch.no_grad()
def ranks(flow: flows.Flow, observations: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return ranks of the truth among posterior samples.

    Returns:
        How many of ``samples`` lie below the truth, ``[observations, 2]``, and the share of samples whose density is
        higher than that of the truth, ``[observations]``.
    """
    theta, x = simulate(observations)
    context = x.repeat_interleave(samples, 0)
    drawn, log_prob = flow.sample_and_log_prob(observations * samples, context)
    below = (drawn.view(observations, samples, 2) < theta.unsqueeze(1)).sum(1)
    higher = log_prob.view(observations, samples) > flow.log_prob(theta, x).unsqueeze(1)
    return below, higher.float().mean(1)


def draw_coverage(ax: plt.Axes, higher: Tensor) -> None:
    """Show how often regions of highest density hold the truth, with what chance leaves of a calibrated posterior."""
    nominal = torch.linspace(0, 1, 101)
    found = (higher <= nominal[:, None]).float().mean(1)
    width = 1.96 * (nominal * (1 - nominal) / len(higher)).sqrt()
    ax.fill_between(nominal, nominal - width, nominal + width, color="0.85", label="95% by chance")
    ax.plot(nominal, found, label="NSF")
    ax.set(xlabel="share of the posterior", ylabel="holds the truth", title="coverage")
    ax.legend(fontsize=8)


def chi_square(found: Tensor, samples: int, bins: int = 10) -> float:
    """Return chi-square over its degrees of freedom of ranks against the uniform: about 1 if calibrated."""
    counts = torch.stack(
        [torch.bincount(column * bins // (samples + 1), minlength=bins) for column in found.T]
    )
    expected = len(found) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (2 * (bins - 1)))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = options(__doc__, "simulation_inference")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.quick:
        args.steps = 250
    flow = flows.NSF(2, transforms=3, hidden=(50, 50), bound=5.0, context_features=3)

    def loss() -> Tensor:
        theta, x = simulate(256)  # fresh simulations: nothing to overfit
        return -flow.log_prob(theta, x).mean()

    fit(loss, flow.parameters(), args.steps, lr=3e-3, say="NSF")
    samples = 99
    mean_error, log_error = compare(flow, 100, 500)
    found, higher = ranks(flow, 500 if args.quick else 2000, samples)
    coverage = {f"coverage of {p}%": float((higher < p / 100).float().mean()) for p in (50, 90)}
    calibration = chi_square(found, samples)
    print(
        f"posterior means are off by {mean_error:.3f} of a posterior's deviation (500 samples alone: 0.045)"
    )
    print(f"log-densities are off by {log_error:.3f} nats")
    print(f"ranks: chi-square over degrees of freedom {calibration:.2f} (1 if calibrated)")

    print(", ".join(f"{name}: {share:.3f}" for name, share in coverage.items()))

    figure, axes = plt.subplots(1, 5, figsize=(14, 3))
    x = torch.tensor([[1.0, -0.5, 0.3]])
    mean, covariance = exact_posterior(x)
    exact = torch.distributions.MultivariateNormal(mean[0], covariance)
    extent = [v for m in mean[0].tolist() for v in (m - 1.2, m + 1.2)]
    density_picture(axes[0], exact.log_prob, extent, "exact posterior")
    density_picture(axes[1], lambda t: flow.log_prob(t, x.expand(len(t), 3)), extent, "NSF")
    for i in range(2):
        axes[2 + i].hist(found[:, i].numpy(), bins=10, range=(0, samples + 1))
        axes[2 + i].axhline(len(found) / 10, color="black", linewidth=1)
        axes[2 + i].set_title(f"ranks of parameter {i + 1}", fontsize=9)
    draw_coverage(axes[4], higher)
    save(figure, args.out / "posterior.png")
    checks = {"mean_error": mean_error, "log_error": log_error, "calibration": calibration}
    return {**checks, **coverage}


if __name__ == "__main__":
    main()
