"""Glow: invertible 1x1 convolutions between couplings."""

from __future__ import annotations

from collections.abc import Sequence
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
from pyflowkern.flows._build import check_space, squeeze_levels
from pyflowkern.nn import (
    MLP,
    AffineCoupling,
    Bijection,
    ConvNet,
    GlowStep,
    Sequential,
)
from pyflowkern.ops import ScaleMap

__all__ = ["Glow"]


class Glow(Flow):
    r"""Glow: levels of squeeze, ``steps`` times (ActNorm, 1x1 convolution, coupling), and split.

    .. math:: \log p(x) = \log p_Z(z) + \sum_\text{steps} \Big(|\text{space}|
        \big(\sum_c \ell_c + \log|\det W|\big) + \sum \log s\Big)

    with the log-scales :math:`\ell` of ActNorm, the matrix ``W`` of the convolution and the scales
    ``s`` of the coupling.  On vectors there are no levels: ``steps`` times ActNorm, invertible matrix
    and coupling.

    Args:
        event_shape: ``(C, *space)`` with 1 to 3 spatial axes, or a dimension ``D``
            for vectors.
        levels: number of levels (not for vectors); ``2 ** levels`` must divide each spatial size.
        steps: steps a level.
        hidden: width of the conditioners.
        context_features: size ``K`` of the context ``[N, K]``; 0 for an unconditional flow.
        bits: bits a pixel of uint8 data (see :class:`Flow`); None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        scale_map: scale of the couplings: a name or a :class:`~pyflowkern.ops.ScaleMap`.
        parameterization: of the 1x1 convolutions: ``"plu"``, ``"dense"`` or ``"householder"``.
        conditioner: factory ``(in, out) -> module`` for the couplings, in place of the three
            convolutions (a two-layer MLP for vectors).
        base: the latent's distribution (see :class:`Flow`); None for the standard normal.
        memory: ``"stored"``, or ``"reversible"`` to make activations again in the backward pass, by the inverses of the
            layers, in place of keeping them: see :class:`~pyflowkern.nn.Sequential`.

    Raises:
        TypeError: for counts that are no ints, and a conditioner whose networks do not take the context.
        ValueError: for sizes that do not divide, a count below 1, or a base of another shape.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.Glow((3, 8, 8), levels=2, steps=2, hidden=16, bits=8)
        >>> x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> flow.bits_per_dim(x).mean().backward()
        >>> flow.sample(2, quantized=True).dtype
        torch.uint8
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        levels: int = 3,
        steps: int = 8,
        hidden: int = 64,
        context_features: int = 0,
        bits: int | None = None,
        alpha: float = 0.05,
        scale_map: str | ScaleMap = "tanh",
        parameterization: str = "plu",
        conditioner: ConditionerFactory | None = None,
        base: torch.nn.Module | Distribution | None = None,
        memory: str = "stored",
    ) -> None:
        shape = parse_event(event_shape)
        levels, steps, hidden = check_counts(levels=levels, steps=steps, hidden=hidden)
        context_features = check_count("context_features", context_features, 0)
        vector = len(shape) == 1
        options: dict[str, Any] = {"hidden": hidden, "context_features": context_features}
        convolutional = partial(ConvNet, spatial_dims=max(len(shape) - 1, 1), **options)
        if conditioner is None:
            conditioner = partial(MLP, **options) if vector else convolutional
        conditioner = taking_context(conditioner, context_features)

        def level(channels: int) -> list[Bijection]:
            layers: list[Bijection] = []
            for _ in range(steps):
                layers.append(GlowStep(channels, parameterization=parameterization))
                layers.append(AffineCoupling(channels, conditioner, scale_map=scale_map))
            return layers

        if vector:
            bijection: Bijection = Sequential(*level(shape[0]), memory=memory)
        else:
            check_space(shape, levels)
            bijection = squeeze_levels(shape, levels, level, convolutional, memory)
        super().__init__(
            bijection,
            shape,
            base=base,
            bits=bits,
            alpha=alpha,
            context_features=context_features,
        )
