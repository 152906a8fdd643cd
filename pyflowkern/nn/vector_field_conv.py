r"""Convolutional vector fields :math:`f(t, x)` on images, with their divergence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern._library import transformed
from pyflowkern.core.checks import check_context, check_count
from pyflowkern.core.dtypes import accumulation_dtype, cast, full_precision
from pyflowkern.nn._fields import (
    add_context,
    as_time,
    call_layers,
    check_field,
    parameters_of,
    work_dtype,
)
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.nn._stacked import StackedField
from pyflowkern.ops.field_layer import activate_layer, spread
from pyflowkern.ops.field_time import at_time

__all__ = ["VectorFieldConv"]

SIDE = 3  # of the convolutions' kernels


class VectorFieldConv(StackedField):
    r"""Convolutions :math:`f(t, x)` on images, whose velocity and divergence are one pass.

    Layers are :math:`h = \sigma(W * h + b)`, with kernels of side 3 and zeros around the image, the
    last without :math:`\sigma`.  Time enters nowhere ("none"), as a further channel of every layer
    ("concat"), or as "concatsquash",
    :math:`(W * h + b) \odot \mathrm{sigmoid}(t u + c) + t v`: FFJORD's layers.  Primal and tangents
    go through one convolution a layer, stacked along the batch, and one
    :func:`~pyflowkern.ops.field_layer`; on the CPU channels_last.

    An exact divergence takes a tangent for each of the ``C H W`` dimensions, in chunks such that the
    widest layer's values for one chunk are at most 2^24 numbers (64 MiB in float32); where there are
    several chunks, the backward pass computes them again.

    Args:
        channels: ``C`` of states ``[N, C, H, W]``.
        hidden: channels of the hidden layers.
        activation: "tanh", "softplus", "silu" or "gelu".
        time: "none", "concat" or "concatsquash".
        context_features: size ``K`` of a context ``[N, K]``, which each layer turns into a bias of
            every sample and channel; 0 for none.

    Raises:
        TypeError: for a context size that is not an int.
        ValueError: for sizes below 1, an unknown activation or kind of time; when called, for layers
            that were replaced and do not fit each other.

    Where a layer was replaced or has hooks (also those of pruning and of the old ``weight_norm``), the layers are
    called one by one, and the divergence comes from reverse-mode products as in :class:`VectorField`.  That is slower,
    and the estimates of ``frobenius`` are then :math:`|e^T J|^2`, which has the same mean.

    Source: Grathwohl et al. 2019, *FFJORD: Free-form Continuous Dynamics for Scalable Reversible
    Generative Models*.

    Example:
        >>> import torch
        >>> from pyflowkern import nn, ops
        >>> field, x = nn.VectorFieldConv(3, (8, 8), time="concat"), torch.randn(5, 3, 4, 4)
        >>> probe = ops.draw_probe(x)
        >>> velocity, divergence = field.velocity_and_divergence(0.5, x, probe=probe)
        >>> tuple(velocity.shape), tuple(divergence.shape)
        ((5, 3, 4, 4), (5,))
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        time: str = "none",
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        sizes = check_field("channels", channels, hidden, activation, time)
        context_features = check_count("context_features", context_features, 0)
        self.channels, self.hidden = sizes[0], tuple(sizes[1:-1])
        self.activation, self.time, self.context_features = activation, time, context_features
        pairs = list(itertools.pairwise(sizes))
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, SIDE, padding=SIDE // 2) for a, b in pairs
        )

        def uniform(fan: int, *shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape).uniform_(-1, 1) / fan**0.5)

        # for each layer: "concat" has the kernel of the channel t, "concatsquash" has u, c and v
        self.times = torch.nn.ParameterList()
        if time == "concat":
            self.times.extend(uniform(SIDE**2 * a, b, 1, SIDE, SIDE) for a, b in pairs)
        elif time == "concatsquash":
            self.times.extend(uniform(a, 3, b) for a, b in pairs)
        self.contexts = torch.nn.ParameterList(
            uniform(context_features, b, context_features) for _, b in pairs if context_features
        )

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity ``[N, C, H, W]`` at ``t``, a float, a scalar tensor or ``[N]``."""
        self._check(x)
        if not self._may_be_read:
            work = work_dtype(x, self.layers)
            zeros = [x.new_zeros(n, dtype=work) for n in (*self.hidden, self.channels)]
            biases, gates = self._at(as_time(t, x).to(work), x, context, zeros)
            return call_layers(x, list(self.layers), biases, gates, self.activation)
        h, _ = self._run(t, x, None, context)
        return cast(h, x.dtype)

    def _widest(self, height: int, width: int) -> int:
        return max(self.channels, *self.hidden, 0) * height * width

    def _run(
        self, t: Tensor | float, x: Tensor, e: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``f`` and, for probes ``[K, N, C, H, W]``, ``J e``; both in the dtype of the work."""
        weights, biases = parameters_of(self.layers, self.channels)
        work = accumulation_dtype(torch.promote_types(x.dtype, weights[0].dtype))
        n, count = x.shape[0], 0 if e is None else e.shape[0]
        h = cast(x, work)
        if e is not None:
            h = torch.cat([h, cast(e, work).reshape(count * n, *x.shape[1:])])
        if h.device.type == "cpu" and work == torch.float32 and not transformed():
            # oneDNN takes a fifth less time in this layout; to() rather than contiguous(), which keeps
            # the strides of a single channel; not under vmap, which hides an axis that the layout needs
            h = h.to(memory_format=torch.channels_last)
        with full_precision(x):
            biases, gates = self._at(as_time(t, x).to(work), x, context, biases)
            for bias, gate, weight in zip(biases[:-1], gates, weights, strict=False):
                h = F.conv2d(h, cast(weight, work), padding=SIDE // 2)
                h = activate_layer(h, bias, gate, count, self.activation, in_place=True)
            h = F.conv2d(h, cast(weights[-1], work), padding=SIDE // 2)
        return self._output(h, biases[-1], gates[-1], x, count)

    @staticmethod
    def _output(
        p: Tensor, bias: Tensor, gate: Tensor | None, x: Tensor, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``f`` and ``J e`` from the last product, laid out as ``x`` is."""
        primal, tangents = p.split([x.shape[0], count * x.shape[0]]) if count else (p, p)
        bias, factor = spread(bias, p), None if gate is None else spread(gate, p)
        primal = primal + bias if factor is None else torch.addcmul(bias, primal, factor)
        if x.is_contiguous():
            primal, tangents = primal.contiguous(), tangents.contiguous()
        if not count:
            return primal, None
        tangents = tangents.reshape(count, *x.shape)
        return primal, tangents if factor is None else tangents * factor

    def _at(
        self, time: Tensor, x: Tensor, context: Tensor | None, biases: list[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """Return biases and gates of the layers at a time, as :func:`~pyflowkern.ops.field_layer` takes them."""
        work = time.dtype
        biases = [cast(b, work) for b in biases]
        gates: Sequence[Tensor | None] = [None] * len(biases)
        if self.time == "concatsquash":
            biases, gates = at_time(time, biases, [cast(p, work) for p in self.times])
        check_context(context, self.context_features, x)
        if context is not None:
            biases = add_context(biases, context, self.contexts)
        if self.time == "concat":
            # the padding around a channel of t is zero, so its convolution differs at the border
            ones = x.new_ones((1, 1, *x.shape[2:]), dtype=work)
            maps = [F.conv2d(ones, p.to(work), padding=SIDE // 2) for p in self.times]
            time = time[:, None] if time.dim() else time
            pairs = zip(biases, maps, strict=True)
            biases = [b[..., None, None] + time[..., None, None] * m for b, m in pairs]
        return biases, gates

    @property
    def _may_be_read(self) -> bool:
        return may_be_read(self.layers, torch.nn.Conv2d) and all(
            getattr(layer, "stride", None) == (1, 1)
            and getattr(layer, "padding", None) == (SIDE // 2, SIDE // 2)
            for layer in self.layers
        )

    def extra_repr(self) -> str:
        """Return the arguments."""
        given = f"{self.channels}, hidden={self.hidden}, activation={self.activation!r}"
        return f"{given}, time={self.time!r}, context_features={self.context_features}"
