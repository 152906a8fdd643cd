"""Batch normalization as a bijection."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_channels, check_count, check_flag, check_number
from pyflowkern.nn._ranks import moments_of_all, process_groups
from pyflowkern.nn._statistics import OfStatistics
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = ["BatchNorm"]


class BatchNorm(OfStatistics):
    r"""Normalize each channel by the mean ``m`` and variance ``v`` of the batch, or of all batches before.

    .. math:: z = e^{\ell}\,\frac{x - m}{\sqrt{v + \epsilon}} + b, \qquad
              \log\det = |\text{space}| \sum_c \ell_c - \tfrac12 \log(v_c + \epsilon),

    with learned :math:`\ell` and ``b``.  In training mode :meth:`forward` takes the statistics of the batch (the
    variance divides by the number of values), and gradients go through them; the running statistics move towards them,
    :math:`m_r \leftarrow (1 - \text{momentum})\,m_r + \text{momentum}\,m`, that of the variance with one value less.
    In evaluation mode the layer is a fixed affine map by the running statistics.

    :meth:`inverse` uses the running statistics in either mode.  So it undoes the forward pass of evaluation, and not
    that of a training batch, whose statistics the latent does not tell: compare both directions after ``eval()``.

    In training mode samples depend on each other.  NaN or inf in one spoils its channels in all of the batch; the
    running statistics of such channels stay as they were.  An empty batch changes nothing.

    Statistics are those of all processes that train one model together (under ``DistributedDataParallel`` or
    ``fully_shard``), as of torch's ``SyncBatchNorm``; each of them must then run the same number of batches.
    Statistics are float32, or float64 if the layer is, also in a model of half precision and under autocast.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; None for the average of all batches.
        affine: whether :math:`\ell` and ``b`` are learned, in place of zeros.
        synchronize: False for statistics of this process's batch alone.
        process_group: processes whose batches are one, such as ``torch.distributed.group.WORLD``; None for those
            named above.  Not pickled.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for less than one channel, an eps or a momentum out of range, an input of another shape, and, in
            training, a batch with one value a channel, whose variance is zero.

    Source: Ioffe and Szegedy, "Batch normalization" (2015); as a bijection: Dinh, Sohl-Dickstein and Bengio, "Density
    estimation using Real NVP" (2017); Papamakarios, Pavlakou and Murray, "Masked autoregressive flow" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.BatchNorm(3)
        >>> z, log_det = layer(torch.randn(64, 3) * 5 + 100)
        >>> bool(z.mean().abs() < 1e-4), bool((z.var(0, correction=0) - 1).abs().max() < 1e-3)
        (True, True)
        >>> layer = layer.eval()
        >>> x = torch.randn(4, 3)
        >>> bool(torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-4))
        True
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    log_scale: Tensor | None
    bias: Tensor | None
    process_group: Any = None

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        synchronize: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.eps = check_number("eps", eps)
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"eps must be positive and finite, got {eps}")
        self.momentum = None if momentum is None else check_number("momentum", momentum)
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1] or None, got {momentum}")
        self.synchronize, self.process_group = (
            check_flag("synchronize", synchronize),
            process_group,
        )
        for name in ("log_scale", "bias"):
            value = (
                torch.nn.Parameter(torch.zeros(self.channels))
                if check_flag("affine", affine)
                else None
            )
            self.register_parameter(name, value)
        self.register_buffer("running_mean", torch.zeros(self.channels))
        self.register_buffer("running_var", torch.ones(self.channels))
        # no integer: averaging the buffers of models must not fail
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        if not self.training:
            return ops.actnorm(x, *self._scale_and_bias(self.running_mean, self.running_var))
        return ops.actnorm(x, *self._scale_and_bias(*self._moments(x)))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward` of evaluation mode."""
        check_channels("z", z, self.channels)
        scale_and_bias = self._scale_and_bias(self.running_mean, self.running_var)
        return ops.actnorm(z, *scale_and_bias, inverse=True)

    def _scale_and_bias(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same map as ActNorm has it: ``exp(log_scale) (x + bias)``."""
        log_scale = -0.5 * torch.log(var + self.eps)
        if self.log_scale is None or self.bias is None:
            return log_scale, -mean
        log_scale = log_scale + self.log_scale
        return log_scale, self.bias * torch.exp(-log_scale) - mean

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the batch, after noting them in the running statistics."""
        groups: list[Any] = []
        if self.synchronize:
            groups = process_groups(self) if self.process_group is None else [self.process_group]
        count = x.shape[0] * math.prod(x.shape[2:])
        if not groups:
            if count == 0:
                return self.running_mean, self.running_var
            if count == 1:
                raise ValueError(
                    f"x must have two values a channel at least in training, got shape {tuple(x.shape)}"
                )
        mean, var = ops.channel_moments(x)
        if not groups:
            self._note(mean.detach(), var.detach() * (count / (count - 1)))
            return mean, var
        mean, var, total = moments_of_all(mean, var, mean.new_tensor(float(count)), groups)
        # where no process has a sample
        mean = torch.where(total > 0, mean, self.running_mean)
        var = torch.where(total > 0, var, self.running_var)
        unbiased = torch.where(total > 1, var.detach() * (total / (total - 1)), torch.nan)
        self._note(mean.detach(), unbiased, (total > 0).to(self.batches.dtype))
        return mean, var

    @torch.no_grad()
    def _note(self, mean: Tensor, var: Tensor, some: Tensor | float = 1.0) -> None:
        """Move the running statistics towards those of a batch, but for channels where they are not finite."""
        self.batches.add_(some)
        rate = 1 / self.batches.to(mean.dtype) if self.momentum is None else self.momentum
        known = mean.isfinite() & var.isfinite()
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.add_(torch.where(known, (new - running) * rate, 0.0))

    def _way_back(self, inverse: bool) -> str:
        # in training it notes each batch, and exchanges sums with other processes
        return "call" if self.training else "invert"

    def _chain_link(self) -> Link | None:
        if type(self) is not BatchNorm:
            return None
        link = Link([ActNormStep()])
        link.watch(self, "channels")
        link.waits.append(lambda: self.training)
        link.make(self, ("running_mean", "running_var"), self._of_evaluation)
        return link

    def _of_evaluation(self, inverse: bool) -> Sequence[Tensor]:
        return self._scale_and_bias(self.running_mean, self.running_var)

    def reset_parameters(self) -> None:
        """Forget all batches, as after ``to_empty``."""
        for t, value in (
            (self.log_scale, 0),
            (self.bias, 0),
            (self.running_mean, 0),
            (self.running_var, 1),
        ):
            if t is not None:
                torch.nn.init.constant_(t, value)
        self.batches.zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNorm:
        new = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.process_group)] = new, self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
