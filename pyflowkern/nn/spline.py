"""Spline layers: couplings whose elements go through monotonic splines, and shifts of a circle."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import (
    check_channels,
    check_count,
    check_flag,
    check_number,
    check_real,
)
from pyflowkern.nn._base import Bijection, zero_log_det
from pyflowkern.nn._chain_networks import coupling_network
from pyflowkern.nn._coupling import Conditioner, Coupling, build_conditioner, condition
from pyflowkern.nn._last_layer import start_at
from pyflowkern.nn.links import Link
from pyflowkern.ops import SplineMap
from pyflowkern.ops.chain_steps import ElementsStep, ShiftStep
from pyflowkern.ops.elements import wrapped

__all__ = ["CircularShift", "SplineCoupling"]


class SplineCoupling(Coupling):
    r"""Spline coupling: one part of ``x`` decides the splines that the other goes through.

    .. math:: z_a = x_a, \qquad z_b = \tau(x_b; \theta), \qquad \theta = g(x_a, \text{context}).

    The log-determinant is :math:`\sum \log \tau'`.  With the conditioners of this package a new layer
    is the identity: their last layer is zero but for a bias, :meth:`SplineMap.identity_raw`.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        conditioner: ``g``: a module, or a factory ``(in_channels, out_channels) -> module``, called
            as :class:`AffineCoupling` calls it.  It returns the ``P`` raw numbers of each
            transformed channel side by side on the channel axis.  For a channel split or a mask of
            channels it reads the channels that pass and returns parameters of those that are
            transformed; for masks over space it reads all of ``x``, zero where transformed, and
            returns parameters of all channels.
        split: ``"channel"``, ``"checkerboard"`` or a boolean mask ``[C]`` or ``[C, *space]``,
            True where transformed.  A channel split transforms the last ``C // 2`` channels; of one
            channel it transforms that one, and ``g`` reads no channel but the context alone.
        swap: exchange the two parts.
        spline: which splines; None for a :class:`~pyflowkern.ops.SplineMap` of the options.
        unconditional: whether the passing channels also go through splines, one for each channel,
            whose raw numbers are parameters of the layer; the conditioner reads them before that.
        **options: arguments of :class:`~pyflowkern.ops.SplineMap`: ``bins=8``, ``bound=3.0``, ...

    Raises:
        ValueError: for less than one channel, an unknown split, a mask of another size or one that
            leaves a part without channels, wrong options, or options beside a ``spline``.
        TypeError: for a conditioner that cannot be called, a mask that is not boolean, or a
            ``spline`` that is no SplineMap; and for a context given to a conditioner that takes none.

    Source: Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows" (2019).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyflowkern import nn
        >>> layer = nn.SplineCoupling(4, partial(nn.MLP, hidden=16), bins=5, bound=4.0)
        >>> x = torch.randn(8, 4)
        >>> z, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(z)[0], x, atol=1e-5))
        True
    """

    def __init__(
        self,
        channels: int,
        conditioner: Conditioner,
        *,
        split: str | Tensor = "channel",
        swap: bool = False,
        spline: SplineMap | None = None,
        unconditional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(channels, split, swap, compact=True)
        self.spline = _spline_map(spline, options)
        passes, moves = self.sizes
        self.conditioner = build_conditioner(conditioner, passes, moves * self.spline.params)
        identity = self.spline.identity_raw()
        if not isinstance(conditioner, torch.nn.Module):  # the user's own module keeps its weights
            start_at(self.conditioner, identity.repeat(moves))
        check_flag("unconditional", unconditional)
        own = unconditional and passes > 0
        self.unconditional = torch.nn.Parameter(identity.repeat(passes)) if own else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.channels)
        mask = self._mask_for(x)
        params = condition(self.conditioner, self._passing(x, mask), context)
        z, log_det = self._splines(x, params, mask, passing=False, inverse=False)
        if self.unconditional is None:
            return z, log_det
        own = _for_all(self.unconditional, z)
        z, more = self._splines(z, own, mask, passing=True, inverse=False)
        return z, log_det + more

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        mask = self._mask_for(z)
        more: Tensor | None = None
        if self.unconditional is not None:
            own = _for_all(self.unconditional, z)
            z, more = self._splines(z, own, mask, passing=True, inverse=True)
        params = condition(self.conditioner, self._passing(z, mask), context)
        x, log_det = self._splines(z, params, mask, passing=False, inverse=True)
        return x, log_det if more is None else log_det + more

    def _move(
        self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return self._splines(x, params, mask, passing=False, inverse=inverse)

    def _made_again(self, *call: Any) -> Any:
        # with splines of its own the part that passes is not the same in input and output
        return None if self.unconditional is not None else super()._made_again(*call)

    def _chain_link(self) -> Link | None:
        parts = self._vector_parts()
        if type(self) is not SplineCoupling or parts is None:
            return None
        link = Link()
        link.watch(self, *self._facts, "spline")
        net = coupling_network(self.conditioner, link)
        step = None if net is None else self._elements(self.spline, net, parts)
        if step is None:
            return None
        link.steps.append(step)
        if self.unconditional is None:
            link.absent.append((self, "unconditional"))
        else:
            link.steps.append(ElementsStep(self.spline, parts[0]))
            link.read(self, "unconditional")
        return link

    def _splines(
        self, x: Tensor, params: Tensor, mask: Tensor | None, passing: bool, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.spline_coupling(
            x,
            params,
            self.spline,
            split="channel" if mask is None else mask,
            swap=(self.swap and mask is None) ^ passing,
            inverse=inverse,
        )


class CircularShift(Bijection):
    r"""Rotate each channel, an angle, by a learned amount: :math:`z_c = x_c + s_c` modulo :math:`2 B`.

    A circular spline maps the ends of its interval, which are one point of the circle, to themselves.
    With shifts between splines each of them fixes another point.  The log-determinant is 0.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        bound: ``B``, half the circle's length: results are in ``[-B, B)``.
        shift: initial ``s``, a number or ``[C]``.
        learned: whether ``s`` is a parameter; if not, it is a constant.

    Raises:
        ValueError: for less than one channel, a bound that is not positive, a shift of another shape.
        TypeError: for channels that are not an int, or ``learned`` that is no bool.

    Source: Rezende et al., "Normalizing Flows on Tori and Spheres" (2020).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.CircularShift(1, bound=2.0, shift=1.5)
        >>> layer(torch.tensor([[-1.0], [0.0], [1.0]]))[0].flatten().tolist()
        [0.5, 1.5, -1.5]
    """

    shift: Tensor

    def __init__(
        self,
        channels: int,
        *,
        bound: float = torch.pi,
        shift: float | Tensor = 0.0,
        learned: bool = True,
    ) -> None:
        super().__init__()
        channels = check_count("channels", channels)
        check_flag("learned", learned)
        bound = check_number("bound", bound)
        if not 0 < bound < torch.inf:
            raise ValueError(f"bound must be positive and finite, got {bound}")
        self.channels, self.bound = channels, bound
        if isinstance(shift, Tensor):
            check_real("shift", shift)
        amount = torch.as_tensor(shift, dtype=torch.get_default_dtype())
        if amount.dim() and tuple(amount.shape) != (channels,):
            raise ValueError(
                f"shift must be a number or have shape ({channels},), got {tuple(amount.shape)}"
            )
        amount = amount.expand(channels).clone()
        if learned:
            self.shift = torch.nn.Parameter(amount)
        else:
            self.register_buffer("shift", amount)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``, the latter 0."""
        check_channels("x", x, self.channels)
        return wrapped(x + self._amount(x), self.bound), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.channels)
        return wrapped(z - self._amount(z), self.bound), zero_log_det(z)

    def _chain_link(self) -> Link | None:
        if type(self) is not CircularShift:
            return None
        link = Link([ShiftStep(self.bound)])
        link.watch(self, "channels", "bound")
        link.read(self, "shift")
        return link

    def _amount(self, x: Tensor) -> Tensor:
        return self.shift.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)


def _for_all(params: Tensor, x: Tensor) -> Tensor:
    """Return parameters of the channels for every sample and position of ``x``, as a view."""
    own = params.view(1, -1, *[1] * (x.dim() - 2))
    return own.expand(x.shape[0], -1, *x.shape[2:])


def _spline_map(spline: SplineMap | None, options: dict[str, Any]) -> SplineMap:
    known = [f.name for f in fields(SplineMap) if f.init]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"SplineCoupling takes no argument {unknown[0]!r}; of splines it takes {', '.join(known)}, and a network's "
            "are given with it, as by functools.partial(nn.MLP, hidden=64)"
        )
    if spline is None:
        return SplineMap(**options)
    if not isinstance(spline, SplineMap):
        raise TypeError(f"spline must be a SplineMap, got {type(spline).__name__}")
    if options:
        raise ValueError(f"give options ({', '.join(options)}) or a spline, not both")
    return spline
