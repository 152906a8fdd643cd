r"""Conditional flow matching: a random point on a random path, and the velocity that a field should have there.

A field :math:`v(t, x)` learned by the squared error from ``ut`` at ``(t, xt)`` moves the law of ``x0`` at time 0 to
that of ``x1`` at time 1.  The matchers differ in how ``x0`` and ``x1`` are paired and in the path between them,
:math:`N(\mu_t, \sigma_t^2)`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import (
    check_flag,
    check_floating,
    check_generator,
    check_number,
    check_shape,
)
from pyflowkern.core.draws import normal_like, uniform_like
from pyflowkern.transport._arguments import check_pair, positive
from pyflowkern.transport.samplers import OTPlanSampler

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "SchrodingerBridgeConditionalFlowMatcher",
    "SinkhornOptimalTransportConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
]


class ConditionalFlowMatcher:
    r"""Straight paths between pairs as they are given: :math:`\mu_t = (1 - t) x_0 + t x_1`, :math:`u_t = x_1 - x_0`.

    Args:
        sigma: the standard deviation around the path, at all times.

    Raises:
        TypeError: for a sigma that is no number.
        ValueError: for a negative one.

    Source: Tong et al. (2024), I-CFM; Liu, Gong and Liu (2023); Albergo and Vanden-Eijnden (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.ConditionalFlowMatcher(sigma=0.1)
        >>> x0, x1 = torch.randn(8, 2), torch.randn(8, 2) + 4
        >>> t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        >>> tuple(t.shape), tuple(xt.shape), tuple(ut.shape)
        ((8,), (8, 2), (8, 2))
    """

    def __init__(self, sigma: float = 0.0) -> None:
        number = check_number("sigma", sigma)
        if not 0 <= number < math.inf:
            raise ValueError(f"sigma must be zero or positive, and finite, got {sigma}")
        self.sigma = number

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """Return the mean of the path at times ``t``, ``[N, *shape]``."""
        return torch.lerp(x0, x1, _like(t, x0))

    def compute_sigma_t(self, t: Any) -> Any:
        """Return the standard deviation of the path at times ``t``: a number, or a tensor of the shape of ``t``."""
        return self.sigma

    def compute_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: float | Tensor, xt: Tensor
    ) -> Tensor:
        """Return the velocity at ``xt``, ``[N, *shape]``."""
        return x1 - x0

    def compute_lambda(self, t: Any) -> Any:
        r"""Return :math:`2 \sigma_t / \sigma^2`, the weight of a score network in ``(lambda * s + eps)**2``.

        The network then estimates :math:`\tfrac12 \sigma^2 \nabla \log p_t`.
        """
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)

    def sample_xt(self, x0: Tensor, x1: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Return the points of the paths at times ``t`` ``[N]`` with the noise ``epsilon`` ``[N, *shape]``."""
        width, mean = self.compute_sigma_t(t), self.compute_mu_t(x0, x1, t)
        if not isinstance(width, Tensor):
            return torch.add(mean, epsilon, alpha=width) if width else mean
        return mean + _like(width, x0) * epsilon

    def sample_noise_like(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard normal noise of the shape of ``x``."""
        check_generator(generator)
        return normal_like(x, x.shape, generator)

    def sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        t: Tensor | None = None,
        return_noise: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """Return times, points there and the velocities that a field should have: ``t``, ``xt``, ``ut``.

        Args:
            x0: samples of the source, ``[N, *shape]``.
            x1: samples of the target, ``[N, *shape]``.
            t: times ``[N]``; drawn from the uniform distribution on [0, 1) if None.
            return_noise: whether the noise follows as a fourth tensor.
            generator: the source of random numbers, on the device of the samples.

        Returns:
            ``t`` ``[N]``, ``xt`` ``[N, *shape]``, ``ut`` ``[N, *shape]``, and the noise if wanted.

        Raises:
            TypeError: for tensors that are not floating or of two dtypes.
            ValueError: for shapes that do not fit.
        """
        x0, x1, _ = self._paired(x0, x1, generator)
        return self._located(x0, x1, t, return_noise, generator)

    def _paired(
        self, x0: Tensor, x1: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return the pairs, and their indices unless they are as given."""
        check_pair(x0, x1)
        if len(x0) != len(x1):
            raise ValueError(f"x0 and x1 must have as many samples, got {len(x0)} and {len(x1)}")
        return x0, x1, None

    def _located(
        self,
        x0: Tensor,
        x1: Tensor,
        t: Tensor | None,
        return_noise: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, ...]:
        check_generator(generator)
        check_flag("return_noise", return_noise)
        if t is None:
            t = uniform_like(x0, (len(x0),), generator)
        else:
            check_floating("t", t)
            check_shape("t", t, (len(x0),))
            t = t.to(x0)
        noise = self.sample_noise_like(x0, generator=generator)
        xt = self.sample_xt(x0, x1, t, noise)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, noise) if return_noise else (t, xt, ut)


class _Coupled(ConditionalFlowMatcher):
    """A matcher that pairs the samples of a batch anew, by a plan."""

    def __init__(self, sigma: float, sampler: OTPlanSampler | None, replace: bool) -> None:
        super().__init__(sigma)
        self.ot_sampler = sampler
        self.replace = check_flag("replace", replace)

    def _paired(
        self, x0: Tensor, x1: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        if self.ot_sampler is None:
            return super()._paired(x0, x1, generator)
        i, j = self.ot_sampler.pairs(x0, x1, self.replace, generator=generator)
        return x0[i], x1[j], (i, j)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        t: Tensor | None = None,
        return_noise: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return ``t``, ``xt``, ``ut``, ``y0``, ``y1`` and the noise if wanted: labels go where their samples go.

        Args:
            x0: samples of the source, ``[N, *shape]``.
            x1: samples of the target, ``[N, *shape]``.
            y0: labels of ``x0``, ``[N, ...]``, or None.
            y1: labels of ``x1``, likewise.
            t: as in :meth:`sample_location_and_conditional_flow`, and so are the others.
            return_noise: see there.
            generator: see there.
        """
        x0, x1, indices = self._paired(x0, x1, generator)
        if indices is not None:
            y0 = None if y0 is None else y0[indices[0]]
            y1 = None if y1 is None else y1[indices[1]]
        t, xt, ut, *noise = self._located(x0, x1, t, return_noise, generator)
        return t, xt, ut, y0, y1, *noise


class ExactOptimalTransportConditionalFlowMatcher(_Coupled):
    r"""Straight paths between pairs of the exact plan of each batch, :math:`\mu_t = (1 - t) x_0 + t x_1`.

    Args:
        sigma: as in :class:`ConditionalFlowMatcher`.
        replace: draw pairs from the plan; if False, every sample of ``x0`` is in one pair, in its order.

    Raises:
        TypeError, ValueError: as :class:`ConditionalFlowMatcher`.

    Source: Tong et al. (2024), OT-CFM; Pooladian et al. (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.ExactOptimalTransportConditionalFlowMatcher(replace=False)
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> matcher.sample_location_and_conditional_flow(x, x.flip(0) + 5)[2].tolist()
        [[5.0], [5.0]]
    """

    def __init__(self, sigma: float = 0.0, *, replace: bool = True) -> None:
        super().__init__(sigma, OTPlanSampler("exact"), replace)


class SinkhornOptimalTransportConditionalFlowMatcher(_Coupled):
    r"""Straight paths between pairs of the entropic plan of each batch; stays on the device.

    Args:
        sigma: as in :class:`ConditionalFlowMatcher`.
        reg: the weight of the entropy, in units of the squared distance.
        normalize_cost: as in :class:`OTPlanSampler`.
        replace: as in :class:`ExactOptimalTransportConditionalFlowMatcher`.

    Raises:
        TypeError, ValueError: as :class:`ConditionalFlowMatcher`.

    Source: Tong et al. (2024); Cuturi (2013).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.SinkhornOptimalTransportConditionalFlowMatcher(reg=0.01)
        >>> t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn(8, 2), torch.randn(8, 2))
        >>> tuple(ut.shape)
        (8, 2)
    """

    def __init__(
        self,
        sigma: float = 0.0,
        reg: float = 0.05,
        *,
        normalize_cost: bool | str = False,
        replace: bool = True,
    ) -> None:
        sampler = OTPlanSampler("sinkhorn", reg, normalize_cost=normalize_cost)
        super().__init__(sigma, sampler, replace)


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    r"""Paths from a standard normal to each target: :math:`\mu_t = t x_1`, :math:`\sigma_t = 1 - (1 - \sigma) t`.

    ``x0`` gives a shape alone.

    Args:
        sigma: the standard deviation around the target at time 1.

    Raises:
        TypeError, ValueError: as :class:`ConditionalFlowMatcher`.

    Source: Lipman, Chen, Ben-Hamu, Nickel and Le (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.TargetConditionalFlowMatcher(sigma=0.1)
        >>> matcher.compute_sigma_t(0.0)
        1.0
    """

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """Return ``t x1``."""
        return _like(t, x1) * x1

    def compute_sigma_t(self, t: Any) -> Any:
        """Return ``1 - (1 - sigma) t``."""
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: float | Tensor, xt: Tensor
    ) -> Tensor:
        """Return ``(x1 - (1 - sigma) xt) / (1 - (1 - sigma) t)``."""
        t = _like(t, x1)
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * t)


class SchrodingerBridgeConditionalFlowMatcher(_Coupled):
    r"""Brownian bridges between pairs of an entropic plan: :math:`\sigma_t = \sigma \sqrt{t (1 - t)}`.

    The plan is that of the Schrödinger bridge with ``ot_method="sinkhorn"``, whose epsilon is :math:`2 \sigma^2`.

    Args:
        sigma: the volatility of the bridge, positive.
        ot_method: of :class:`OTPlanSampler`, with ``reg = 2 sigma**2``; None takes pairs as they are given.
        replace: as in :class:`ExactOptimalTransportConditionalFlowMatcher`.

    Raises:
        TypeError: for a sigma that is no number.
        ValueError: for one that is not positive, or another method.

    Source: Tong et al. (2024), SB-CFM; Tong et al. (2024), simulation-free bridges by score and flow matching.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.SchrodingerBridgeConditionalFlowMatcher(sigma=0.5, ot_method="sinkhorn")
        >>> x0, x1 = torch.randn(8, 2), torch.randn(8, 2)
        >>> t, xt, ut, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
        >>> tuple(matcher.compute_lambda(t).shape)
        (8,)
    """

    def __init__(
        self, sigma: float = 1.0, ot_method: str | None = "exact", *, replace: bool = True
    ) -> None:
        sigma = positive("sigma", sigma)
        if sigma < 1e-3:
            warnings.warn("a sigma this small makes velocities near both ends huge", stacklevel=2)
        sampler = None if ot_method is None else OTPlanSampler(ot_method, 2 * sigma**2)
        super().__init__(sigma, sampler, replace)

    def compute_sigma_t(self, t: Any) -> Any:
        """Return ``sigma sqrt(t (1 - t))``."""
        return self.sigma * (t * (1 - t)) ** 0.5

    def compute_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: float | Tensor, xt: Tensor
    ) -> Tensor:
        """Return ``(1 - 2t) / (2t (1 - t)) (xt - mu_t) + x1 - x0``."""
        mean, t = self.compute_mu_t(x0, x1, t), _like(t, x0)
        return (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * (xt - mean) + x1 - x0


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    r"""Paths on circles: :math:`\mu_t = \cos(\tfrac{\pi}{2} t) x_0 + \sin(\tfrac{\pi}{2} t) x_1`.

    Args:
        sigma: as in :class:`ConditionalFlowMatcher`.

    Raises:
        TypeError, ValueError: as :class:`ConditionalFlowMatcher`.

    Source: Albergo and Vanden-Eijnden (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> matcher = transport.VariancePreservingConditionalFlowMatcher()
        >>> t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn(8, 2), torch.randn(8, 2))
        >>> tuple(ut.shape)
        (8, 2)
    """

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: float | Tensor) -> Tensor:
        """Return ``cos(pi t / 2) x0 + sin(pi t / 2) x1``."""
        angle = math.pi / 2 * _like(t, x0)
        return angle.cos() * x0 + angle.sin() * x1

    def compute_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: float | Tensor, xt: Tensor
    ) -> Tensor:
        """Return ``pi / 2 (cos(pi t / 2) x1 - sin(pi t / 2) x0)``."""
        angle = math.pi / 2 * _like(t, x0)
        return math.pi / 2 * (angle.cos() * x1 - angle.sin() * x0)


def _like(t: Any, x: Tensor) -> Tensor:
    """Return times as a tensor that broadcasts over samples ``[N, *shape]``."""
    if not isinstance(t, Tensor):
        return x.new_tensor(float(t))
    return t if t.dim() == 0 else t.reshape(-1, *[1] * (x.dim() - 1))
