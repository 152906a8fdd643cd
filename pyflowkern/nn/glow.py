"""The fused first half of a Glow step: ActNorm and the 1x1 convolution in one pass."""

from __future__ import annotations

from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_channels
from pyflowkern.nn._base import Bijection
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.nn.linear import InvertibleLinear
from pyflowkern.nn.links import Link
from pyflowkern.nn.normalization import ActNorm

__all__ = ["GlowStep"]


class GlowStep(Bijection):
    r"""ActNorm then 1x1 convolution, fused: :math:`z = W(\exp(\ell)\,(x + b))`.

    :math:`\log\det = |\text{space}|\,(\sum_c \ell_c + \log|\det W|)`.  The parts are
    :class:`ActNorm` (``.actnorm``) and :class:`InvertibleLinear` (``.linear``); only the pass
    over the data is one.  Parts with hooks, and what stands in the place of one, are called one after the other.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        parameterization: of the matrix: ``"plu"``, ``"dense"`` or ``"householder"``.

    Raises:
        ValueError: for less than one channel, an unknown parameterization, or an input of another
            shape.
        RuntimeError: by the inverse, when a dense matrix is singular.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> step = nn.GlowStep(4)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_det = step(x)
        >>> bool(torch.allclose(step.inverse(z)[0], x, atol=1e-4))
        True
    """

    def __init__(self, channels: int, *, parameterization: str = "plu") -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.channels = self.actnorm.channels
        self.linear = InvertibleLinear(channels, parameterization=parameterization)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        if not self._fused():
            y, log_det = self.actnorm(x)
            z, more = self.linear(y)
            return z, log_det + more
        self.actnorm.initialize(x)
        return ops.glow_step(x, *self.actnorm.scale_and_bias(), *self.linear.kept_matrix())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        if not self._fused():
            y, log_det = self.linear.inverse(z)
            x, more = self.actnorm.inverse(y)
            return x, log_det + more
        if self.actnorm.awaits_first_batch(inverse=True):
            self.actnorm.initialize(self.linear.inverse(z)[0], inverse=True)
        matrix = self.linear.kept_matrix(inverse=True)
        return ops.glow_step(z, *self.actnorm.scale_and_bias(), *matrix, inverse=True)

    def _chain_link(self) -> Link | None:
        if type(self) is not GlowStep:
            return None
        link = Link()
        link.watch(self, "channels")
        for part in (self.actnorm, self.linear):
            own = part._chain_link() if isinstance(part, Bijection) else None
            if own is None or not link.append(own):
                return None
        return link

    def _fused(self) -> bool:
        return may_be_read((self.actnorm, self.linear), ActNorm, InvertibleLinear)
