"""sbi: neural posterior estimation, its samples, and simulation-based calibration."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["run"]

EPOCHS = {2000: 40, 20000: 10}


def two_moons(theta: Tensor) -> Tensor:
    """Draw a point of a crescent, moved by two parameters (Greenberg et al., 2019)."""
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    a, b = theta[:, 0], theta[:, 1]
    return crescent + torch.stack([-(a + b).abs(), b - a], 1) / math.sqrt(2)


def slcp(theta: Tensor) -> Tensor:
    """Draw four points of a normal distribution with five parameters (Papamakarios et al., 2019)."""
    mean, s1, s2 = theta[:, :2], theta[:, 2] ** 2, theta[:, 3] ** 2
    rho = theta[:, 4].tanh()
    u = torch.randn(len(theta), 4, 2)
    first = mean[:, :1] + s1[:, None] * u[..., 0]
    mixed = rho[:, None] * u[..., 0] + (1 - rho[:, None] ** 2).sqrt() * u[..., 1]
    return torch.stack([first, mean[:, 1:] + s2[:, None] * mixed], -1).flatten(1)


SIMULATORS = {"two_moons": (two_moons, 2, 1.0), "slcp": (slcp, 5, 3.0)}


def run(estimator: str, simulator: str, simulations: int) -> dict[str, Any]:
    """Train on simulations, draw samples of one posterior, and calibrate 200 of them with 200 samples each.

    Args:
        estimator: ``density_estimator`` of ``sbi.inference.NPE``.
        simulator: a key of :data:`SIMULATORS`.
        simulations: how many.
    """
    from sbi.diagnostics import run_sbc
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    draw, size, bound = SIMULATORS[simulator]
    torch.manual_seed(0)
    prior = BoxUniform(-bound * torch.ones(size), bound * torch.ones(size))
    theta = prior.sample((simulations,))
    x = draw(theta)
    inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
    inference.append_simulations(theta, x)
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    inference.train(max_num_epochs=EPOCHS[simulations])
    found["train (s)"] = time.perf_counter() - begin
    found["losses"] = [*map(float, inference.summary["validation_loss"])]
    posterior = inference.build_posterior()
    observed = draw(torch.full((1, size), 0.3 * bound))
    torch.manual_seed(1)
    begin = time.perf_counter()
    samples = posterior.sample((10_000,), x=observed, show_progress_bars=False)
    found["10,000 samples (s)"] = time.perf_counter() - begin
    found["means"] = samples.mean(0).tolist()
    torch.manual_seed(2)
    truth = prior.sample((200,))
    data = draw(truth)
    begin = time.perf_counter()
    ranks, _ = run_sbc(truth, data, posterior, num_posterior_samples=200, show_progress_bar=False)
    found["run_sbc 200 x 200 (s)"] = time.perf_counter() - begin
    found["ranks"] = ranks.float().mean(0).tolist()
    return found
