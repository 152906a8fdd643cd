"""The training loops of the libraries' tutorials."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["freia", "normflows_glow", "normflows_nsf", "zuko"]


def train(
    parameters: Any, loss: Callable[[Tensor], Tensor], batches: Callable[[int], Tensor], steps: int
) -> dict[str, Any]:
    """Make Adam steps, and return the time and the mean losses of twenty parts.

    Args:
        parameters: of the model.
        loss: of a batch.
        batches: draws the batch of a step.
        steps: how many.
    """
    optimizer = torch.optim.Adam(parameters, lr=5e-4)
    losses = []
    begin = time.perf_counter()
    for i in range(steps):
        optimizer.zero_grad()
        value = loss(batches(i))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    seconds = time.perf_counter() - begin
    parts = torch.stack(losses).view(20, -1).mean(1)
    return {"train (s)": seconds, "losses": parts.tolist()}


def moons(n: int) -> Tensor:
    """Draw points of two half circles with noise."""
    angle = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2)


def timed(sample: Callable[[], Tensor]) -> dict[str, Any]:
    """Return the time of a call, and the means of what it gives."""
    torch.manual_seed(1)
    begin = time.perf_counter()
    with torch.no_grad():
        samples = sample()
    seconds = time.perf_counter() - begin
    return {"samples (s)": seconds, "means": samples.flatten(1).mean(0)[:5].tolist()}


def zuko(flow: str, steps: int = 2000) -> dict[str, Any]:
    """Train ``zuko.flows.<flow>`` on two moons, 256 points a step, and draw 16,384 points."""
    import zuko as library

    torch.manual_seed(0)
    model = getattr(library.flows, flow)(features=2, transforms=3, hidden_features=[64] * 2)
    found = train(
        model.parameters(), lambda x: -model().log_prob(x).mean(), lambda _: moons(256), steps
    )
    return found | timed(lambda: model().sample((16_384,)))


def normflows_nsf(steps: int = 1000) -> dict[str, Any]:
    """Train an autoregressive spline flow of 10 transforms on two moons, 512 points a step; draw 10,000."""
    import normflows as nf

    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(10):
        layers += [nf.flows.AutoregressiveRationalQuadraticSpline(2, 2, 64)]
        layers += [nf.flows.LULinearPermute(2)]
    model = nf.NormalizingFlow(nf.distributions.base.DiagGaussian(2, trainable=False), layers)
    found = train(model.parameters(), model.forward_kld, lambda _: moons(512), steps)
    return found | timed(lambda: model.sample(10_000)[0])


def normflows_glow(steps: int = 100) -> dict[str, Any]:
    """Train a Glow of three levels on noise-like images 3x32x32, 32 a step; draw 64."""
    import normflows as nf

    torch.manual_seed(0)
    levels, blocks, hidden = 3, 8, 64
    bases, merges, flows = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        level = [
            nf.flows.GlowBlock(channels, hidden, split_mode="channel", scale=True)
            for _ in range(blocks)
        ]
        flows.append([*level, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
            shape = (3 * 2 ** (levels - i), 32 // 2 ** (levels - i), 32 // 2 ** (levels - i))
        else:
            shape = (3 * 2 ** (levels + 1), 32 // 2**levels, 32 // 2**levels)
        bases.append(nf.distributions.DiagGaussian(shape))
    model = nf.MultiscaleFlow(bases, flows, merges)
    draw = torch.Generator().manual_seed(3)
    coarse = torch.randn(256, 3, 8, 8, generator=draw)
    images = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    images = images + 0.1 * torch.randn(images.shape, generator=draw)

    def batch(i: int) -> Tensor:
        return images[(32 * i) % 256 :][:32]

    model(batch(0))  # ActNorm starts
    found = train(model.parameters(), model.forward_kld, batch, steps)
    return found | timed(lambda: model.sample(64)[0])


def freia(steps: int = 1000) -> dict[str, Any]:
    """Train eight conditional AllInOneBlocks, D = 6 given 10 numbers, 256 a step; draw 10,000."""
    import FrEIA.framework as ff
    import FrEIA.modules as fm

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - FrEIA draws its permutations from it

    def subnet(inputs: int, outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(inputs, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, 128),
            torch.nn.ReLU(),
            torch.nn.Linear(128, outputs),
        )

    model = ff.SequenceINN(6)
    for _ in range(8):
        model.append(fm.AllInOneBlock, cond=0, cond_shape=(10,), subnet_constructor=subnet)
    mix = torch.randn(10, 6)

    def loss(both: Tensor) -> Tensor:
        x, c = both[:, :6], both[:, 6:]
        z, log_det = model(x, c=[c])
        return (0.5 * z.square().sum(1) - log_det).mean()

    def batch(_: int) -> Tensor:
        c = torch.randn(256, 10)
        return torch.cat([(c @ mix).tanh() + 0.1 * torch.randn(256, 6), c], 1)

    found = train(model.parameters(), loss, batch, steps)
    c = torch.randn(10_000, 10)
    return found | timed(lambda: model(torch.randn(10_000, 6), c=[c], rev=True)[0])
