"""Volume-preserving affine couplings (GIN)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.nn._base import zero_log_det
from pyflowkern.nn._coupling import Conditioner
from pyflowkern.nn.coupling import AffineCoupling
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap

__all__ = ["GINCoupling"]


class GINCoupling(AffineCoupling):
    r"""Affine coupling that preserves volume: the log-scales of the transformed channels have mean 0.

    .. math:: z_a = x_a, \qquad z_b = e^{\ell}\, x_b + t, \qquad
              \ell_c = \log s(u_c) - \frac{1}{C_b} \sum_{c'} \log s(u_{c'}),

    at each pixel of an image, so that the log-determinant is 0 there.  Of a single transformed channel the scale is 1.

    Args:
        channels: channels ``C`` of the input ``[N, C, *space]``.
        conditioner: as for :class:`AffineCoupling`.
        split: ``"channel"`` or a boolean mask ``[C]``.
        swap: exchange the two parts.
        scale_map: ``s``: a name or a :class:`~pyflowkern.ops.ScaleMap`.

    Raises:
        ValueError: as :class:`AffineCoupling`, and for a split over space or the additive map.
        TypeError: as :class:`AffineCoupling`.

    Source: Sorrenson, Rother and Köthe, "Disentanglement by nonlinear ICA with general incompressible-flow networks
    (GIN)" (2020).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from pyflowkern import nn
        >>> layer = nn.GINCoupling(6, partial(nn.MLP, hidden=16))
        >>> z, log_det = layer(torch.randn(8, 6))
        >>> bool((log_det == 0).all())
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
        over_channels = split.dim() == 1 if isinstance(split, Tensor) else split == "channel"
        if not over_channels:
            raise ValueError(f"split must be 'channel' or a boolean mask [C], got {split!r}")
        super().__init__(channels, conditioner, split=split, swap=swap, scale_map=scale_map)
        if self.scale_map.kind == "additive":
            raise ValueError("scale_map must have a scale, got the additive map")
        given = self.scale_map
        self._exp = ScaleMap(
            "exp",
            shift_first=given.shift_first,
            divide=given.divide,
            shift_gain=given.shift_gain,
        )

    def _chain_link(self) -> Link | None:
        if type(self) is not GINCoupling or (link := self._affine_link(centred=True)) is None:
            return None
        link.watch(self, "_exp")
        return link

    def _move(
        self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        shift, raw = params.chunk(2, 1)
        log_scale = self.scale_map.log_scale(raw)
        if mask is None or self.sizes[0] == 0:
            log_scale = log_scale - log_scale.mean(1, keepdim=True)
        else:  # parameters of the channels that pass are not looked at
            moved = mask.view(-1, *[1] * (x.dim() - 2))
            kept = torch.where(moved, log_scale, 0.0)
            log_scale = kept - kept.sum(1, keepdim=True) / moved.sum()
        z, _ = ops.affine_coupling(
            x,
            torch.cat([shift, log_scale], 1),
            split="channel" if mask is None else mask,
            swap=self.swap and mask is None,
            scale_map=self._exp,
            inverse=inverse,
        )
        return z, zero_log_det(x)
