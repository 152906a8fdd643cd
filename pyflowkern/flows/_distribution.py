"""The base distribution of a flow, and the flow as a torch distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

from pyflowkern import ops
from pyflowkern.nn._base import broadcast_shapes, independent

if TYPE_CHECKING:
    from pyflowkern.flows._base import Flow

__all__ = ["FlowDistribution", "StandardNormal", "support_of"]


class StandardNormal(torch.nn.Module):
    r"""The standard normal: :math:`\log p(z) = -\tfrac12 (|z|^2 + D \log 2\pi)`.

    Args:
        dims: ``D``.

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
        if dims < 1:
            raise ValueError(f"dims must be at least 1, got {dims}")
        self.dims = dims
        # follows the module's dtype and device, so that samples do; its value is never read
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z`` ``[N, D]``, ``[N]``."""
        return ops.normal_log_prob(z)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``[n, D]`` with standard deviation ``temperature``."""
        z = torch.randn(
            n, self.dims, generator=generator, dtype=self.zero.dtype, device=self.zero.device
        )
        return z if temperature == 1.0 else temperature * z

    def distribution(self) -> Independent[Normal]:
        """Return the same as a :class:`torch.distributions.Independent`."""
        return Independent(
            Normal(self.zero.new_zeros(self.dims), self.zero.new_ones(self.dims)), 1
        )


class FlowDistribution(Distribution):
    """A flow as a :class:`torch.distributions.Distribution`: each call is one pass.

    Args:
        flow: the flow.
        context: ``[*batch, K]`` for a conditional flow.
        batch_shape: batch shape, by default that of the context.
        validate_args: check each value of ``log_prob``: of another shape, outside of the support or
            NaN it raises ValueError, for which a GPU is waited for.  Else its density is -inf or NaN.

    Raises:
        TypeError: for a context that is no tensor.
        ValueError: for a context of another size, one too many or one too few.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> d = flows.FlowDistribution(flows.RealNVP(2, steps=2, hidden=8))
        >>> tuple(d.sample((5,)).shape)
        (5, 2)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        flow: Flow,
        context: Tensor | None = None,
        batch_shape: torch.Size | None = None,
        *,
        validate_args: bool = False,
    ) -> None:
        _check_context(flow, context)
        self.flow, self.context = flow, context
        if batch_shape is None:
            batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size(flow.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The real line or the flow's domain; for pixels the unit interval and the margin of alpha."""
        return support_of(self.flow)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution with another batch shape."""
        shape = torch.Size(batch_shape)
        context = (
            None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        )
        return FlowDistribution(self.flow, context, shape, validate_args=self._validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape, *event_shape]``, with gradients."""
        lead = torch.Size(sample_shape) + self.batch_shape
        z = self.flow.base.sample(lead.numel())  # type: ignore[operator]
        x, _ = self.flow.inverse(z, self._context(lead))
        return x.reshape(lead + self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``[*sample_shape, *batch_shape, *event_shape]``, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``[*sample, *batch, *event]``, one number an event."""
        if self._validate_args and value.dtype != torch.uint8:  # of which every value is a pixel
            self._validate_sample(value)
        cut = value.dim() - len(self.event_shape)
        lead = broadcast_shapes(value.shape[:cut], self.batch_shape)
        x = value.expand(*lead, *value.shape[cut:]).reshape(lead.numel(), *value.shape[cut:])
        return self.flow.log_prob(x, self._context(lead)).reshape(lead)

    def _context(self, lead: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        size = self.context.shape[-1]
        return self.context.expand(*lead, size).reshape(lead.numel(), size)


def support_of(flow: Flow) -> constraints.Constraint:
    """Return where the flow's data lie: see :attr:`FlowDistribution.support`."""
    each: constraints.Constraint = constraints.real
    if flow.domain is not None:
        each = constraints.interval(*flow.domain)
    if flow.preprocess is not None:
        margin = flow.preprocess.alpha / (1 - 2 * flow.preprocess.alpha)
        each = constraints.interval(-margin, 1 + margin)
    return independent(each, len(flow.event_shape))


def _check_context(flow: Flow, context: Tensor | None) -> None:
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
