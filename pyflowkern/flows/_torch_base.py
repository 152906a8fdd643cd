"""Base distributions of flows: modules with ``log_prob`` and ``sample``, or torch distributions wrapped in one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyflowkern.flows.bases import StandardNormal

__all__ = ["TorchBase", "as_base"]


def as_base(base: torch.nn.Module | Distribution | None, dims: int) -> torch.nn.Module:
    """Return a module with ``log_prob`` and ``sample`` for latents ``[N, dims]``; None is the standard normal.

    Raises:
        TypeError: for what is neither a distribution nor a module with the two methods.
        ValueError: for another number of dimensions.
    """
    if base is None:
        return StandardNormal(dims)
    if isinstance(base, Distribution):
        return TorchBase(base, dims)
    for needed in ("log_prob", "sample"):
        if not callable(getattr(base, needed, None)):
            raise TypeError(f"base must have a method {needed}, {type(base).__name__} has not")
    if not isinstance(base, torch.nn.Module):
        raise TypeError(
            f"base must be a torch.nn.Module or a torch.distributions.Distribution, got {type(base).__name__}"
        )
    own = getattr(base, "dims", dims)
    if own != dims:
        raise ValueError(f"base must have the flow's {dims} dimensions, got {own}")
    return base


class TorchBase(torch.nn.Module):
    """A :class:`torch.distributions.Distribution` over vectors as the base of a flow.

    Its tensors move with the flow.  They are no parameters of it: where they are to be learned, a module
    with ``log_prob`` and ``sample`` is needed, such as :class:`~pyflowkern.flows.MixtureOfGaussians`.

    Args:
        distribution: with an empty batch shape and the event shape ``(D,)``.
        dims: ``D``.

    Raises:
        ValueError: for another shape.
    """

    zero: Tensor

    def __init__(self, distribution: Distribution, dims: int) -> None:
        super().__init__()
        if getattr(distribution.support, "is_discrete", False):
            raise ValueError(
                f"base must be a distribution over real vectors, {type(distribution).__name__} is discrete"
            )
        batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
        if (batch, event) != ((), (dims,)):
            hint = ""
            if (*batch, *event) == (dims,):
                hint = "; torch.distributions.Independent(base, 1) makes axes of the batch part of the event"
            raise ValueError(
                f"base must have batch_shape () and event_shape ({dims},), got {batch} and {event}{hint}"
            )
        self.dims, self._distribution = dims, distribution
        # tells where the flow is, and in which dtype; its value is never read
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z`` ``[N, D]``, ``[N]``: -inf outside of the support, NaN for NaN."""
        support = self._distribution.support
        if support is None:
            return self._distribution.log_prob(z)
        known = ~z.isnan().any(1)
        fits = support.check(z) & known
        inside = torch.where(fits.unsqueeze(1), z, self._distribution.sample().to(z))
        density: Tensor = self._distribution.log_prob(inside)
        return density.masked_fill(~fits, -math.inf).masked_fill(~known, math.nan)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``[n, D]``, with gradients where the distribution has them.

        ``temperature`` shrinks samples about the distribution's mean; ValueError where there is no finite one.
        """
        draw = (
            self._distribution.rsample
            if self._distribution.has_rsample
            else self._distribution.sample
        )
        if generator is None:
            z = draw((n,))
        else:  # torch distributions take no generator: the default one is seeded from it
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            with torch.random.fork_rng(_devices_of(self.zero)):
                torch.manual_seed(seed)
                z = draw((n,))
        if temperature != 1.0:
            z = self._middle() + temperature * (z - self._middle())
        return z.to(self.zero)

    def distribution(self) -> Distribution:
        """Return the distribution."""
        return self._distribution

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return str(self._distribution)

    def _middle(self) -> Tensor:
        try:
            mean: Tensor = self._distribution.mean
        except NotImplementedError:
            mean = self.zero.new_full((), math.nan)
        if not bool(mean.isfinite().all()):
            raise ValueError(
                f"temperature must be 1 for a base without a finite mean, {self._distribution}"
            )
        return mean

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self._distribution = _mapped(self._distribution, fn)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a distribution with ``fn`` applied to its tensors, those of distributions inside among them."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_mapped(v, fn) for v in value)
    if isinstance(value, (Distribution, Transform)):
        new = copy.copy(value)
        vars(new).update({name: _mapped(v, fn) for name, v in vars(value).items()})
        return new
    return value


def _devices_of(t: Tensor) -> list[torch.device]:
    return [t.device] if t.is_cuda else []
