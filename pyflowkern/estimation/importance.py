"""Importance sampling: normalizers and expectations, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyflowkern.core.checks import check_callable, check_count
from pyflowkern.estimation.means import check_values

__all__ = [
    "ImportanceEstimate",
    "Proposal",
    "importance_estimate",
    "importance_sampling",
    "pareto_smoothed",
]

#: Weights that a tail has at least, below which no law is fitted to it (Vehtari et al., 2024).
_SMALLEST_TAIL = 5


class Proposal(Protocol):
    """What draws are made from: every flow is one."""

    def sample_and_log_prob(self, n: int, context: Tensor | None = None, **options: Any) -> Any:
        """Return ``n`` samples and their log-densities ``[n]``."""


@dataclass(frozen=True)
class ImportanceEstimate:
    """What importance sampling gave.

    Example:
        >>> from pyflowkern.estimation import importance_estimate
        >>> import torch
        >>> round(importance_estimate(torch.zeros(100)).effective_sample_size, 6)
        100.0
    """

    log_normalizer: float  #: log of the mean weight, in nats: that of the integral of the target
    standard_error: float  #: of the log normalizer, in nats
    effective_sample_size: float  #: so many draws from the target itself would tell as much
    pareto_k: float  #: shape of the weights' tail; above 0.7 neither estimates nor errors are to be trusted
    draws: int  #: how many weights there were
    mean: Tensor | None = None  #: ``[K]``, the expectations of the values under the target
    mean_error: Tensor | None = None  #: ``[K]``, their standard errors

    @property
    def efficiency(self) -> float:
        """The effective sample size over the number of draws, from 0 to 1."""
        return self.effective_sample_size / self.draws


def importance_estimate(log_weights: Tensor, values: Tensor | None = None) -> ImportanceEstimate:
    r"""Estimate a normalizer and expectations from the log-weights of draws.

    With draws :math:`x_i \sim q` and weights :math:`w_i = \tilde p(x_i) / q(x_i)` of an unnormalized density,

    .. math::

        \log \hat Z = \log \frac{1}{N} \sum_i w_i, \qquad
        \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad
        \hat\mu = \frac{\sum_i w_i v_i}{\sum_i w_i}.

    The errors are those of the delta method: :math:`\sqrt{(N / \mathrm{ESS} - 1) / (N - 1)}` for :math:`\log \hat Z`
    and :math:`\sqrt{\sum_i \bar w_i^2 (v_i - \hat\mu)^2}` with :math:`\bar w_i = w_i / \sum_j w_j` for the means.  Both
    are too small where the largest weights have not been seen yet, which ``pareto_k`` tells: see
    :func:`pareto_smoothed`.

    Args:
        log_weights: ``[N]`` in nats; minus infinity is a weight of nought.
        values: ``[N, K]``, what is to be averaged; None for nothing.

    Returns:
        The estimates.  Without any weight above nought the log normalizer is minus infinity and the rest NaN.

    Raises:
        TypeError: for anything but floating tensors.
        ValueError: for other shapes, no draws, or log-weights that are NaN or plus infinity.

    Source: Kong (1992) for the effective sample size; Owen, Monte Carlo theory, methods and examples (2013), chapter 9.

    Example:
        >>> from pyflowkern.estimation import importance_estimate
        >>> import torch
        >>> x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> shifted = importance_estimate(0.5 * x[:, 0] - 0.125 + 1.0, x)  # e N(0.5, 1) over N(0, 1)
        >>> abs(shifted.log_normalizer - 1) < 0.03, abs(float(shifted.mean) - 0.5) < 0.05
        (True, True)
    """
    check_values("log_weights", log_weights, 1)
    logs = log_weights.detach().double()
    if bool((logs.isnan() | (logs == math.inf)).any()):
        raise ValueError("log_weights must not be NaN or plus infinity, got some that are")
    n = len(logs)
    log_sum, log_squares = logs.logsumexp(0), (2 * logs).logsumexp(0)
    size = float((2 * log_sum - log_squares).exp())  # NaN where all weights are nought
    error = math.sqrt(max(0.0, n / size - 1) / (n - 1)) if n > 1 and size == size else math.nan
    mean = mean_error = None
    if values is not None:
        check_values("values", values, 2)
        if len(values) != n:
            raise ValueError(f"values must have {n} rows, one a weight, got {len(values)}")
        share = (logs - log_sum).exp()[:, None]
        seen = torch.where(share > 0, values.detach().double(), 0.0)  # 0 x inf is no number
        mean = (share * seen).sum(0)
        mean_error = (share * (seen - mean)).square().sum(0).sqrt()
    shape = pareto_smoothed(logs)[1] if size == size else math.nan
    return ImportanceEstimate(
        float(log_sum) - math.log(n), error, size, shape, n, mean, mean_error
    )


@torch.no_grad()
def importance_sampling(
    log_target: Callable[[Tensor], Tensor],
    proposal: Proposal,
    n: int,
    *,
    values: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 2**14,
) -> ImportanceEstimate:
    r"""Estimate :math:`\log \int \tilde p(x)\,dx`, and expectations under the target, by draws from a flow.

    Args:
        log_target: gives the log of the unnormalized density of samples, ``[N]`` in nats.
        proposal: what is drawn from: a flow, or anything with its ``sample_and_log_prob(n, generator=...)``.
        n: how many draws.
        values: gives what is to be averaged of samples, ``[N, K]``; None for nothing.
        generator: source of randomness.
        chunk: draws at a time; of each, only the weight and the values are kept.

    Returns:
        As :func:`importance_estimate`.

    Raises:
        TypeError: for an ``n`` or ``chunk`` that is no int, and results that are no floating tensors.
        ValueError: for an ``n`` or ``chunk`` below 1, results of another shape, and weights that are NaN.

    Source: Mueller et al., Neural importance sampling (2019), for flows as proposals.

    Example:
        >>> from pyflowkern.estimation import importance_sampling
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.MAF(2, transforms=1, hidden=(4,))
        >>> found = importance_sampling(lambda x: flow.log_prob(x) + 3.0, flow, 100)
        >>> round(found.log_normalizer, 3), found.draws
        (3.0, 100)
    """
    check_count("n", n)
    check_count("chunk", chunk)
    check_callable("log_target", log_target)
    if values is not None:
        check_callable("values", values)
    weights: list[Tensor] = []
    averaged: list[Tensor] = []
    for begin in range(0, n, chunk):
        size = min(chunk, n - begin)
        x, log_q = proposal.sample_and_log_prob(size, generator=generator)
        log_p = log_target(x)
        check_values("log_target(x)", log_p, 1)
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"log_target(x) must have shape {tuple(log_q.shape)}, got {tuple(log_p.shape)}"
            )
        weights.append(log_p.double() - log_q.double())
        if values is not None:
            averaged.append(values(x))
    return importance_estimate(torch.cat(weights), torch.cat(averaged) if averaged else None)


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Smooth the largest weights, and return the shape :math:`\hat k` of their tail.

    A generalized Pareto law is fitted to the :math:`M = \min(N / 5, 3 \sqrt N)` largest weights, which are replaced by
    its quantiles at :math:`(j - 1/2) / M` and cut at the largest raw weight.  Moments of order :math:`1 / k` and more
    do not exist: from :math:`k = 1/2` on the variance of the weights is infinite, above 0.7 far more draws than
    anyone has would be needed, and the proposal must be made better.

    Args:
        log_weights: ``[N]`` in nats.

    Returns:
        ``(smoothed, k)``: the log-weights, float64 ``[N]``, and the shape; ``(the same, NaN)`` for fewer than 25
        weights, too few for a tail, and ``(the same, -inf)`` where the largest weights are all equal.

    Raises:
        TypeError: for anything but a floating tensor.
        ValueError: for another shape, and for no weights.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling (2024); Zhang and Stephens
    (2009) for the fit.

    Example:
        >>> from pyflowkern.estimation import pareto_smoothed
        >>> import torch
        >>> u = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).double()
        >>> k = pareto_smoothed(-0.5 * u.log())[1]  # weights u^(-1/2): a tail of shape 1/2
        >>> abs(k - 0.5) < 0.1
        True
    """
    check_values("log_weights", log_weights, 1)
    logs = log_weights.detach().double()
    n = len(logs)
    tail = int(min(n / 5, 3 * math.sqrt(n)))
    if tail < _SMALLEST_TAIL:
        return logs, math.nan
    places = logs.argsort()
    highest, cut = logs[places[-1]], logs[places[-tail - 1]]
    scaled = (logs[places[-tail:]] - highest).exp()  # ascending, the largest is 1
    excess = scaled - (cut - highest).exp()
    if not bool(excess[0] >= 0) or float(excess[-1] - excess[0]) <= 1e-12:
        return logs, -math.inf  # nothing rises above the rest
    shape, scale = _fit_pareto(excess.clamp_min(1e-300))
    uniform = (torch.arange(tail, dtype=logs.dtype, device=logs.device) + 0.5) / tail
    if abs(shape) > 1e-10:
        quantiles = torch.expm1(-shape * torch.log1p(-uniform)) * (scale / shape)
    else:
        quantiles = -scale * torch.log1p(-uniform)
    smoothed = logs.clone()
    drawn = (quantiles + (cut - highest).exp()).log() + highest
    smoothed[places[-tail:]] = drawn.clamp_max(float(highest))
    return smoothed, shape


def _fit_pareto(excess: Tensor) -> tuple[float, float]:
    """Return shape and scale of a generalized Pareto law for excesses in ascending order.

    Zhang and Stephens' posterior mean over a grid of b = -k / scale, of which k has a closed form; then Vehtari's
    weak prior, ten draws' worth at k = 1/2.
    """
    n = len(excess)
    points = 30 + int(math.sqrt(n))
    grid = torch.arange(1, points + 1, dtype=excess.dtype, device=excess.device)
    quarter = excess[int(n / 4 + 0.5) - 1]
    b = 1 / excess[-1] + (1 - (points / (grid - 0.5)).sqrt()) / (3 * quarter)
    shapes = torch.log1p(-b[:, None] * excess).mean(1)
    likelihood = n * ((-b / shapes).log() - shapes - 1)
    weight = likelihood.nan_to_num(-math.inf).softmax(0)
    chosen = float((b * weight).sum())
    shape = float(torch.log1p(-chosen * excess).mean())
    scale = -shape / chosen
    return (n * shape + 10 * 0.5) / (n + 10), scale
