"""RealNVP: checkerboard and channel couplings on images, residual networks on vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributions import Distribution

from pyflowkern.core.checks import check_count
from pyflowkern.flows._arguments import (
    ConditionerFactory,
    check_counts,
    parse_event,
    taking_context,
)
from pyflowkern.flows._base import Flow
from pyflowkern.flows._build import check_space, squeezed
from pyflowkern.nn import (
    ActNorm,
    AffineCoupling,
    Bijection,
    MultiScale,
    ResidualConvNet,
    ResidualMLP,
    Sequential,
    Split,
    Squeeze,
    checkerboard_mask,
)
from pyflowkern.ops import ScaleMap

__all__ = ["RealNVP"]


class RealNVP(Flow):
    r"""RealNVP: affine couplings with alternating masks, in a multi-scale architecture on images.

    A coupling is :math:`z_a = x_a, z_b = s(u)\, x_b + t` with :math:`(t, u) = g(x_a, \text{context})`.
    Each level has ``steps`` checkerboard couplings, a squeeze, ``steps`` channel couplings, and
    makes latents of half of the channels; the last has only ``steps + 1`` checkerboard couplings.
    ActNorm replaces the original's batch normalisation, which would let one sample change
    another's density.  On vectors there are ``steps`` couplings of alternating halves, with
    residual MLPs.

    Args:
        event_shape: ``(C, *space)`` with 1 to 3 spatial axes, or a dimension ``D``
            for vectors.
        levels: number of levels (not for vectors); ``2 ** levels`` must divide each spatial size.
        steps: couplings of one kind a level.
        hidden: width of the conditioners.
        blocks: residual blocks of a conditioner.
        context_features: size ``K`` of the context ``[N, K]``; 0 for an unconditional flow.
        bits: bits a pixel of uint8 data (see :class:`Flow`); None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        scale_map: scale of the couplings: a name or a :class:`~pyflowkern.ops.ScaleMap`.
        conditioner: factory ``(in, out) -> module`` in place of the residual networks.
        base: the latent's distribution (see :class:`Flow`); None for the standard normal.
        memory: ``"stored"``, or ``"reversible"`` to make activations again in the backward pass, by the inverses of the
            layers, in place of keeping them: see :class:`~pyflowkern.nn.Sequential`.

    Raises:
        TypeError: for counts that are no ints, and a conditioner whose networks do not take the context.
        ValueError: for sizes that do not divide, a count below 1, or a base of another shape.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.RealNVP(2, steps=4, hidden=16)
        >>> (-flow.log_prob(torch.randn(32, 2)).mean()).backward()
        >>> tuple(flow.sample(5).shape)
        (5, 2)
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        levels: int = 2,
        steps: int = 3,
        hidden: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        bits: int | None = None,
        alpha: float = 0.05,
        scale_map: str | ScaleMap = "tanh",
        conditioner: ConditionerFactory | None = None,
        base: torch.nn.Module | Distribution | None = None,
        memory: str = "stored",
    ) -> None:
        shape = parse_event(event_shape)
        levels, steps, hidden = check_counts(levels=levels, steps=steps, hidden=hidden)
        context_features = check_count("context_features", context_features, 0)
        options: dict[str, Any] = {
            "hidden": hidden,
            "blocks": check_count("blocks", blocks, 0),
            "context_features": context_features,
        }
        vector = len(shape) == 1
        if conditioner is None:
            conditioner = (
                partial(ResidualMLP, **options)
                if vector
                else partial(ResidualConvNet, spatial_dims=len(shape) - 1, **options)
            )
        conditioner = taking_context(conditioner, context_features)
        coupling = partial(AffineCoupling, conditioner=conditioner, scale_map=scale_map)
        if vector:
            layers = _channel_couplings(shape[0], steps, coupling)
            bijection: Bijection = Sequential(*layers, memory=memory)
        else:
            check_space(shape, levels)
            bijection = _multi_scale(shape, levels, steps, coupling, memory)
        super().__init__(
            bijection,
            shape,
            base=base,
            bits=bits,
            alpha=alpha,
            context_features=context_features,
        )


def _multi_scale(
    shape: tuple[int, ...],
    levels: int,
    steps: int,
    coupling: Callable[..., Bijection],
    memory: str,
) -> MultiScale:
    stack: list[Bijection] = []
    splits: list[Split] = []
    event = shape
    for i in range(levels):
        last = i == levels - 1
        layers = _checkerboard_couplings(event, steps + last, coupling)
        if not last:
            event = squeezed(event)
            layers += [Squeeze(), *_channel_couplings(event[0], steps, coupling)]
            split = Split(event[0])
            splits.append(split)
            event = (split.kept, *event[1:])
        stack.append(Sequential(*layers, memory=memory))
    return MultiScale(shape, stack, splits)


def _checkerboard_couplings(
    event: tuple[int, ...], steps: int, coupling: Callable[..., Bijection]
) -> list[Bijection]:
    layers: list[Bijection] = []
    for i in range(steps):
        layers += [
            ActNorm(event[0]),
            coupling(event[0], split=checkerboard_mask(event), swap=i % 2 == 1),
        ]
    return layers


def _channel_couplings(
    channels: int, steps: int, coupling: Callable[..., Bijection]
) -> list[Bijection]:
    layers: list[Bijection] = []
    for i in range(steps):
        layers += [ActNorm(channels), coupling(channels, swap=i % 2 == 1)]
    return layers
