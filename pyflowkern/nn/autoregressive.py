"""Autoregressive layers: every feature is transformed with parameters computed from the features before it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_channels, check_count, check_dtype
from pyflowkern.core.structure import Structure
from pyflowkern.nn._base import Bijection
from pyflowkern.nn._blocks import gate_values
from pyflowkern.nn._chain_networks import masked_network
from pyflowkern.nn._coupling import condition
from pyflowkern.nn.jacobi import jacobi_inverse
from pyflowkern.nn.links import Link
from pyflowkern.nn.masked import MaskedMLP
from pyflowkern.ops.chain_steps import ElementsStep
from pyflowkern.ops.elements import (
    ElementMap,
    apply_elements,
    element_map,
    element_parameters,
)
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["Inverse", "MaskedAutoregressive"]


class MaskedAutoregressive(Bijection):
    r"""Masked autoregressive layer: :math:`z_i = \tau(x_i; \theta_i(x_{<i}, \text{context}))`.

    The log-determinant is :math:`\sum_i \log |\partial \tau / \partial x_i|`.  ``forward`` is the density direction
    and takes one pass of the network.  ``inverse`` finds one feature after another, but computes each unit of the
    network only once, as soon as the features that it depends on are known: so it also costs about one pass.

    Args:
        features: number ``D`` of features of the input ``[N, D]``.
        hidden: widths of the masked network.
        transform: :math:`\tau`: ``"affine"``, the name of a scale map, a :class:`~pyflowkern.ops.ScaleMap` or a
            :class:`~pyflowkern.ops.SplineMap`.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        order: the features, first to last; None for 0, 1, 2, ...
        residual: whether the network has residual blocks.
        activation: the network's activation, as for :class:`MaskedMLP`.
        gated: whether the context gates the residual blocks, too, as for :class:`MaskedMLP`.
        conditioner: a :class:`MaskedMLP` to use instead of a new one; or any module ``g(x)`` or ``g(x, context)``
            that returns ``[N, D, P]`` and is autoregressive: it is inverted by :func:`jacobi_inverse`.

    Raises:
        ValueError: as :class:`MaskedMLP`, and for a transform or a conditioner that does not fit.
        TypeError: for counts that are not ints, a conditioner that is no module, and a dtype other than that of the
            parameters, without autocast.

    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.MaskedAutoregressive(4, hidden=(16,))
        >>> x = torch.randn(8, 4)
        >>> z, log_det = layer(x)
        >>> bool(torch.allclose(layer.inverse(z)[0], x, atol=1e-5))
        True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        *,
        transform: str | ElementMap = "affine",
        context_features: int = 0,
        order: Sequence[int] | Tensor | None = None,
        residual: bool = False,
        activation: str = "relu",
        gated: bool = False,
        conditioner: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        features = check_count("features", features)
        self.features = features
        self._all = Structure(torch.ones(features, dtype=torch.bool, device="cpu"))
        self.element_map = element_map(transform)
        outputs = element_parameters(self.element_map)
        if conditioner is None:
            conditioner = MaskedMLP(
                features,
                outputs,
                hidden,
                context_features=context_features,
                order=order,
                residual=residual,
                activation=activation,
                gated=gated,
            )
            if isinstance(self.element_map, SplineMap):  # starts as the identity
                with torch.no_grad():
                    last: Tensor = conditioner.layers[-1].bias  # type: ignore[assignment]
                    last.copy_(self.element_map.identity_raw().repeat(features))
        if not isinstance(conditioner, torch.nn.Module):
            raise TypeError(
                f"conditioner must be a torch.nn.Module, got {type(conditioner).__name__}"
            )
        if isinstance(conditioner, MaskedMLP) and (conditioner.features, conditioner.outputs) != (
            features,
            outputs,
        ):
            raise ValueError(
                f"the conditioner must have {features} features and {outputs} outputs, got "
                f"{conditioner.features} and {conditioner.outputs}"
            )
        self.conditioner = conditioner

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``[N, D]``; return ``(z, log_det[N])``."""
        check_channels("x", x, self.features)
        params = condition(self.conditioner, x, context)
        return apply_elements(x, params, self.element_map, every=self._all.on(x.device))

    def _way_back(self, inverse: bool) -> str:
        return "invert" if inverse else "keep"  # forward is one evaluation of the network

    def _chain_link(self) -> Link | None:
        network = self.conditioner
        if type(self) is not MaskedAutoregressive or not isinstance(network, MaskedMLP):
            return None
        link = Link()
        link.watch(self, "features", "element_map")
        net = masked_network(network, link)
        if net is None:
            return None
        order = tuple(network.order)
        link.steps.append(ElementsStep(self.element_map, order, order, net))
        return link

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward`."""
        check_channels("z", z, self.features)
        network = self.conditioner
        if not isinstance(network, MaskedMLP) or not network.may_be_read:
            if isinstance(network, MaskedMLP):
                _warn_of_passes()
            return jacobi_inverse(
                lambda x: condition(network, x, context), z, transform=self.element_map
            )
        weights, biases = network.weights_and_biases(context, z.shape[0])
        check_dtype("z", z, weights[0].dtype, "network")
        return ops.autoregressive_inverse(
            z,
            weights,
            biases,
            network.plan,
            transform=self.element_map,
            gates=gate_values(network, context),
        )


def _warn_of_passes() -> None:
    """Warn that the inverse is slow; Python's default filter shows it once."""
    warnings.warn(
        "a layer of a masked network has hooks or was replaced: the inverse therefore calls the network up to once for "
        "each feature, instead of computing each unit once, and has only first derivatives",
        stacklevel=3,
    )


class Inverse(Bijection):
    r"""A bijection with its directions exchanged: :math:`z = f^{-1}(x)`, :math:`\log\det = \log|\det J_{f^{-1}}(x)|`.

    An inverse autoregressive flow is the inverse of a masked autoregressive one.

    Args:
        bijection: ``f``.

    Raises:
        TypeError: for what is not a :class:`Bijection`.

    Source: Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow" (2016).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> layer = nn.MaskedAutoregressive(3)
        >>> x = torch.randn(2, 3)
        >>> bool(torch.equal(nn.Inverse(layer).inverse(x)[0], layer(x)[0]))
        True
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be a Bijection, got {type(bijection).__name__}")
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the bijection's inverse."""
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the bijection forward."""
        pair: tuple[Tensor, Tensor] = self.bijection(z, context)
        return pair

    def _way_back(self, inverse: bool) -> str:
        return self.bijection._way_back(not inverse)

    def _chain_link(self) -> Link | None:
        link = self.bijection._chain_link() if isinstance(self.bijection, Bijection) else None
        if type(self) is not Inverse or link is None or link.backwards:
            return None
        link.watch(self)
        link.backwards = True
        return link

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape of the bijection's inverse."""
        return self.bijection.input_shape(shape)

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape of the bijection's output."""
        return self.bijection.output_shape(shape)
