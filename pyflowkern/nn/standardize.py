"""Standardization of data by their mean and standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_batched, check_channels, check_count
from pyflowkern.nn._statistics import OfStatistics
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = ["Standardize"]


class Standardize(OfStatistics):
    r"""Bring each channel to mean 0 and variance 1: :math:`z = (x - \mu)/\sigma`.

    .. math:: \log\det = -|\text{space}| \sum_c \log \sigma_c

    :math:`\mu` and :math:`\sigma` are those of the data that :meth:`fit` was given, and no parameters: training does
    not change them.  They are saved with the layer, and stay float32 in a model of half precision.  Without data the
    layer is the identity.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.

    Raises:
        TypeError: for channels that are no int.
        ValueError: for less than one channel, or an input of another shape.

    Source: for inputs of flows e.g. Papamakarios, Pavlakou and Murray, "Masked autoregressive flow" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import flows, nn
        >>> data = torch.randn(500, 2) * torch.tensor([1.0, 1e4]) + 300
        >>> layer = nn.Standardize.from_data(data)
        >>> z, log_det = layer(data)
        >>> bool(z.mean().abs() < 1e-3), bool((z.std(0) - 1).abs().max() < 1e-2)
        (True, True)
        >>> flow = flows.MAF(2, transforms=2, hidden=8).standardize(data)  # such a layer in front of a flow
        >>> float(flow.bijection[0].mean[0] - layer.mean[0])
        0.0
    """

    log_scale: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        # as ActNorm has them: exp(log_scale) (x + bias)
        self.register_buffer("log_scale", torch.zeros(self.channels))
        self.register_buffer("bias", torch.zeros(self.channels))

    @classmethod
    def from_data(cls, data: Tensor) -> Standardize:
        """Return a layer that is fitted to ``data``, in their precision and on their device.

        Args and errors are those of :meth:`fit`.
        """
        check_batched("data", data)
        return cls(data.shape[1]).to(data).fit(data)

    @torch.no_grad()
    def fit(self, data: Tensor) -> Standardize:
        """Take mean and standard deviation of each channel from data; return the layer.

        Samples that hold NaN or inf are left out.  A channel that is constant keeps its scale, and is only shifted.

        Args:
            data: ``[N, C, *space]``.

        Raises:
            TypeError: for data that are no floating-point tensor.
            ValueError: for data of another shape, and without a finite sample.
        """
        check_channels("data", data, self.channels)
        finite = data.isfinite().flatten(1).all(1)
        if not bool(finite.any()):
            raise ValueError(f"data must have a finite sample, got none of {data.shape[0]}")
        # the deviation would lose digits in float32: of squares, and of means far from zero
        each = data[finite].transpose(0, 1).flatten(1).double()
        var, mean = torch.var_mean(each, 1, correction=0)
        spread = var > (torch.finfo(data.dtype).eps * mean).square()
        self.log_scale.copy_(torch.where(spread, -0.5 * torch.log(var), 0.0))
        self.bias.copy_(-mean)
        return self

    @property
    def mean(self) -> Tensor:
        """The mean of each channel, ``[C]``."""
        return -self.bias

    @property
    def std(self) -> Tensor:
        """The standard deviation of each channel, ``[C]``; 1 for constant ones."""
        return torch.exp(-self.log_scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardize ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        return ops.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        return ops.actnorm(z, self.log_scale, self.bias, inverse=True)

    def _chain_link(self) -> Link | None:
        if type(self) is not Standardize:
            return None
        link = Link([ActNormStep()])
        link.watch(self, "channels")
        link.read(self, "log_scale", "bias")
        return link

    def reset_parameters(self) -> None:
        """Make the layer the identity, as after ``to_empty``."""
        self.log_scale.zero_()
        self.bias.zero_()
