r"""What the methods for bridges are made of: steps of the SDE, and the regressions that are their losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.draws import uniform_like
from pyflowkern.core.dtypes import cast
from pyflowkern.nn import VectorFieldMLP
from pyflowkern.transport.matchers import SchrodingerBridgeConditionalFlowMatcher

__all__ = ["Drift", "Regression", "matched", "mean_matching", "regression_loss", "walk"]

#: A drift or a velocity, of a time and of points ``[N, *shape]``.
Drift = Callable[[Tensor | float, Tensor], Tensor]
#: Times are kept this part of an interval from its ends, where the targets have infinite variance.
MARGIN = 1e-3


class Regression(NamedTuple):
    """A network is to be ``target`` at ``(t, x)``, once multiplied by ``scale``.

    Attributes:
        network: its name.
        t: times ``[N]``; ``x``: points ``[N, *shape]``; ``target``: ``[N, *shape]``.
        weight: of the squared error, broadcasts over ``target``.
        scale: of the network's output, broadcasts over ``target``.
    """

    network: str
    t: Tensor
    x: Tensor
    target: Tensor
    weight: Tensor | float = 1.0
    scale: Tensor | float = 1.0

    def loss(self, output: Tensor) -> Tensor:
        """Return the weighted mean squared error of what the network gave at ``(t, x)``."""
        return (self.weight * (self.scale * output - self.target).square()).mean()


def regression_loss(network: Drift, terms: list[Regression]) -> Tensor:
    """Return the sum of the losses of a network's regressions, for which it is called once."""
    if len(terms) == 1:
        term = terms[0]
        if isinstance(network, VectorFieldMLP):  # which has the gradients from one pass
            return network.squared_error(
                term.t, term.x, term.target, scale=term.scale, weight=term.weight
            )
        return term.loss(network(term.t, term.x))
    outputs = network(torch.cat([term.t for term in terms]), torch.cat([term.x for term in terms]))
    parts = outputs.split([len(term.x) for term in terms])
    return torch.stack([term.loss(y) for term, y in zip(terms, parts, strict=True)]).sum()


def walk(
    drift: Drift, x: Tensor, times: list[float], sigma: float, seed: Tensor, *, heun: bool = False
) -> Iterator[Tensor]:
    r"""Yield the points after each step of :math:`dX = u\,dt + \sigma\,dW`.

    Falling times run the process backward.  Heun's method takes the mean of the drifts at both ends of a step.
    """
    for k, (t, after) in enumerate(itertools.pairwise(times)):
        # autocast may have made the drift a half
        slope, step = cast(drift(t, x), x.dtype), partial(ops.euler_maruyama, index=k, seed=seed)
        ahead = step(x, slope, after - t, sigma)
        if heun:
            other = cast(drift(after, ahead), x.dtype)
            ahead = step(x, slope, after - t, sigma, other=other)
        x = ahead
        yield x


def matched(
    network: str,
    x0: Tensor,
    x1: Tensor,
    start: float,
    end: float,
    sigma: float,
    generator: torch.Generator | None,
) -> list[Regression]:
    r"""Return the regressions of a network, or of "velocity" and "score", on Brownian bridges between pairs.

    With :math:`h` the length of the interval, :math:`s` the part of it that has passed and
    :math:`w = \sigma \sqrt{h s (1 - s)}` the width of a bridge, a point is :math:`x = (1 - s) x_0 + s x_1 + w z`.
    There the velocity of the bridge is :math:`v` (of :class:`SchrodingerBridgeConditionalFlowMatcher`) and half of
    :math:`\sigma^2` times its score :math:`-\sigma^2 z / 2w`; the drifts forward and backward are their sum and
    their difference.
    """
    h = end - start
    s = uniform_like(x0, (len(x0),), generator)
    s = MARGIN + (1 - 2 * MARGIN) * s
    matcher = SchrodingerBridgeConditionalFlowMatcher(sigma * math.sqrt(h), ot_method=None)
    _, x, u, z = matcher.sample_location_and_conditional_flow(
        x0, x1, s, return_noise=True, generator=generator
    )
    t, velocity = start + h * s, u / h
    s = s.view(-1, *[1] * (x.dim() - 1))
    width = sigma * (h * s * (1 - s)).sqrt()
    variance = sigma**2 * h  # of the whole interval
    if network == "velocity":
        weight = 1 / (1 + variance * (1 - 2 * s).square() / (4 * s * (1 - s)))
        return [
            Regression("velocity", t, x, velocity, weight),
            Regression("score", t, x, -z, scale=2 * width / sigma**2),
        ]
    half = z * (sigma**2 / (2 * width))
    # weights are the inverse of the variance of a target whose ends are as far apart as 1
    if network == "forward":
        return [Regression(network, t, x, velocity - half, 1 / (1 + variance * s / (1 - s)))]
    return [Regression(network, t, x, velocity + half, 1 / (1 + variance * (1 - s) / s))]


@torch.no_grad()
def mean_matching(
    drift: Drift, x: Tensor, times: list[float], sigma: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Run a drift, and return what the drift of the reversed process should be at each point of the paths.

    A step :math:`X' = X + u(t, X)\,\delta + \sigma \sqrt{|\delta|}\,z` gives the target
    :math:`u(t, X') \pm \sigma z / \sqrt{|\delta|}` at :math:`(t', X')`, with plus for rising times.

    Returns:
        Times ``[steps * N]``, points and targets ``[steps * N, *shape]``.
    """
    points, targets = [], []
    for k, ahead in enumerate(walk(drift, x, times, sigma, seed)):
        dt = times[k + 1] - times[k]
        size = math.copysign(sigma / math.sqrt(abs(dt)), dt)
        points.append(ahead)
        slope = cast(drift(times[k], ahead), x.dtype)
        targets.append(ops.add_noise(slope, size, index=k, seed=seed))
    at = x.new_tensor(times[1:]).repeat_interleave(len(x))
    return at, torch.cat(points), torch.cat(targets)
