"""ActNorm: a learned scale and bias per channel, set by the first batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyflowkern import ops
from pyflowkern.nn._base import Bijection, check_channels, check_count

__all__ = ["ActNorm"]

_TRIES = 3  # training batches that are looked at: one is enough unless all of it is NaN


class ActNorm(Bijection):
    r"""Scale and shift each channel: :math:`z = \exp(\ell)\,(x + b)`.

    The log-determinant is :math:`|\text{space}| \sum_c \ell_c`.

    The first training batch sets ``l`` and ``b`` such that it leaves with mean 0 and variance 1
    in each channel; before that, and in eval mode, the layer is the identity.  The flag
    ``initialized`` is a buffer, so that resuming does not start again.  Initialisation waits for
    no device, sums over all ranks of an initialised process group, and leaves a channel alone
    that is constant or whose variance overflows.  Samples that hold NaN or inf are left out; a batch
    of nothing else does not count, and the next two are tried.  Under torch.compile the first call
    runs its own graph, and is the only try.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.

    Raises:
        ValueError: for less than one channel, or an input of another shape.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.ActNorm(3)
        >>> z, log_det = layer(torch.randn(64, 3, 8, 8) * 5 + 100)
        >>> bool(z.mean().abs() < 1e-4), bool((z.std() - 1).abs() < 1e-3)
        (True, True)
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels = channels
        self.log_scale = torch.nn.Parameter(torch.zeros(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        # what the host knows without asking the device: at 0 it looks no more
        self._tries = _TRIES

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        self.initialize(x)
        return ops.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        return ops.actnorm(z, self.log_scale, self.bias, inverse=True)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and bias from ``x`` if this is the first training batch."""
        if not (self.training and self._tries):
            return
        distributed = dist.is_available() and dist.is_initialized()
        if x.numel() == 0 and not distributed:
            return
        mean, var, count = _finite_moments(x)
        if distributed:
            mean, var, count = _over_all_ranks(mean, var, count)
        # a spread below the rounding of the mean is no spread
        spread = var > (torch.finfo(torch.float32).eps * mean).square()
        log_scale = torch.where(spread & var.isfinite(), -0.5 * torch.log(var), 0.0)
        bias = torch.where(mean.isfinite(), -mean, 0.0)
        keeps = self.initialized | (count == 0)
        self.log_scale.copy_(torch.where(keeps, self.log_scale, log_scale))
        self.bias.copy_(torch.where(keeps, self.bias, bias))
        self.initialized.logical_or_(count > 0)
        # each number of tries is a graph of its own to a compiler: there it is one or none
        self._tries = 0 if torch.compiler.is_compiling() else self._tries - 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tries = _TRIES  # the flag that comes may be either
        super()._load_from_state_dict(*args, **kwargs)


def _finite_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance per channel of the samples without NaN and inf, and their elements a channel."""
    finite = x.isfinite().flatten(1).all(1)
    rows = finite.view(-1, *[1] * (x.dim() - 1))
    mean = ops.channel_moments(x.masked_fill(~rows, 0.0))[0]
    found = finite.sum().to(mean.dtype)
    factor = x.shape[0] / found
    # the mean of the others stands in for what is left out: their sum of squares is that of all
    fill = (mean * factor).view(-1, *[1] * (x.dim() - 2))
    mean, var = ops.channel_moments(torch.where(rows, x, fill))
    return mean, var * factor, found * x.shape[2:].numel()


def _over_all_ranks(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count over all ranks, some of which may be empty."""
    mean, var = (torch.where(count > 0, t, 0.0) for t in (mean, var))
    sums = torch.cat([count * mean, count.view(1)])
    dist.all_reduce(sums)
    total_mean, total = sums[:-1] / sums[-1], sums[-1]
    squares = count * (var + (mean - total_mean).square())
    dist.all_reduce(squares)
    return total_mean, squares / total, total
