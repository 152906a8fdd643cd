"""A flow as a torch distribution."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

__all__ = ["FlowDistribution"]


class DensityModel(Protocol):
    """The methods of a :class:`~pyflowkern.flows.Flow` that its distribution calls."""

    event_shape: tuple[int, ...]
    context_features: int

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie."""

    def log_prob(self, x: Tensor, context: Tensor | None = None, **chunk: int) -> Tensor:
        """Return the log-density ``[N]``."""

    def sample_and_log_prob(
        self, n: int, context: Tensor | None = None, **chunk: int
    ) -> tuple[Tensor, Tensor]:
        """Return samples with gradients and their log-density."""

    def rsample(self, n: int, context: Tensor | None = None, **chunk: int) -> Tensor:
        """Return samples with gradients."""

    def transform(self, context: Tensor | None = None) -> Transform:
        """Return the map from data to latent."""


class FlowDistribution(Distribution):
    """A flow as a :class:`torch.distributions.Distribution`: each call is one pass.

    Args:
        flow: the flow.
        context: ``[*batch, K]`` for a conditional flow.
        batch_shape: batch shape, by default that of the context, which must broadcast to it.
        validate_args: check each value of ``log_prob``: of another shape, outside of the support or
            NaN it raises ValueError, for which a GPU is waited for.  Else its density is -inf or NaN.
            None follows :meth:`torch.distributions.Distribution.set_default_validate_args`.

    Raises:
        TypeError: for a context that is no tensor.
        ValueError: for a context of another size, one too many or one too few, and for a batch shape
            that the context does not broadcast to.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> d = flows.FlowDistribution(flows.RealNVP(2, steps=2, hidden=8))
        >>> x, log_prob = d.rsample_and_log_prob((5,))
        >>> tuple(x.shape), tuple(log_prob.shape)
        ((5, 2), (5,))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        flow: DensityModel,
        context: Tensor | None = None,
        batch_shape: torch.Size | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        _check_context(flow, context)
        own = torch.Size() if context is None else context.shape[:-1]
        batch_shape = own if batch_shape is None else torch.Size(batch_shape)
        _check_expands("the context's axes", own, batch_shape)
        self.flow, self.context = flow, context
        super().__init__(batch_shape, torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The real line or the flow's domain; for pixels the unit interval and the margin of alpha."""
        return self.flow.support

    @property
    def transform(self) -> Transform:
        """The map from data to latent, one for each context: a transform of torch."""
        return self.flow.transform(self.context)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution with another batch shape, of the same class.

        Raises:
            ValueError: for a shape that the batch shape does not broadcast to.
        """
        shape = torch.Size(batch_shape)
        _check_expands("batch_shape", self.batch_shape, shape)
        new: FlowDistribution = copy.copy(self) if _instance is None else _instance
        new.flow, new.context = self.flow, None
        if self.context is not None:
            new.context = self.context.expand(*shape, self.context.shape[-1])
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = (), *, chunk: int | None = None) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape, *event_shape]``, with gradients; ``chunk`` as in :meth:`log_prob`."""
        lead = torch.Size(sample_shape) + self.batch_shape
        drawn = self.flow.rsample(lead.numel(), self._context(lead), **_given(chunk))
        return drawn.reshape(lead + self.event_shape)

    def sample(self, sample_shape: Any = (), *, chunk: int | None = None) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape, *event_shape]``, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, **_given(chunk))

    def rsample_and_log_prob(
        self, sample_shape: Any = (), *, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples, with gradients, and return their log-densities from the same pass.

        Returns:
            ``[*sample_shape, *batch_shape, *event_shape]`` and ``[*sample_shape, *batch_shape]``.
        """
        lead = torch.Size(sample_shape) + self.batch_shape
        x, log_prob = self.flow.sample_and_log_prob(
            lead.numel(), self._context(lead), **_given(chunk)
        )
        return x.reshape(lead + self.event_shape), log_prob.reshape(lead)

    def log_prob(self, value: Tensor, *, chunk: int | None = None) -> Tensor:
        """Return the log-density of ``[*sample, *batch, *event]``, one number an event.

        Args:
            value: the events.
            chunk: compute so many events at a time, so that memory is needed for those alone, as in
                :meth:`Flow.log_prob`.
        """
        if (
            self._validate_args
            and value.dtype != torch.uint8  # any byte is a pixel
            and not torch.compiler.is_compiling()
        ):
            self._validate_sample(value)
        cut = value.dim() - len(self.event_shape)
        lead = torch.broadcast_shapes(value.shape[:cut], self.batch_shape)
        x = value.expand(*lead, *value.shape[cut:]).reshape(lead.numel(), *value.shape[cut:])
        return self.flow.log_prob(x, self._context(lead), **_given(chunk)).reshape(lead)

    def _context(self, lead: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        size = self.context.shape[-1]
        return self.context.expand(*lead, size).reshape(lead.numel(), size)


def _given(chunk: int | None) -> dict[str, int]:
    """Return the argument if there is one: models of other classes may not have it."""
    return {} if chunk is None else {"chunk": chunk}


def _check_expands(name: str, shape: torch.Size, wanted: torch.Size) -> None:
    """Raise ValueError unless ``shape`` broadcasts to ``wanted``."""
    try:
        fits = torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} {tuple(shape)} must broadcast to the batch shape {tuple(wanted)}"
        )


def _check_context(flow: DensityModel, context: Tensor | None) -> None:
    size = flow.context_features
    if context is None and not size:
        return
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
    if context is not None and not size:
        raise ValueError("context was given, but the flow was made with context_features=0")
    if context is None or context.dim() == 0 or context.shape[-1] != size:
        got = None if context is None else tuple(context.shape)
        raise ValueError(f"context must have shape [*batch, {size}], got {got}")
