"""Bounds of a likelihood that is an integral over noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_generator
from pyflowkern.estimation.means import Estimate, mean_with_error

__all__ = ["LikelihoodBounds", "Noisy", "likelihood_bounds"]


class Noisy(Protocol):
    """A model whose log-density of integers draws noise: flows made with ``bits``."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """Return ``[N]`` in nats."""


@dataclass(frozen=True)
class LikelihoodBounds:
    """Two bounds from below of the log-probability of each row.

    Example:
        >>> from pyflowkern.estimation import LikelihoodBounds
        >>> import torch
        >>> LikelihoodBounds(torch.tensor([-3.0, -5.0]), torch.tensor([-2.0, -4.0]), 8, 2).mean_iwbo.value
        -3.0
    """

    elbo: Tensor  #: ``[N]`` in nats: the mean over draws of the log-density
    #: ``[N]`` in nats: the log of the mean over draws of the density, which is closer
    iwbo: Tensor
    draws: int  #: how many draws of noise each row had
    dims: int  #: numbers in a row

    @property
    def mean_elbo(self) -> Estimate:
        """The mean over rows and its standard error, in nats."""
        return mean_with_error(self.elbo)

    @property
    def mean_iwbo(self) -> Estimate:
        """The mean over rows and its standard error, in nats."""
        return mean_with_error(self.iwbo)

    @property
    def bits_per_dim(self) -> Estimate:
        """The mean of the closer bound in bits a dimension, in which it is one from above, and its standard error."""
        return mean_with_error(-self.iwbo / (self.dims * math.log(2)))


@torch.no_grad()
def likelihood_bounds(
    flow: Noisy,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: int = 16,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> LikelihoodBounds:
    r"""Bound the log-probability of integers under a flow that dequantizes them.

    A flow's density :math:`p` of reals gives integers the probability :math:`P(x) = \int_{[0,1)^D} p(x + u)\,du`, which
    no network gives exactly.  With :math:`k` draws of uniform noise

    .. math::

        \mathrm{ELBO} = \frac{1}{k} \sum_{j=1}^{k} \log p(x + u_j)
        \;\le\; \mathrm{IWBO}_k = \log \frac{1}{k} \sum_{j=1}^{k} p(x + u_j),

    and :math:`E[\mathrm{ELBO}] = E[\mathrm{IWBO}_1] \le E[\mathrm{IWBO}_k] \le E[\mathrm{IWBO}_{k+1}] \le \log P(x)`,
    with equality in the limit.  A single call of ``flow.log_prob`` is the ELBO of one draw, which is what papers
    mostly state.  Call ``flow.eval()`` first.  Of continuous flows with random probes the traces draw noise, too, of
    the log-density and not of the density: only with exact traces is the IWBO a bound.

    Args:
        flow: a flow made with ``bits``, or any model whose ``log_prob(x)`` draws noise from torch's generator.
        x: the integers, uint8 ``[N, ...]``.
        context: ``[N, K]``, or None.
        draws: of noise a row, :math:`k`.
        generator: decides the noise, with ``chunk``; torch's own generators stay as they are.
        chunk: rows times draws in one call of the flow.

    Returns:
        Both bounds of each row, float64.

    Raises:
        TypeError: for an ``x`` that is not uint8, a context that is no tensor, and counts that are no ints.
        ValueError: for no rows, a context with another number of rows, counts below 1, and as ``flow.log_prob``.

    Source: Theis, van den Oord and Bethge (2016); Burda, Grosse and Salakhutdinov (2016); Ho et al., Flow++ (2019).

    Example:
        >>> from pyflowkern.estimation import likelihood_bounds
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.RealNVP((1, 4, 4), steps=1, hidden=4, bits=3)
        >>> x = torch.randint(0, 8, (5, 1, 4, 4), dtype=torch.uint8)
        >>> bounds = likelihood_bounds(flow, x, draws=8)
        >>> bounds.iwbo.shape, bool((bounds.iwbo >= bounds.elbo).all())
        (torch.Size([5]), True)
    """
    draws, chunk = check_count("draws", draws), check_count("chunk", chunk)
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a uint8 tensor of integers, got {kind}")
    if x.dim() < 2 or not len(x):
        raise ValueError(f"x must have shape [N, ...] with N at least 1, got {tuple(x.shape)}")
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"context must be a tensor, got {type(context).__name__}")
    if context is not None and len(context) != len(x):
        raise ValueError(f"context must have {len(x)} rows, one a row of x, got {len(context)}")
    rows = max(1, chunk // draws)
    elbo, iwbo = [], []
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        seed = torch.randint(2**62, (), generator=generator, device=check_generator(generator))
        torch.manual_seed(int(seed))
        for begin in range(0, len(x), rows):
            some = slice(begin, begin + rows)
            logs = _noisy(flow, x[some], None if context is None else context[some], draws, chunk)
            elbo.append(logs.mean(1))
            iwbo.append(logs.logsumexp(1) - math.log(draws))
    return LikelihoodBounds(torch.cat(elbo), torch.cat(iwbo), draws, math.prod(x.shape[1:]))


def _noisy(flow: Noisy, x: Tensor, context: Tensor | None, draws: int, chunk: int) -> Tensor:
    """Return the log-densities of each row under so many draws of noise, ``[N, draws]`` float64."""
    parts = []
    at_once = max(1, min(draws, chunk // len(x)))
    for begin in range(0, draws, at_once):
        k = min(at_once, draws - begin)
        given = () if context is None else (context.repeat_interleave(k, 0),)
        parts.append(flow.log_prob(x.repeat_interleave(k, 0), *given).double().reshape(len(x), k))
    return torch.cat(parts, 1)
