"""The training loss of a flow as a module, which is what wrappers for several processes act on."""

from __future__ import annotations

from torch import Tensor

from pyflowkern.flows._base import Flow
from pyflowkern.flows._processes import InProcesses

__all__ = ["NegativeLogLikelihood"]


class NegativeLogLikelihood(InProcesses):
    r"""A flow as a module whose call is the loss that it is trained by, in nats.

    .. math:: L = -\frac{1}{N} \sum_{i=1}^{N} \log p(x_i \mid c_i)

    ``DistributedDataParallel`` averages gradients, and ``fully_shard`` gathers parameters, around a module's
    ``forward`` alone: what ``ddp.module.log_prob`` computes is not averaged.  So it is this module that is wrapped.
    The mean over processes is that over all samples where their batches have the same size.

    Args:
        flow: the flow, which stays what it is: ``nll.flow`` draws samples and has the weights.

    Raises:
        TypeError: for what is no flow.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.NSF(2, transforms=2, hidden=(8, 8))
        >>> loss = flows.NegativeLogLikelihood(flow)  # DistributedDataParallel(loss) in several processes
        >>> loss(torch.randn(16, 2)).backward()
        >>> all(p.grad is not None for p in flow.parameters())
        True
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a flows.Flow, got {type(flow).__name__}")
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the mean negative log-density of ``x``, a scalar.

        Args:
            x: as in :meth:`Flow.log_prob`.
            context: likewise.

        Raises:
            ValueError: for an empty batch, which has no mean, and as :meth:`Flow.log_prob`.
            TypeError: as :meth:`Flow.log_prob`.
        """
        log_prob = self.flow.log_prob(x, context)
        if not len(log_prob):
            raise ValueError(f"x must have one sample at least, got shape {tuple(x.shape)}")
        return -log_prob.mean()
