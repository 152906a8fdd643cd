"""Coupling layers: one part of the input decides how the other is moved and scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_channels
from pyflowkern.nn._base import Bijection, zero_log_det
from pyflowkern.nn._chain_networks import Ends, coupling_network
from pyflowkern.nn._coupling import (
    Conditioner,
    Coupling,
    build_conditioner,
    channel_mask,
    check_split,
    condition,
)
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap, channel_split_sizes, checkerboard_mask

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Conditioner",
    "Split",
    "channel_mask",
    "checkerboard_mask",
]


class AffineCoupling(Coupling):
    r"""Affine coupling: one part of ``x`` decides how the other is scaled and shifted.

    .. math:: z_a = x_a, \qquad z_b = s(u)\, x_b + t, \qquad (t, u) = g(x_a, \text{context}).

    The log-determinant is :math:`\sum \log s(u)`; the conditioner ``g`` is never inverted.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        conditioner: ``g``: a module, or a factory ``(in_channels, out_channels) -> module`` such
            as ``functools.partial(nn.MLP, hidden=64)``.  It is called as ``g(x_a)``, or
            ``g(x_a, context)`` when the layer is given a context, and returns shifts first, then
            raw scales, on the channel axis.  For a channel split it reads the channels that pass
            and returns parameters of those that are transformed; for masks it reads all of ``x``,
            zero where transformed, and returns parameters of all channels.
        split: ``"channel"``, ``"checkerboard"`` or a boolean mask ``[C]`` or ``[C, *space]``,
            True where transformed.  A channel split transforms the last ``C // 2`` channels; of one
            channel it transforms that one, and ``g`` reads no channel but the context alone.
        swap: exchange the two parts.
        scale_map: how ``u`` becomes a scale: a name or a :class:`~pyflowkern.ops.ScaleMap`.

    Raises:
        ValueError: for less than one channel, an unknown split or map, a mask of another size.
        TypeError: for a conditioner that cannot be called, a mask that is not boolean, a swap that is no bool,
            and a context given to a conditioner that takes none.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyflowkern import nn
        >>> layer = nn.AffineCoupling(4, partial(nn.MLP, hidden=16))
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
        scale_map: str | ScaleMap = "tanh",
    ) -> None:
        super().__init__(channels, split, swap, compact=False)
        self.scale_map = ops.scale_map(scale_map)
        per_element = 1 if self.scale_map.kind == "additive" else 2
        passes, moves = self.sizes
        self.conditioner = build_conditioner(conditioner, passes, per_element * moves)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``[N, C, *space]``; return ``(z, log_det[N])``."""
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        return self._run(z, context, inverse=True)

    def _chain_link(self) -> Link | None:
        return self._affine_link() if type(self) in (AffineCoupling, AdditiveCoupling) else None

    def _affine_link(self, centred: bool = False) -> Link | None:
        """Return what the layer is in a chain; ``centred``: its log-scales have mean 0."""
        link, ends, parts = Link(), None, self._vector_parts()
        if parts is None:  # a mask, whose network reads and returns all channels
            if (mask := self.mask) is None or mask.dim() != 1 or mask.all() or not mask.any():
                return None
            passing, moved = (m.nonzero().flatten() for m in (~mask, mask))
            parts = passing.tolist(), moved.tolist()
            size = self.channels
            additive = self.scale_map.kind == "additive"
            outputs = moved if additive else torch.cat([moved, moved + size])
            ends = Ends(passing, outputs, (size, size if additive else 2 * size))
        link.watch(self, *self._facts, "scale_map")
        net = coupling_network(self.conditioner, link, ends)
        form = "blocked", centred
        step = None if net is None else self._elements(self.scale_map, net, parts, *form)
        if step is None:
            return None
        link.steps.append(step)
        return link

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_channels("z" if inverse else "x", x, self.channels)
        mask = self._mask_for(x)
        params = condition(self.conditioner, self._passing(x, mask), context)
        return self._move(x, params, mask, inverse)

    def _move(
        self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            x,
            params,
            split="channel" if mask is None else mask,
            swap=self.swap and mask is None,
            scale_map=self.scale_map,
            inverse=inverse,
        )


class AdditiveCoupling(AffineCoupling):
    r"""Additive coupling, which preserves volume: :math:`z_a = x_a,\; z_b = x_b + g(x_a)`; its log-determinant is 0.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        conditioner: as for :class:`AffineCoupling`, but it returns only shifts.
        split: as for :class:`AffineCoupling`.
        swap: exchange the two parts.

    Raises:
        ValueError: as :class:`AffineCoupling`.
        TypeError: as :class:`AffineCoupling`.

    Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2014).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyflowkern import nn
        >>> mask = nn.channel_mask(4, interleaved=True)
        >>> layer = nn.AdditiveCoupling(4, partial(nn.MLP, hidden=16), split=mask)
        >>> layer(torch.randn(3, 4))[1].tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        channels: int,
        conditioner: Conditioner,
        *,
        split: str | Tensor = "channel",
        swap: bool = False,
    ) -> None:
        super().__init__(channels, conditioner, split=split, swap=swap, scale_map="additive")


class Split(Bijection):
    r"""Factor out half of the channels, standardised by a prior learned from the half that stays.

    .. math::
        z_a = x_a, \qquad z_b = (x_b - \mu(x_a)) / \sigma(x_a), \qquad
        \log\det = -\sum \log\sigma .

    So one standard normal base fits all levels of a multi-scale flow, and the prior's scale is part
    of the log-determinant.  The output keeps all channels; :meth:`partition` divides it into the
    input of the next level and the latent, :meth:`join` puts the two together again.

    Args:
        channels: channels ``C`` of the input; ``C // 2`` of them become latent.
        conditioner: the prior: a module or factory as for :class:`AffineCoupling`, returning
            means first, then raw scales; None for a fixed standard normal prior.
        scale_map: how the raw scale becomes ``sigma``.  The default bounds ``|log sigma|`` by
            6.9, so that samples of a partly trained model stay finite.

    Raises:
        ValueError: for fewer than 2 channels, or an unknown map.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyflowkern import nn
        >>> split = nn.Split(4, partial(nn.ConvNet, hidden=8))
        >>> y, log_det = split(torch.randn(2, 4, 8, 8))
        >>> kept, latent = split.partition(y)
        >>> tuple(kept.shape), tuple(latent.shape)
        ((2, 2, 8, 8), (2, 2, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        conditioner: Conditioner | None = None,
        *,
        scale_map: str | ScaleMap = "softclip",
    ) -> None:
        super().__init__()
        self.channels = channels = check_split("channel", channels)
        self.kept, self.factored = channel_split_sizes(channels)
        self.scale_map = ops.scale_map(scale_map)
        per_element = 1 if self.scale_map.kind == "additive" else 2
        self.prior = (
            None
            if conditioner is None
            else build_conditioner(conditioner, self.kept, per_element * self.factored)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardise the last ``C // 2`` channels; return ``(z, log_det[N])``."""
        return self._run("x", x, context, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        return self._run("z", z, context, inverse=False)

    def partition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(kept, latent)`` of the output, as views."""
        return z[:, : self.kept], z[:, self.kept :]

    def join(self, kept: Tensor, latent: Tensor) -> Tensor:
        """Return the input of :meth:`inverse` from its two parts."""
        return torch.cat([kept, latent], 1)

    def _run(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_channels(name, x, self.channels)
        if self.prior is None:
            return x, zero_log_det(x)
        params = condition(self.prior, x[:, : self.kept], context)
        return ops.affine_coupling(x, params, scale_map=self.scale_map, inverse=inverse)
