"""Base distributions: the standard normal, a mixture of Gaussians, and the uniform of a box."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)
from torch.distributions import Uniform as TorchUniform

from pyflowkern import ops
from pyflowkern.core.checks import check_batched, check_count, check_number, check_real
from pyflowkern.core.draws import normal_like, uniform_like
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.flows._arguments import check_flags
from pyflowkern.flows._domain import rounded_ends

__all__ = ["MixtureOfGaussians", "StandardNormal", "Uniform"]


class StandardNormal(torch.nn.Module):
    r"""The standard normal: :math:`\log p(z) = -\tfrac12 (|z|^2 + D \log 2\pi)`.

    Args:
        dims: ``D``.

    Raises:
        TypeError: for dims that are no int.
        ValueError: for less than one dimension.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> base = flows.StandardNormal(2)
        >>> base.log_prob(torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """

    zero: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = check_count("dims", dims)
        # follows the module's dtype and device, so that samples do; its value is never read
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z`` ``[N, D]``, ``[N]``."""
        return ops.normal_log_prob(z)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``[n, D]`` with standard deviation ``temperature``."""
        z = normal_like(self.zero, (n, self.dims), generator)
        return z if temperature == 1.0 else temperature * z

    def distribution(self) -> Independent[Normal]:
        """Return the same as a :class:`torch.distributions.Independent`."""
        return Independent(
            Normal(self.zero.new_zeros(self.dims), self.zero.new_ones(self.dims)), 1
        )

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"dims={self.dims}"


class MixtureOfGaussians(torch.nn.Module):
    r"""A mixture of diagonal Gaussians with learned weights, means and scales.

    .. math:: p(z) = \sum_k \pi_k\, N(z; \mu_k, \text{diag}\,\sigma_k^2).

    As a base it lets a flow model data in separate clusters: a continuous bijection of one normal
    cannot tear its mass apart.

    Args:
        dims: ``D``.
        components: number ``K`` of Gaussians.
        spread: standard deviation of the first means, which are random.
        means: the first means, ``[K, D]``, instead.
        scale: the first standard deviation of every component.
        learned: whether weights, means and scales are parameters or stay what they are.

    Raises:
        TypeError: for counts that are no ints, means that are no tensor, and a ``learned`` that is no bool.
        ValueError: for a count below 1, a negative spread, a scale that is not positive, or means of
            another shape.

    Source: as a base e.g. Izmailov, Kirichenko, Finzi and Wilson, "Semi-supervised learning with normalizing flows"
    (2020).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> base = flows.MixtureOfGaussians(2, 3)
        >>> tuple(base.log_prob(base.sample(5)).shape)
        (5,)
    """

    logits: Tensor
    means: Tensor
    log_scales: Tensor

    def __init__(
        self,
        dims: int,
        components: int,
        *,
        spread: float = 1.0,
        means: Tensor | None = None,
        scale: float = 1.0,
        learned: bool = True,
    ) -> None:
        super().__init__()
        dims, components = check_count("dims", dims), check_count("components", components)
        check_flags(learned=learned)
        spread, scale = check_number("spread", spread), check_number("scale", scale)
        if spread < 0:
            raise ValueError(f"spread must be at least 0, got {spread}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        if means is not None and not isinstance(means, Tensor):
            raise TypeError(f"means must be a torch.Tensor, got {type(means).__name__}")
        if means is not None:
            check_real("means", means)
            if tuple(means.shape) != (components, dims):
                raise ValueError(
                    f"means must have shape {(components, dims)}, got {tuple(means.shape)}"
                )
        self.dims, self.components = dims, components
        first = spread * torch.randn(components, dims) if means is None else means.detach().clone()
        for name, value in (
            ("logits", torch.zeros(components)),
            ("means", first.to(torch.get_default_dtype())),
            ("log_scales", torch.full((components, dims), math.log(scale))),
        ):
            if learned:
                self.register_parameter(name, torch.nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z`` ``[N, D]``, ``[N]``."""
        _check_z(z, self.dims)
        work = accumulation_dtype(torch.promote_types(z.dtype, self.means.dtype))
        log_scales = self.log_scales.to(work)
        d = (z.to(work).unsqueeze(1) - self.means.to(work)) * torch.exp(-log_scales)
        constant = 0.5 * self.dims * math.log(2 * math.pi)
        normals = -0.5 * d.square().sum(2) - (log_scales.sum(1) + constant)
        return torch.logsumexp(normals + torch.log_softmax(self.logits.to(work), 0), 1)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``[n, D]``; ``temperature`` is a factor on the standard deviations.

        Gradients reach means and scales, through the samples, but not the weights.
        """
        # not torch.multinomial, which wants at least one sample
        weights = torch.softmax(self.logits.detach().to(accumulation_dtype(self.means.dtype)), 0)
        u = uniform_like(weights, (n,), generator)
        chosen = torch.searchsorted(weights.cumsum(0)[:-1], u, right=True)
        noise = normal_like(self.means, (n, self.dims), generator)
        scales = torch.exp(self.log_scales) * temperature
        return self.means.index_select(0, chosen) + scales.index_select(0, chosen) * noise

    def distribution(self) -> Distribution:
        """Return the same as a :class:`torch.distributions.MixtureSameFamily`."""
        each = Independent(Normal(self.means, self.log_scales.exp()), 1)
        return MixtureSameFamily(Categorical(logits=self.logits), each)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"dims={self.dims}, components={self.components}"


class Uniform(torch.nn.Module):
    r"""The uniform distribution on ``[low, high)`` in every dimension: a box, or a torus of angles.

    .. math:: p(z) = (\text{high} - \text{low})^{-D} \text{ in the box, } 0 \text{ elsewhere.}

    Args:
        dims: ``D``.
        low: least value.
        high: end of the values.

    Raises:
        TypeError: for dims that are no int.
        ValueError: for less than one dimension, or high that is not above low.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flows.Uniform(2, 0.0, 2.0).log_prob(torch.tensor([[0.5, 1.5], [0.5, 2.5]]))
        tensor([-1.3863,    -inf])
    """

    zero: Tensor

    def __init__(self, dims: int, low: float = -math.pi, high: float = math.pi) -> None:
        super().__init__()
        dims = check_count("dims", dims)
        low, high = check_number("low", low), check_number("high", high)
        if not low < high:
            raise ValueError(f"high must be above low, got {low} and {high}")
        self.dims, self.low, self.high = dims, low, high
        # follows the module's dtype and device, so that samples do; its value is never read
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z`` ``[N, D]``, ``[N]``; both ends count as inside."""
        _check_z(z, self.dims)
        low, high = rounded_ends(self.low, self.high)
        outside = ((z < low) | (z > high)).any(1)  # NaN is neither inside nor outside
        unknown = z.isnan().any(1)
        density = z.new_full(
            z.shape[:1],
            -self.dims * math.log(self.high - self.low),
            dtype=accumulation_dtype(z.dtype),
        )
        return density.masked_fill(outside, -math.inf).masked_fill(unknown, math.nan)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``[n, D]``; ``temperature``, at most 1, shrinks the box about its middle."""
        if temperature > 1:
            raise ValueError(f"temperature must be at most 1 in a box, got {temperature}")
        u = uniform_like(self.zero, (n, self.dims), generator)
        middle, length = (self.low + self.high) / 2, self.high - self.low
        return middle + (u - 0.5) * (length * temperature)

    def distribution(self) -> Independent[Any]:
        """Return the same as a :class:`torch.distributions.Independent`."""
        low, high = (self.zero.new_full((self.dims,), end) for end in (self.low, self.high))
        return Independent(TorchUniform(low, high, validate_args=False), 1)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"dims={self.dims}, low={self.low:.6g}, high={self.high:.6g}"


def _check_z(z: Tensor, dims: int) -> None:
    check_batched("z", z)
    if z.dim() != 2 or z.shape[1] != dims:
        raise ValueError(f"z must have shape [N, {dims}], got {tuple(z.shape)}")
