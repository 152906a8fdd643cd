"""Masked networks: multilayer perceptrons whose outputs see only the features before their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.checks import (
    check_choice,
    check_count,
    check_dtype,
    check_dtype_of,
    check_flag,
    check_floating,
)
from pyflowkern.core.structure import Structure
from pyflowkern.nn._blocks import gate_layers, gate_values
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.ops.masked_plan import MaskedLayer, MaskedPlan

__all__ = ["MaskedLinear", "MaskedMLP"]


class MaskedLinear(torch.nn.Linear):
    r"""A linear layer whose masked weights count as zero: :math:`y = (M \circ W)\, x + b`.

    Args:
        mask: boolean ``[units, inputs]``, True where the weight counts.

    Example:
        >>> import torch
        >>> from pyflowkern.nn.masked import MaskedLinear
        >>> layer = MaskedLinear(torch.tensor([[True, False]]))
        >>> bool(layer(torch.tensor([[0.0, 5.0]])) == layer.bias)
        True
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self._mask = Structure(mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[N, units]``."""
        weight = torch.where(self._mask.on(self.weight.device), self.weight, 0.0)
        return F.linear(x, weight, self.bias)


class MaskedMLP(torch.nn.Module):
    r"""An autoregressive network ``[N, D] -> [N, D, outputs]``: MADE, or ResMADE with ``residual``.

    .. math:: h_0 = (M_0 \circ W_0)\, x + C c + b_0, \qquad h_i = (M_i \circ W_i)\, a(h_{i-1}) + b_i.

    The outputs of a feature depend only on the context ``c`` and on the features that precede it in ``order``.  A
    hidden unit of degree ``m`` depends on the first ``m`` features; degrees are spread evenly over 1 ... D - 1, or
    over 0 ... D - 1 with a context, so that the outputs of the first feature can depend on it.  The last layer starts
    at zero, and so does the output.

    Args:
        features: number ``D`` of features.
        outputs: numbers returned for each feature.
        hidden: width of each hidden layer; with ``residual``, of each block, all the same.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        order: the features, first to last; None for 0, 1, 2, ...
        residual: residual blocks :math:`h \leftarrow h + W_2 a(W_1 a(h))` in place of plain layers.
        activation: relu, leaky_relu, elu, tanh, sigmoid, silu, gelu or softplus, as the kernel of the inverse
            computes them: softplus and gelu keep the tails that torch.nn's cut off.
        random_degrees: draw the degrees from torch's generator.
        gated: multiply what each residual block adds by :math:`\sigma(G c + g)`, gated linear units.

    Raises:
        ValueError: for a width below 1, widths that differ with ``residual``, gates without ``residual`` or without a
            context, an order that is no permutation, an
            unknown activation, or a context of another shape.
        TypeError: for counts that are not ints, and a dtype other than that of the parameters, without autocast.

    Source: Germain, Gregor, Murray and Larochelle, "MADE: Masked Autoencoder for Distribution
    Estimation" (2015); the residual form Durkan and Nash, "Autoregressive Energy Machines" (2019).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> net = nn.MaskedMLP(4, 2, hidden=(16, 16), order=[3, 1, 0, 2])
        >>> tuple(net(torch.randn(5, 4)).shape)
        (5, 4, 2)
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context_features: int = 0,
        order: Sequence[int] | Tensor | None = None,
        residual: bool = False,
        activation: str = "relu",
        random_degrees: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        features, outputs = check_count("features", features), check_count("outputs", outputs)
        context_features = check_count("context_features", context_features, 0)
        check_flag("random_degrees", random_degrees)
        if check_flag("gated", gated) and not residual:
            raise ValueError("gated=True needs residual=True, got False")
        widths = _widths(hidden, check_flag("residual", residual))
        self.features, self.outputs = features, outputs
        self.context_features = context_features
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.order = _order(order, features)
        rank = torch.argsort(torch.tensor(self.order, device="cpu"))
        least = 0 if context_features else min(1, features - 1)
        degrees = [
            _degrees(h, least, features - 1, random_degrees)
            for h in (widths[:1] if residual else widths)
        ]
        masks = [degrees[0][:, None] > rank]
        if residual:
            masks += [degrees[0][:, None] >= degrees[0]] * (2 * len(widths))
        else:
            masks += [b[:, None] >= a for a, b in itertools.pairwise(degrees)]
        masks.append((rank[:, None] >= degrees[-1]).repeat_interleave(outputs, 0))
        #: The masks and the order of evaluation; copies of the module share it.
        self.plan = MaskedPlan(_layers(masks, activation, residual, gated), features)
        self.layers = torch.nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.context = (
            torch.nn.Linear(context_features, widths[0], bias=False) if context_features else None
        )
        self.gates = gate_layers(gated, context_features, widths[0], len(widths))
        for parameter in self.layers[-1].parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, D, outputs]`` of ``x`` ``[N, D]``."""
        check_floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape [N, {self.features}], got {tuple(x.shape)}")
        if self.may_be_read:
            weights, biases = self.weights_and_biases(context, x.shape[0])
            check_dtype("x", x, weights[0].dtype, "network")
            return self.plan.parameters(x, weights, biases, gate_values(self, context))
        added = self._added(context, x.shape[0])
        check_dtype_of("x", x, self.layers)
        layers = [
            _masked(layer, mask) for layer, mask in zip(self.layers, self._masks(), strict=True)
        ]

        def linear(i: int, h: Tensor) -> Tensor:
            out = layers[i](h)
            return out if i or added is None else out + added

        return self.plan.evaluate(x, linear, gate_values(self, context))

    @property
    def may_be_read(self) -> bool:
        """Whether the weights may be used without calling the layers: none was replaced or has hooks."""
        return may_be_read(self.layers, MaskedLinear, torch.nn.Linear)

    def weights_and_biases(
        self, context: Tensor | None, samples: int
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the weight and the bias of each layer, the context being part of the first bias."""
        layers = list(self.layers)
        weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        biases: list[Tensor | None] = [layer.bias for layer in layers]  # type: ignore[misc]
        added = self._added(context, samples)
        if added is not None:
            biases[0] = added if biases[0] is None else added + biases[0]
        return weights, biases

    def _added(self, context: Tensor | None, samples: int) -> Tensor | None:
        """Return what the context adds to the first layer, ``[N, units]``."""
        if self.context is None:
            if context is not None:
                raise ValueError(
                    "context was given, but this network was made with context_features=0"
                )
            return None
        want = (samples, self.context_features)
        if context is not None:
            check_floating("context", context)
        if context is None or tuple(context.shape) != want:
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context must have shape {want}, got {got}")
        check_dtype_of("context", context, self.layers)
        added: Tensor = self.context(context)
        return added

    def _masks(self) -> list[Tensor]:
        return [layer.mask for layer in self.plan.layers]

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"features={self.features}, outputs={self.outputs}, activation={self.activation!r}"


