"""ActNorm: a learned scale and bias per channel, set by the first batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pyflowkern import ops
from pyflowkern._library import transformed
from pyflowkern.core.checks import check_channels, check_count
from pyflowkern.nn._base import Bijection
from pyflowkern.nn._ranks import moments_of_all, process_groups, write_parameters
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = ["ActNorm"]


class ActNorm(Bijection):
    r"""Scale and shift each channel: :math:`z = \exp(\ell)\,(x + b)`.

    The log-determinant is :math:`|\text{space}| \sum_c \ell_c`.

    The first training batch sets :math:`\ell` and ``b`` such that the output has mean 0 and variance 1
    in each channel.  That is the first batch through :meth:`forward` in training mode, or through
    :meth:`inverse` in training mode while gradients are recorded, as for a reverse KL divergence
    (drawing samples without gradients does not count).  Until then the layer is the identity.

    This initialization happens once.  It does not change parameters that are no longer zero, such as
    those of a loaded or averaged model; the flag ``initialized`` is saved, so that a resumed run does
    not initialize again.  It waits for the device once, and once more after a state_dict was loaded.
    A channel that is constant or whose variance overflows keeps its scale.  Samples that hold NaN or
    inf are left out, and a batch without finite samples initializes nothing.  Under torch.compile only
    the first call can initialize, in a graph of its own.

    Processes that train one model together (under ``DistributedDataParallel`` or ``fully_shard``) use
    the statistics of the data of all of them, and so agree.  After the initialization they exchange
    nothing.  Other ways to train in several processes need ``process_group``.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        process_group: processes that initialize together, such as
            ``torch.distributed.group.WORLD``; all of them must run their first training batch.
            None for those named above, or where there are none, only this process.  Not pickled.

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
    process_group: Any = None

    #: Whether the host knows that the layer is initialized; False where it has to read the flag.
    _started = False

    def __init__(self, channels: int, *, process_group: Any = None) -> None:
        super().__init__()
        channels = check_count("channels", channels)
        self.channels, self.process_group = channels, process_group
        self.log_scale = torch.nn.Parameter(torch.zeros(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        # a number and no bool: averaging the buffers of models must not fail
        self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        self.initialize(x)
        return ops.actnorm(x, *self.scale_and_bias())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        self.initialize(z, inverse=True)
        return ops.actnorm(z, *self.scale_and_bias(), inverse=True)

    def _chain_link(self) -> Link | None:
        if type(self) is not ActNorm:
            return None
        link, names = Link([ActNormStep()]), ("log_scale", "bias")
        if self.awaits_first_batch():
            self._look()  # a run that was resumed takes the same path as one that was not interrupted
        if self._started:
            link.watch(self, "channels", "_started")
            link.read(self, *names)
            return link
        link.watch(self, "channels")
        link.make(self, names, lambda inverse: self.scale_and_bias())
        link.waits.append(self.awaits_first_batch)
        link.holds.append(lambda: not self._started)
        return link

    def awaits_first_batch(self, *, inverse: bool = False) -> bool:
        """Whether the next data in this direction would be the first training data."""
        return not self._started and self.training and (not inverse or torch.is_grad_enabled())

    def initialize(self, x: Tensor, *, inverse: bool = False) -> None:
        """Set scale and bias from ``x`` if it is the first training data, on its way in this direction."""
        # tested outside of no_grad: an exported graph with an empty no_grad block cannot be loaded
        if self.awaits_first_batch(inverse=inverse):
            self._start(x, inverse)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return the parameters; before the initialization copies, as it writes to what a graph may hold."""
        if self._started or not torch.is_grad_enabled():
            return self.log_scale, self.bias
        return self.log_scale.clone(), self.bias.clone()

    def _is_set(self) -> Tensor:
        """Whether the parameters are no longer those of a new layer."""
        return (self.initialized != 0) | self.log_scale.any() | self.bias.any()

    @torch.no_grad()
    def _look(self) -> bool:
        """Find out whether the layer is initialized, which waits for the device; False where nobody may look."""
        if not _can_look(self.initialized) or not bool(self._is_set()):
            return False
        self.initialized.fill_(1)
        # in a functional call other tensors replace the parameters, and their values say nothing about them
        self._started = isinstance(self.log_scale, torch.nn.Parameter)
        return True

    @torch.no_grad()
    def _start(self, x: Tensor, inverse: bool) -> None:
        if self._look():
            return
        is_set, looks = self._is_set(), _can_look(self.initialized)
        own = isinstance(self.log_scale, torch.nn.Parameter)
        given = self.process_group
        groups = process_groups(self) if given is None else [given]
        if x.numel() == 0 and not groups:
            return
        mean, var, count = moments_of_all(*_finite_moments(x), groups)
        # a spread below the rounding of the mean is no spread
        spread = var > (torch.finfo(torch.float32).eps * mean).square()
        log_scale = torch.where(spread & var.isfinite(), -0.5 * torch.log(var), 0.0)
        bias = torch.where(mean.isfinite(), -mean, 0.0)
        if inverse:  # z e^-l - b is to have mean 0 and variance 1
            log_scale, bias = -log_scale, -bias * torch.exp(log_scale)
        keeps = is_set | (count == 0)
        values = {"log_scale": log_scale, "bias": bias}
        write_parameters(
            self, {k: torch.where(keeps, getattr(self, k), v) for k, v in values.items()}
        )
        self.initialized.logical_or_(count > 0)
        self._started = own and (not looks or bool(self.initialized))

    def reset_parameters(self) -> None:
        """Make the layer the identity that waits for its first data, as after ``to_empty``."""
        torch.nn.init.zeros_(self.log_scale)
        torch.nn.init.zeros_(self.bias)
        self.initialized.zero_()
        self._started = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._started = False  # the flag that comes may be either
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ActNorm:
        new = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.process_group)] = new, self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _can_look(t: Tensor) -> bool:
    """Whether the host may read a value of the tensor now."""
    if torch.compiler.is_compiling() or transformed() or t.is_meta or isinstance(t, FakeTensor):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _finite_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance per channel of the samples without NaN and inf, and their elements a channel."""
    finite = x.isfinite().flatten(1).all(1)
    rows = finite.view(-1, *[1] * (x.dim() - 1))
    mean = ops.channel_moments(x.masked_fill(~rows, 0.0))[0]
    count = finite.sum().to(mean.dtype)
    factor = x.shape[0] / count
    # what is left out is replaced by the mean of the others, which adds nothing to the sum of squares
    fill = (mean * factor).view(-1, *[1] * (x.dim() - 2))
    mean, var = ops.channel_moments(torch.where(rows, x, fill))
    return mean, var * factor, count * x.shape[2:].numel()
