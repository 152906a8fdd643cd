r"""Processes between two Gaussians in closed form, in float64: what learned ones can be compared with.

Between :math:`N(m_0, A)` and :math:`N(m_1, B)` lies a Gaussian process with a coupling :math:`C = \mathrm{Cov}(x_0,
x_1)` of its ends and a Brownian bridge of volatility :math:`\sigma` in between:

.. math:: m_t = (1 - t) m_0 + t m_1, \qquad
          \Sigma_t = (1 - t)^2 A + t^2 B + t (1 - t) (C + C^\top + \sigma^2 I).

Its drift, that of the Markov process with these marginals, is
:math:`u = m_1 - m_0 + K_t \Sigma_t^{-1} (x - m_t)` with
:math:`K_t = t (B - \sigma^2 I) - (1 - t) A + (1 - t) C^\top - t C`.  It is the mean of :math:`(x_1 - x) / (1 - t)`
given :math:`x`, written so that :math:`t = 1` is no exception.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_floating, check_generator, check_number
from pyflowkern.core.draws import normal_like
from pyflowkern.transport._arguments import positive

__all__ = ["GaussianBridge", "GaussianPath", "gaussian_bridge", "independent_gaussian_path"]


class GaussianPath:
    r"""A Gaussian process on :math:`[0, 1]` with given ends, coupling and volatility.

    .. math:: m_t = (1 - t) m_0 + t m_1, \qquad
              \Sigma_t = (1 - t)^2 A + t^2 B + t (1 - t) (C + C^\top + \sigma^2 I)

    are mean and covariance at the time ``t``, for the coupling :math:`C = \mathrm{Cov}(x_0, x_1)`.  Made by
    :func:`independent_gaussian_path`; :class:`GaussianBridge` is one, too.

    Args:
        mean0: ``[d]``; ``cov0``: ``[d, d]``, positive definite.
        mean1: ``[d]``; ``cov1``: ``[d, d]``, positive definite.
        coupling_covariance: :math:`C`, ``[d, d]``.
        sigma: the volatility, 0 or more.

    Raises:
        TypeError: for what is no floating tensor.
        ValueError: as :func:`gaussian_bridge`, and for a coupling of another shape.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> one = torch.eye(2)
        >>> path = transport.independent_gaussian_path(torch.zeros(2), one, torch.ones(2), one)
        >>> mean, cov = path.marginal(0.5)
        >>> mean.tolist(), cov.tolist()
        ([0.5, 0.5], [[0.5, 0.0], [0.0, 0.5]])
    """

    def __init__(
        self,
        mean0: Tensor,
        cov0: Tensor,
        mean1: Tensor,
        cov1: Tensor,
        coupling_covariance: Tensor,
        sigma: float,
    ) -> None:
        gaussians = _parse(mean0, cov0, mean1, cov1)
        self.mean0, self.cov0, self.mean1, self.cov1 = gaussians
        check_floating("coupling_covariance", coupling_covariance)
        if coupling_covariance.shape != self.cov0.shape:
            raise ValueError(
                f"coupling_covariance must have shape {tuple(self.cov0.shape)}, "
                f"got {tuple(coupling_covariance.shape)}"
            )
        self.coupling_covariance = coupling_covariance.detach().double()
        self.sigma = _volatility(sigma)
        self._identity = torch.eye(len(self.mean0), dtype=torch.float64, device=self.mean0.device)

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance at time ``t``: ``[d]`` and ``[d, d]``, or ``[N, d]`` and ``[N, d, d]`` of ``[N]``.

        Raises:
            ValueError: for times outside of [0, 1].
        """
        t = self._times(t)
        s = t[..., None]
        both = self.coupling_covariance + self.coupling_covariance.mT
        between = both + self.sigma**2 * self._identity
        mean = (1 - s) * self.mean0 + s * self.mean1
        s = s[..., None]
        cov = (1 - s) ** 2 * self.cov0 + s**2 * self.cov1 + s * (1 - s) * between
        return mean, cov

    def drift(self, t: float | Tensor, x: Tensor) -> Tensor:
        r"""Return the drift of :math:`dX = u\,dt + \sigma\,dW`, ``[N, d]``, of the dtype of ``x`` ``[N, d]``."""
        s = self._times(t)[..., None, None]
        c = self.coupling_covariance
        gain = s * (self.cov1 - self.sigma**2 * self._identity) - (1 - s) * self.cov0
        return self._field(t, x, gain + (1 - s) * c.mT - s * c)

    def backward_drift(self, t: float | Tensor, x: Tensor) -> Tensor:
        r"""Return the drift of the process run backward, :math:`u - \sigma^2 \nabla \log p_t`.

        From time 1 to 0 it takes steps :math:`x - u_b\,dt + \sigma\sqrt{dt}\,\varepsilon`.
        """
        return self.drift(t, x) - self.sigma**2 * self.score(t, x)

    def probability_flow(self, t: float | Tensor, x: Tensor) -> Tensor:
        r"""Return the velocity of the ODE with the same marginals, :math:`u - \tfrac12 \sigma^2 \nabla \log p_t`."""
        return self.drift(t, x) - self.sigma**2 / 2 * self.score(t, x)

    def score(self, t: float | Tensor, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla \log p_t(x) = -\Sigma_t^{-1} (x - m_t)`, ``[N, d]``."""
        return self._solved(t, x).neg().to(x.dtype)

    def log_prob(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Return the log-density of the marginal at time ``t``, ``[N]``, float64."""
        cov = self.marginal(t)[1]
        centred = self._centred(t, x)
        quadratic = (centred * self._solved(t, x)).sum(-1)
        return -(quadratic + torch.logdet(cov) + x.shape[-1] * math.log(2 * math.pi)) / 2

    def sample(
        self,
        start: int | Tensor,
        steps: int = 100,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw paths at ``steps + 1`` equal times; exact, however few.

        The end is drawn given the start, then each point given the one before and the end.

        Args:
            start: how many paths, or the first points ``[N, d]``.
            steps: how many.
            generator: the source of random numbers.

        Returns:
            ``[steps + 1, N, d]``, of the dtype of ``start``, or float64.

        Raises:
            TypeError: for counts that are no ints.
            ValueError: for counts below 1, or points of another shape.
        """
        steps = check_count("steps", steps)
        check_generator(generator)
        if isinstance(start, Tensor):
            self._check_points(start)
            dtype, x0 = start.dtype, start.double()
        else:
            dtype = torch.float64
            noise = self._noise(check_count("start", start), generator)
            x0 = self.mean0 + noise @ _root(self.cov0)
        back = torch.linalg.solve(self.cov0, self.coupling_covariance)  # A^-1 C
        spread = self.cov1 - self.coupling_covariance.mT @ back
        ends = self.mean1 + (x0 - self.mean0) @ back
        ends = ends + self._noise(len(x0), generator) @ _root(spread)
        path = [x0]
        for k in range(1, steps):
            left = steps - k + 1  # steps to the end from the last point
            noise = self._noise(len(x0), generator)
            width = self.sigma * math.sqrt((left - 1) / left / steps)
            path.append(path[-1] + (ends - path[-1]) / left + width * noise)
        return torch.stack([*path, ends]).to(dtype)

    def _noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        return normal_like(self.mean0, (n, len(self.mean0)), generator)

    def _times(self, t: float | Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.tensor(check_number("t", t), dtype=torch.float64)
        if t.dim() > 1:
            raise ValueError(f"t must be a number or have shape [N], got {tuple(t.shape)}")
        t = t.to(self.mean0)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError("t must be between 0 and 1")
        return t

    def _check_points(self, x: Tensor) -> None:
        check_floating("x", x)
        if x.dim() != 2 or x.shape[1] != len(self.mean0):
            raise ValueError(f"x must have shape [N, {len(self.mean0)}], got {tuple(x.shape)}")

    def _centred(self, t: float | Tensor, x: Tensor) -> Tensor:
        self._check_points(x)
        mean = self.marginal(t)[0]
        if mean.dim() == 2 and len(mean) != len(x):
            raise ValueError(f"t must be a number or have shape [{len(x)}], got [{len(mean)}]")
        return x.double() - mean

    def _solved(self, t: float | Tensor, x: Tensor) -> Tensor:
        cov, centred = self.marginal(t)[1], self._centred(t, x)
        columns = centred.mT if cov.dim() == 2 else centred[..., None]
        solved: Tensor = torch.linalg.solve(cov, columns)
        return solved.mT if cov.dim() == 2 else solved[..., 0]

    def _field(self, t: float | Tensor, x: Tensor, gain: Tensor) -> Tensor:
        solved = self._solved(t, x)
        moved = (gain @ solved[..., None])[..., 0] if gain.dim() == 3 else solved @ gain.mT
        return (self.mean1 - self.mean0 + moved).to(x.dtype)


class GaussianBridge(GaussianPath):
    r"""The Schrödinger bridge between two Gaussians; made by :func:`gaussian_bridge`.

    Attributes:
        coupling_covariance: :math:`\mathrm{Cov}(x_0, x_1)` of the bridge, ``[d, d]``.
        cost: of the coupling, by the squared distance: :math:`\min_P E|x_0 - x_1|^2 + 2 \sigma^2 \mathrm{KL}(P \,|\,
            N_0 \otimes N_1)`, float64.
        transport_cost: its :math:`E|x_0 - x_1|^2`.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> one = torch.eye(1)
        >>> bridge = transport.gaussian_bridge(torch.zeros(1), one, torch.zeros(1), one, sigma=1.0)
        >>> round(float(bridge.coupling_covariance), 6)  # the golden ratio
        0.618034
    """

    def __init__(
        self, mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor, sigma: float
    ) -> None:
        mean0, cov0, mean1, cov1 = _parse(mean0, cov0, mean1, cov1)
        sigma = _volatility(sigma)
        root, inverse = _root(cov0), _root(cov0, -0.5)
        values, vectors = torch.linalg.eigh(root @ cov1 @ root)
        width = sigma**2
        d = (4 * values.clamp(min=0) + width**2).sqrt()
        # (d - sigma^2) / 2, which loses no digits where sigma is large
        half = 2 * values.clamp(min=0) / (d + width)
        coupling = root @ (vectors * half) @ vectors.mT @ inverse
        super().__init__(mean0, cov0, mean1, cov1, coupling, sigma)
        shift = (mean1 - mean0).square().sum() + cov0.trace() + cov1.trace()
        self.transport_cost = shift - 2 * half.sum()
        self.cost = shift - d.sum()
        if sigma > 0:
            entropy = len(mean0) * (1 - math.log(2 * width)) + (d + width).log().sum()
            self.cost = self.cost + width * entropy


def gaussian_bridge(
    mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor, *, sigma: float
) -> GaussianBridge:
    r"""Return the Schrödinger bridge between :math:`N(m_0, A)` and :math:`N(m_1, B)` for :math:`dX = \sigma\,dW`.

    .. math:: C = \tfrac12 (A^{1/2} D A^{-1/2} - \sigma^2 I), \qquad
              D = (4 A^{1/2} B A^{1/2} + \sigma^4 I)^{1/2}.

    With ``sigma=0`` it is the map of optimal transport, and :attr:`GaussianBridge.cost` the squared distance of Bures
    and Wasserstein.  All is computed in float64.

    Args:
        mean0: ``[d]``.
        cov0: ``[d, d]``, symmetric and positive definite.
        mean1: ``[d]``.
        cov1: ``[d, d]``, symmetric and positive definite.
        sigma: the volatility, 0 or more; the entropic cost then has epsilon :math:`2 \sigma^2` for squared distances.

    Raises:
        TypeError: for what is no floating tensor.
        ValueError: for shapes that do not fit, covariances that are not symmetric and positive definite, or a
            negative sigma.

    Sources: Janati, Muzellec, Peyre and Cuturi (2020); Mallasto, Gerolin and Minh (2022); Bunne, Hsieh, Cuturi and
    Krause (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> zero, one = torch.zeros(2), torch.eye(2)
        >>> bridge = transport.gaussian_bridge(zero, one, zero + 1, 4 * one, sigma=0.0)
        >>> float(bridge.cost)  # |m1 - m0|^2 + 2 (2 - 1)^2
        4.0
        >>> tuple(bridge.sample(10, steps=5).shape)
        (6, 10, 2)
    """
    return GaussianBridge(mean0, cov0, mean1, cov1, sigma)


def independent_gaussian_path(
    mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor
) -> GaussianPath:
    r"""Return the path of independent ends on straight lines, which :class:`ConditionalFlowMatcher` learns.

    Its velocity is :math:`m_1 - m_0 + (t B - (1 - t) A)\, \Sigma_t^{-1} (x - m_t)` with
    :math:`\Sigma_t = (1 - t)^2 A + t^2 B`.

    Args:
        mean0: as in :func:`gaussian_bridge`, and so are the others.
        cov0: see there.
        mean1: see there.
        cov1: see there.

    Raises:
        TypeError, ValueError: as :func:`gaussian_bridge`.

    Source: Lipman, Chen, Ben-Hamu, Nickel and Le (2023); Albergo and Vanden-Eijnden (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> zero, one = torch.zeros(1), torch.eye(1)
        >>> path = transport.independent_gaussian_path(zero, one, zero, one)
        >>> path.probability_flow(0.0, torch.ones(1, 1))
        tensor([[-1.]])
    """
    check_floating("cov0", cov0)
    return GaussianPath(mean0, cov0, mean1, cov1, torch.zeros_like(cov0), 0.0)


def _root(matrix: Tensor, power: float = 0.5) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0) ** power) @ vectors.mT
    return root


def _volatility(sigma: float) -> float:
    return 0.0 if sigma == 0 else positive("sigma", sigma)


def _parse(*gaussians: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, t in zip(("mean0", "cov0", "mean1", "cov1"), gaussians, strict=True):
        check_floating(name, t)
        d = gaussians[0].shape[-1] if gaussians[0].dim() == 1 else 0
        shape = (d,) if name.startswith("mean") else (d, d)
        if d == 0 or tuple(t.shape) != shape:
            raise ValueError(
                f"{name} must have shape {'[d]' if name.startswith('mean') else '[d, d]'} with the d of mean0, "
                f"got {tuple(t.shape)}"
            )
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or inf")
    wide = [t.detach().double() for t in gaussians]
    for name, i in (("cov0", 1), ("cov1", 3)):
        if not torch.allclose(
            wide[i], wide[i].mT, rtol=1e-5, atol=1e-6 * float(wide[i].abs().max())
        ):
            raise ValueError(f"{name} must be symmetric")
        wide[i] = (wide[i] + wide[i].mT) / 2
        least = float(torch.linalg.eigvalsh(wide[i])[0])
        if not least > 0:
            raise ValueError(f"{name} must be positive definite, got the eigenvalue {least}")
    return wide[0], wide[1], wide[2], wide[3]
