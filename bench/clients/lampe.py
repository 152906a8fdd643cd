"""lampe: neural posterior estimation with zuko's flows."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.clients.sbi import SIMULATORS

__all__ = ["run"]


def run(flow: str, simulator: str, simulations: int, epochs: int) -> dict[str, Any]:
    """Train a posterior estimator on simulations, and draw samples of one posterior.

    Args:
        flow: a class of ``zuko.flows``.
        simulator: a key of :data:`~bench.clients.sbi.SIMULATORS`.
        simulations: how many.
        epochs: how often all of them are seen, 256 at a time.
    """
    import zuko
    from lampe.inference import NPE, NPELoss
    from lampe.utils import GDStep

    draw, size, bound = SIMULATORS[simulator]
    torch.manual_seed(0)
    theta = bound * (2 * torch.rand(simulations, size) - 1)
    x = draw(theta)
    estimator = NPE(size, x.shape[1], build=getattr(zuko.flows, flow), hidden_features=(64, 64))
    loss = NPELoss(estimator)
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=1e-3)
    step = GDStep(optimizer, clip=1.0)
    found: dict[str, Any] = {"losses": []}
    begin = time.perf_counter()
    for _ in range(epochs):
        losses = []
        for index in torch.randperm(simulations).split(256):
            losses.append(step(loss(theta[index], x[index])))
        found["losses"].append(float(torch.stack(losses).mean()))
    found["train (s)"] = time.perf_counter() - begin
    estimator.eval()
    observed = draw(torch.full((1, size), 0.3 * bound))[0]
    torch.manual_seed(1)
    begin = time.perf_counter()
    with torch.no_grad():
        samples = estimator.flow(observed).sample((10_000,))
    found["10,000 samples (s)"] = time.perf_counter() - begin
    found["means"] = samples.mean(0).tolist()
    return found
