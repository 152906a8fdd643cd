"""Masked and inverse autoregressive flows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributions import Distribution

from pyflowkern import ops
from pyflowkern.core.checks import check_count
from pyflowkern.flows._arguments import check_flags, parse_vector, parse_widths
from pyflowkern.flows._base import Flow
from pyflowkern.flows._build import feature_order
from pyflowkern.nn import BatchNorm, Bijection, Inverse, MaskedAutoregressive, Sequential

__all__ = ["IAF", "MAF"]


class MAF(Flow):
    r"""Masked autoregressive flow: ``transforms`` affine autoregressive layers.

    .. math:: z_i = s(u_i)\, x_i + t_i, \qquad (t_i, u_i) = g_i(x_{<i}, \text{context})

    with one masked network ``g`` a layer and a scale map ``s``.  A density is one pass of each network,
    a sample costs more.  The features' order is part of the masks: no layer permutes anything.

    Args:
        event_shape: a dimension ``D`` or ``(D,)``.
        transforms: number of layers.
        hidden: width of each hidden layer of a network, or one width for two layers.
        context_features: size ``K`` of the context ``[N, K]``; 0 for an unconditional flow.
        order: ``"reverse"`` (every second layer goes through the features backwards) or ``"random"``
            (an order for each layer, the same in every flow).
        residual: networks of residual blocks, one for each width, which must be the same.
        activation: relu, leaky_relu, elu, tanh, sigmoid, silu, gelu or softplus.
        gated: the context gates the residual blocks, too (see :class:`~pyflowkern.nn.MaskedMLP`).
        scale_map: scale of the layers: a name or a :class:`~pyflowkern.ops.ScaleMap`.
        batch_norm: a :class:`~pyflowkern.nn.BatchNorm` behind each layer, as the authors have it: densities of a
            training batch then depend on all of it, and samples are those of the running statistics.
        base: the latent's distribution (see :class:`Flow`); None for the standard normal.
        memory: ``"stored"``, or ``"reversible"`` to make activations again in the backward pass, by the inverses of the
            layers, in place of keeping them: see :class:`~pyflowkern.nn.Sequential`.

    Raises:
        TypeError: for counts that are no ints and flags that are no bools.
        ValueError: for a shape that is no vector's, a count below 1, an unknown name, a base of another shape, or gates
            without a context or residual blocks.

    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation"
    (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.MAF(4, transforms=3, hidden=(32, 32))
        >>> (-flow.log_prob(torch.randn(16, 4)).mean()).backward()
        >>> tuple(flow.sample(5).shape)
        (5, 4)
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        transforms: int = 5,
        hidden: int | Sequence[int] = (512, 512),
        context_features: int = 0,
        order: str = "reverse",
        residual: bool = False,
        activation: str = "relu",
        gated: bool = False,
        scale_map: str | ops.ScaleMap = "softclip",
        batch_norm: bool = False,
        base: torch.nn.Module | Distribution | None = None,
        memory: str = "stored",
    ) -> None:
        shape = parse_vector(event_shape)
        check_flags(residual=residual, gated=gated, batch_norm=batch_norm)
        context_features = check_count("context_features", context_features, 0)
        transform = ops.scale_map(scale_map)
        layers = [
            MaskedAutoregressive(
                shape[0],
                parse_widths(hidden),
                transform=transform,
                context_features=context_features,
                order=feature_order(order, shape[0], i),
                residual=residual,
                activation=activation,
                gated=gated,
            )
            for i in range(check_count("transforms", transforms))
        ]
        directed: list[Bijection] = []
        for layer in layers:
            directed.append(self._directed(layer))
            if batch_norm:
                directed.append(BatchNorm(shape[0]))
        bijection = Sequential(*directed, memory=memory)
        super().__init__(bijection, shape, base=base, context_features=context_features)

    def _directed(self, layer: MaskedAutoregressive) -> Bijection:
        """Return the layer in the direction in which this flow goes from data to latent."""
        return layer


class IAF(MAF):
    r"""Inverse autoregressive flow: :class:`MAF` with the directions of its layers exchanged.

    .. math:: x_i = s(u_i)\, z_i + t_i, \qquad (t_i, u_i) = g_i(z_{<i}, \text{context})

    A sample is one pass of each network, and ``sample_and_log_prob`` gives its density in the same
    pass, with gradients: what a variational posterior needs. The density of a point that was not
    sampled here costs more.

    Args and errors are those of :class:`MAF`.

    Source: Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow" (2016).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> posterior = flows.IAF(4, transforms=2, hidden=(32, 32), context_features=3)
        >>> z, log_q = posterior.sample_and_log_prob(8, torch.randn(8, 3))
        >>> tuple(z.shape), tuple(log_q.shape), z.requires_grad
        ((8, 4), (8,), True)
    """

    def _directed(self, layer: MaskedAutoregressive) -> Bijection:
        return Inverse(layer)
