"""A flow as a module whose call is a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.flows._distribution import DensityModel, FlowDistribution

__all__ = ["LazyFlow"]


class LazyFlow(torch.nn.Module):
    """A flow as a module whose call with a context is a :class:`FlowDistribution`, as zuko has it.

    ``q(c)`` is the density of the data under the context ``c``, ``q()`` that of a flow without contexts.  Libraries
    that build such modules take it, as does lampe's NPE with
    ``build=lambda d, k: flows.MAF(d, context_features=k).lazy()``.  Parameters, training and copies are those of the
    flow, which is ``q.flow``.

    Args:
        flow: the flow.

    Raises:
        TypeError: for what is no flow.

    Source: Rozet et al., *Zuko: normalizing flows in PyTorch* (2022), for the convention.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> q = flows.LazyFlow(flows.MAF(2, transforms=2, hidden=8, context_features=3))
        >>> d = q(torch.randn(5, 3))
        >>> tuple(d.rsample((4,)).shape), tuple(d.log_prob(torch.randn(2)).shape)
        ((4, 5, 2), (5,))
    """

    def __init__(self, flow: DensityModel) -> None:
        super().__init__()
        if not isinstance(flow, torch.nn.Module) or not hasattr(flow, "sample_and_log_prob"):
            raise TypeError(f"flow must be a flows.Flow, got {type(flow).__name__}")
        self.flow = flow

    def forward(self, c: Tensor | None = None) -> FlowDistribution:
        """Return the distribution under a context ``[*batch, K]``, whose leading axes are its batch shape.

        Raises:
            TypeError: for a context that is no tensor.
            ValueError: for a context of another size, one too many or one too few.
        """
        return FlowDistribution(self.flow, c)