def _masked(layer: torch.nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that applies a layer with its mask, also for a module that the user put in its place.

    A module of the user's must be affine: its values at zero and at the unit vectors give its bias and its matrix,
    to which the mask is applied.
    """
    if isinstance(layer, MaskedLinear) and type(layer).forward is MaskedLinear.forward:
        return layer
    known = next(
        (t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), None
    )
    dtype = torch.get_default_dtype() if known is None else known.dtype
    device = mask.device if known is None else known.device
    inputs = torch.eye(mask.shape[1] + 1, mask.shape[1], dtype=dtype, device=device)
    outputs: Tensor = layer(inputs)
    if tuple(outputs.shape) != (mask.shape[1] + 1, mask.shape[0]):
        raise ValueError(
            f"a layer of the network must map {mask.shape[1]} to {mask.shape[0]} features, "
            f"{type(layer).__name__} gives shape {tuple(outputs.shape)}"
        )
    bias = outputs[-1]
    weight = torch.where(mask.to(device), (outputs[:-1] - bias).mT, 0.0)
    return lambda h: F.linear(h, weight, bias)


def _widths(hidden: Sequence[int], residual: bool) -> list[int]:
    """Return the widths of the hidden layers, or of the blocks, as ints."""
    if not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a sequence of widths, got {type(hidden).__name__}")
    widths = [check_count("hidden widths", width) for width in hidden]
    check_count("the number of hidden layers", len(widths))
    if residual and len(set(widths)) > 1:
        raise ValueError(f"residual blocks must have one width, got {tuple(widths)}")
    return widths


def _order(order: Sequence[int] | Tensor | None, features: int) -> list[int]:
    try:
        known = list(range(features)) if order is None else list(order)
        ints = [int(i) for i in known]
    except (TypeError, ValueError):
        raise TypeError(f"order must be a sequence of ints, got {order!r}") from None
    if ints != known or sorted(ints) != list(range(features)):
        raise ValueError(f"order must be a permutation of 0 ... {features - 1}, got {known}")
    return ints


def _degrees(units: int, least: int, most: int, random: bool) -> Tensor:
    """Return the degree of each unit, ascending: how many features, in order, it may see."""
    if random:
        return torch.randint(least, most + 1, (units,), device="cpu").sort().values
    return least + torch.arange(units, device="cpu") * (most + 1 - least) // units


def _layers(
    masks: list[Tensor], activation: str, residual: bool, gated: bool
) -> list[MaskedLayer]:
    layers = [MaskedLayer(masks[0])]
    for i, mask in enumerate(masks[1:], 1):
        closes = residual and i % 2 == 0 and i < len(masks) - 1
        back = i - 2 if closes else None
        form = {"activation": activation, "residual": back, "gated": bool(gated and closes)}
        layers.append(MaskedLayer(mask, **form))  # type: ignore[arg-type]
    return layers
