"""Other forms of a flow: a torch distribution, a module that makes such ones, a transform, a standardized flow."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyflowkern.flows._distribution import FlowDistribution
from pyflowkern.flows._domain import Domain
from pyflowkern.flows._lazy import LazyFlow
from pyflowkern.flows._processes import InProcesses
from pyflowkern.nn import Bijection, BijectionTransform, Dequantize, Sequential, Standardize

__all__ = ["FlowForms"]

Self = TypeVar("Self", bound="FlowForms")


class FlowForms(InProcesses, Bijection):
    """What a flow can be turned into."""

    bijection: Bijection
    event_shape: tuple[int, ...]
    context_features: int
    preprocess: Dequantize | None
    _domain: Domain | None

    @property
    def domain(self) -> tuple[float, float] | None:
        """Ends of the interval that each element of ``x`` lies in; None for the real line."""
        return None if self._domain is None else self._domain.ends

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie, as a constraint of torch over events: the real line or the domain."""
        each = constraints.real if self.domain is None else constraints.interval(*self.domain)
        return constraints.independent(each, len(self.event_shape))

    def distribution(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """Return a :class:`torch.distributions.Distribution` of the data.

        Args:
            context: ``[*batch, K]``: its leading axes become the batch shape.
            validate_args: refuse values outside of the support, as :class:`FlowDistribution` does; None
                follows torch's default.

        Example:
            >>> import torch
            >>> from pyflowkern import flows
            >>> d = flows.RealNVP(2, steps=2, hidden=8).distribution()
            >>> x = d.rsample((3, 4))
            >>> d.event_shape, tuple(x.shape), tuple(d.log_prob(x).shape)
            (torch.Size([2]), (3, 4, 2), (3, 4))
        """
        return FlowDistribution(self, context, validate_args=validate_args)  # type: ignore[arg-type]

    def transform(self, context: Tensor | None = None, **options: Any) -> BijectionTransform:
        """Return the flow as a torch Transform; it knows its own event shapes and its domain.

        A flow on a bounded domain maps the interval onto itself: both sides are constrained to it.
        """
        options.pop("event_dim", None)
        latent: constraints.Constraint = constraints.real
        if self.domain is not None and self.preprocess is None:
            latent = constraints.interval(*self.domain)
        return BijectionTransform(
            self,
            context,
            len(self.event_shape),
            1,
            domain=self.support,
            codomain=constraints.independent(latent, 1),
            **options,
        )

    def lazy(self) -> LazyFlow:
        """Return a module whose call with a context is this flow's distribution: zuko's convention.

        Example:
            >>> import torch
            >>> from pyflowkern import flows
            >>> q = flows.MAF(2, transforms=2, hidden=8, context_features=3).lazy()
            >>> tuple(q(torch.randn(5, 3)).log_prob(torch.randn(7, 5, 2)).shape)
            (7, 5)
        """
        return LazyFlow(self)  # type: ignore[arg-type]

    def standardize(self: Self, data: Tensor | None = None) -> Self:
        """Put a :class:`~pyflowkern.nn.Standardize` that is fitted to the data in front of the layers; return the flow.

        Densities stay those of the data as they are given, and samples have their scale.  Where such a layer stands in
        front already, it is fitted anew.  The state of the flow has the layer's buffers then: a flow that is to load it
        is made in the same way, without data.

        Args:
            data: ``[N, *event_shape]``; None for a layer that is the identity until a state is loaded.

        Raises:
            TypeError: for data that are no floating-point tensor.
            ValueError: for data of another shape or without a finite sample, and for a flow of pixels, on a bounded
                domain, whose bijection is no :class:`~pyflowkern.nn.Sequential`, or that has a loss of its own
                (:class:`FlowMatching`).

        Example:
            >>> import torch
            >>> from pyflowkern import flows
            >>> data = 100 * torch.randn(64, 2) + 1000
            >>> flow = flows.MAF(2, transforms=2, hidden=8).standardize(data)
            >>> bool((flow.sample(1000).mean(0) - 1000).abs().max() < 100)
            True
        """
        inner = self.bijection
        # a loss of its own reads the data without the layer
        own_loss = hasattr(self, "loss")
        if type(inner) is not Sequential or self._domain is not None or own_loss:
            raise ValueError(
                "standardize needs a flow on the real line whose bijection is a Sequential and that is trained by its "
                f"density, got a {type(self).__name__} of a {type(inner).__name__} with domain {self.domain}; "
                "standardize the data before they come"
            )
        if isinstance(data, Tensor) and tuple(data.shape[1:]) != tuple(self.event_shape):
            raise ValueError(
                f"data must have shape [N, {', '.join(map(str, self.event_shape))}], got {tuple(data.shape)}"
            )
        first = inner[0] if len(inner) else None
        if type(first) is not Standardize:
            floating = (t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
            first = Standardize(self.event_shape[0]).to(next(floating, torch.empty(0)))
            self.bijection = Sequential(first, *inner, memory=inner.memory)
            for module in (self.bijection, first):  # the other layers keep their modes
                module.training = inner.training
        if data is not None:
            first.fit(data)
        return self
