"""Spline couplings whose channels have splines of their own kinds, tails and bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_channels, check_list
from pyflowkern.core.structure import Structure
from pyflowkern.nn._chain_networks import coupling_network
from pyflowkern.nn._coupling import Conditioner, Coupling, build_conditioner, condition
from pyflowkern.nn._last_layer import start_at
from pyflowkern.nn.links import Link
from pyflowkern.ops import SplineMap

__all__ = ["MixedSplineCoupling"]


class _Group:
    """The transformed channels that one op takes together: splines that differ in their bounds at most."""

    def __init__(self, spline: SplineMap, channels: list[int], columns: list[int]) -> None:
        self.spline = spline
        self.channels = Structure(torch.tensor(channels, device="cpu"))
        self.columns = Structure(torch.tensor(columns, device="cpu"))
        #: Bounds of the channels, where they are not that of the spline.
        self.bounds: Structure | None = None


class MixedSplineCoupling(Coupling):
    r"""Spline coupling of vectors in which each channel has a spline of its own: some may be angles, others not.

    .. math:: z_a = x_a, \qquad z_c = \tau_c(x_c; \theta_c) \text{ for } c \in b, \qquad
              (\theta_c)_{c \in b} = g(x_a, \text{context}).

    One op runs for all channels whose splines differ in their bounds at most.  A new layer is the identity, as of
    :class:`SplineCoupling`.

    Args:
        channels: channels ``C`` of the input ``[N, C]``.
        conditioner: ``g``, as for :class:`SplineCoupling`: it returns the raw numbers of each transformed channel, one
            channel after the other, which may have different numbers of them.
        splines: a :class:`~pyflowkern.ops.SplineMap` for each of the ``C`` channels, also of those that pass.
        split: ``"channel"`` or a boolean mask ``[C]``, True where transformed.
        swap: exchange the two parts.

    Raises:
        ValueError: for another number of splines, a split over space, and as :class:`SplineCoupling`.
        TypeError: for splines that are none, and as :class:`SplineCoupling`.

    Source: Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows" (2019); channels that are angles beside
    others: Rezende et al., "Normalizing Flows on Tori and Spheres" (2020), Stimper et al., "normflows" (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> from pyflowkern.ops import SplineMap
        >>> angle = SplineMap(bins=4, tails="circular", bound=torch.pi)
        >>> splines = [angle, SplineMap(bins=4), angle, SplineMap(bins=4, bound=8.0)]
        >>> layer = nn.MixedSplineCoupling(4, nn.MLP, splines)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.allclose(layer(x)[0], x, atol=1e-5))
        True
    """

    def __init__(
        self,
        channels: int,
        conditioner: Conditioner,
        splines: Sequence[SplineMap],
        *,
        split: str | Tensor = "channel",
        swap: bool = False,
    ) -> None:
        over_channels = split.dim() == 1 if isinstance(split, Tensor) else split == "channel"
        if not over_channels:
            raise ValueError(f"split must be 'channel' or a boolean mask [C], got {split!r}")
        super().__init__(channels, split, swap, compact=True)
        check_list("splines", splines)
        for i, spline in enumerate(splines):
            if not isinstance(spline, SplineMap):
                raise TypeError(f"splines[{i}] must be a SplineMap, got {type(spline).__name__}")
        if len(splines) != self.channels:
            raise ValueError(f"splines must be {self.channels}, one a channel, got {len(splines)}")
        self.splines = tuple(splines)
        parts = self._vector_parts()
        assert parts is not None
        passing, moved = parts
        #: The channels that are transformed, in the order of their parameters.
        self.moved = moved
        self._groups = _grouped(self.splines, moved)
        order = [*passing, *(c for g in self._groups for c in g.channels.host.tolist())]
        self._passing_channels = Structure(torch.tensor(passing, dtype=torch.int64, device="cpu"))
        self._back = Structure(torch.tensor(order, device="cpu").argsort())
        identity = torch.cat([self.splines[c].identity_raw() for c in moved])
        self.conditioner = build_conditioner(conditioner, len(passing), len(identity))
        if not isinstance(conditioner, torch.nn.Module):  # the user's own module keeps its weights
            start_at(self.conditioner, identity)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``[N, C]``; return ``(z, log_det[N])``."""
        return self._run("x", x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        return self._run("z", z, context, inverse=True)

    def _made_again(self, *call: Any) -> None:
        return None  # its parameters lie otherwise

    def _chain_link(self) -> Link | None:
        parts = self._vector_parts()
        if type(self) is not MixedSplineCoupling or parts is None:
            return None
        link = Link()
        link.watch(self, *self._facts, "splines", "moved", "_groups")
        net = coupling_network(self.conditioner, link)
        maps = [self.splines[c] for c in parts[1]]
        step = None if net is None else self._elements(maps, net, parts)
        if step is None:
            return None
        link.steps.append(step)
        return link

    def _run(
        self, name: str, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_channels(name, x, self.channels)
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [N, {self.channels}], got {tuple(x.shape)}")
        passing = x.index_select(1, self._passing_channels.on(x.device))
        params = condition(self.conditioner, passing, context)
        outputs, total = [passing], None
        for group in self._groups:
            y, log_det = _run_group(group, x, params, inverse)
            outputs.append(y)
            total = log_det if total is None else total + log_det
        assert total is not None
        return torch.cat(outputs, 1).index_select(1, self._back.on(x.device)), total


def _grouped(splines: Sequence[SplineMap], moved: list[int]) -> list[_Group]:
    """Return the groups of the transformed channels, and where among the parameters theirs lie."""
    found: dict[SplineMap, list[tuple[int, int]]] = {}
    at = 0
    for c in moved:
        spline = splines[c]
        # of a learned interval the least sizes are absolute, and without tails there is no bound
        free = spline.parameterization != "domain" and spline.tails != "none"
        key = dataclasses.replace(spline, bound=1.0) if free else spline
        found.setdefault(key, []).append((c, at))
        at += spline.params
    groups = []
    for key, members in found.items():
        channels = [c for c, _ in members]
        columns = [start + i for _, start in members for i in range(key.params)]
        bounds = [splines[c].bound for c in channels]
        alike = len(set(bounds)) == 1
        group = _Group(splines[channels[0]] if alike else key, channels, columns)
        if not alike:
            group.bounds = Structure(torch.tensor(bounds, dtype=torch.float64, device="cpu"))
        groups.append(group)
    return groups


def _run_group(group: _Group, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    part = x.index_select(1, group.channels.on(x.device))
    own = params.index_select(1, group.columns.on(x.device))
    own = own.view(*part.shape, group.spline.params)
    if group.bounds is None:
        return ops.spline(part, own, group.spline, inverse=inverse)
    # f_B(x) = B f_1(x / B), whose derivative is that of f_1
    bounds = group.bounds.on(x.device).to(x.dtype)
    y, log_det = ops.spline(part / bounds, own, group.spline, inverse=inverse)
    return y * bounds, log_det
