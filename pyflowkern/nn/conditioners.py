"""Conditioners: networks that compute a coupling's parameters; a new one returns zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyflowkern.core.checks import (
    check_count,
    check_dtype_of,
    check_flag,
    check_number,
    is_integer,
)
from pyflowkern.nn._blocks import gate_layers, linear_layer, residual_block, run_blocks
from pyflowkern.nn._coupling import condition
from pyflowkern.nn.convolutions import convolutions
from pyflowkern.nn.relu_networks import linear_layers
from pyflowkern.ops.conv_network import evaluate_convolutions
from pyflowkern.ops.relu_network import evaluate_network

__all__ = ["MLP", "ConvNet", "NetworkBase", "PeriodicInput", "ResidualConvNet", "ResidualMLP"]

Activation = Callable[[], torch.nn.Module]


class NetworkBase(torch.nn.Module):
    """Base of the networks: a context adds ``C context`` to the first layer's output.

    That is the same as concatenating the context to the input, at every pixel.
    """

    first: torch.nn.Module
    last: torch.nn.Module

    def __init__(self, hidden: int, context_features: int) -> None:
        super().__init__()
        self.context_features = check_count("context_features", context_features, 0)
        self.context = (
            torch.nn.Linear(self.context_features, hidden, bias=False)
            if self.context_features
            else None
        )

    def _first_layer(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the first layer's output with the context added; raise for a dtype that does not fit."""
        check_dtype_of("x", x, self.first)
        h: Tensor = self.first(x)
        bias = self._context_bias(h, context)
        return h if bias is None else h + bias.view(*bias.shape, *[1] * (h.dim() - 2))

    def _context_bias(self, h: Tensor, context: Tensor | None) -> Tensor | None:
        if self.context is None:
            if context is not None:
                raise ValueError(
                    "context was given, but this conditioner was made with context_features=0"
                )
            return None
        want = (h.shape[0], self.context_features)
        if context is not None and not isinstance(context, Tensor):
            raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
        if context is None or tuple(context.shape) != want:
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context must have shape {want}, got {got}")
        if context.dtype != h.dtype:
            check_dtype_of("context", context, self.context)
        bias: Tensor = self.context(context)
        return bias


class MLP(NetworkBase):
    r"""A multilayer perceptron on vectors ``[N, in_features] -> [N, out_features]``.

    .. math:: h_0 = W_0 x + C c + b_0, \qquad h_i = W_i\, a(h_{i-1}) + b_i,

    with activation ``a`` and context ``c``.  The last layer starts at zero, and so does the output.

    Args:
        in_features: input size.
        out_features: output size.
        hidden: width, or the width of each hidden layer.
        layers: number of hidden layers, where one width is given.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        activation: factory of the activation ``a``, such as :class:`torch.nn.ReLU`.

    Raises:
        ValueError: for a width or number of layers below 1, or a context of another shape.
        TypeError: for sizes that are not ints, and a dtype other than that of the parameters, without autocast.

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> net = nn.MLP(2, 4, hidden=8, context_features=3)
        >>> net(torch.randn(1, 2), torch.randn(1, 3)).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: int | Sequence[int] = 64,
        layers: int = 2,
        context_features: int = 0,
        activation: Activation = torch.nn.ReLU,
    ) -> None:
        layers = check_count("layers", layers)
        given = list(hidden) if isinstance(hidden, Iterable) else [hidden] * layers
        widths = [check_count("hidden", width) for width in given]
        if not widths:
            raise ValueError("hidden must have a width at least, got none")
        in_features, out_features = _sizes(in_features, out_features)
        super().__init__(widths[0], context_features)
        self.first = linear_layer(in_features, widths[0])
        body: list[torch.nn.Module] = [activation()]
        for before, width in itertools.pairwise(widths):
            body += [torch.nn.Linear(before, width), activation()]
        self.body = torch.nn.Sequential(*body)
        self.last = _zero(torch.nn.Linear(widths[-1], out_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, out_features]``."""
        body = list(self.body._modules.values())
        layers = [self.first, *body[1::2], self.last]
        if len(body) % 2 and (params := linear_layers(x, layers, body[0::2])) is not None:
            return evaluate_network(x, *params, self._context_bias(x, context), False, True)
        out: Tensor = self.last(self.body(self._first_layer(x, context)))
        return out


class ResidualMLP(NetworkBase):
    r"""A residual network on vectors ``[N, in_features] -> [N, out_features]``.

    The first layer is linear, each block is :math:`h \leftarrow h + W_2\, a(W_1\, a(h) + b_1) + b_2`, and the last
    layer starts at zero, and so does the output.  A context ``c`` is added to the first layer's output; ``gated``
    blocks multiply what they add to ``h`` by :math:`\sigma(G c + g)`: they are gated linear units.

    Args:
        in_features: input size.
        out_features: output size.
        hidden: width.
        blocks: number of residual blocks.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        activation: factory of the activation ``a``, such as :class:`torch.nn.ReLU`.
        activate_last: whether an activation precedes the last layer; Durkan et al. (2019) have none there.
        gated: whether the context gates each block, too, as Durkan et al. (2019) have it.

    Raises:
        ValueError: for a width below 1, a negative number of blocks, gates without a context, or one of another shape.
        TypeError: for sizes that are not ints, and a dtype other than that of the parameters, without autocast.

    Source: He et al., "Identity mappings in deep residual networks" (2016), as used by Durkan et
    al. (2019).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> tuple(nn.ResidualMLP(2, 4, hidden=8)(torch.randn(5, 2)).shape)
        (5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        activation: Activation = torch.nn.ReLU,
        activate_last: bool = True,
        gated: bool = False,
    ) -> None:
        hidden, blocks = check_count("hidden", hidden), check_count("blocks", blocks, 0)
        in_features, out_features = _sizes(in_features, out_features)
        super().__init__(hidden, context_features)
        self.activate_last = check_flag("activate_last", activate_last)
        self.first = linear_layer(in_features, hidden)
        self.blocks = torch.nn.ModuleList(
            residual_block(
                torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, hidden), activation
            )
            for _ in range(blocks)
        )
        self.gates = gate_layers(gated, self.context_features, hidden, blocks)
        before = activation() if activate_last else torch.nn.Identity()
        self.last = torch.nn.Sequential(before, _zero(torch.nn.Linear(hidden, out_features)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, out_features]``."""
        layers: list[torch.nn.Module | None] = [self.first]
        activations: list[torch.nn.Module | None] = []
        for block in self.blocks._modules.values():
            before, first, between, second = block._modules.values()
            layers += (first, second)
            activations += (before, between)
        activation, last = self.last._modules.values()
        if self.activate_last:
            activations.append(activation)
        plain = self._modules.get("gates") is None
        if plain and (params := linear_layers(x, [*layers, last], activations)) is not None:
            bias = self._context_bias(x, context)
            return evaluate_network(x, *params, bias, True, self.activate_last)
        out: Tensor = self.last(run_blocks(self, self._first_layer(x, context), context))
        return out


class ConvNet(NetworkBase):
    r"""The three convolutions of Glow, 3x3, 1x1 and 3x3: ``[N, in_channels, *space] -> [N, out_channels, *space]``.

    .. math:: y = W_3 * a(W_2 * a(W_1 * x + C c)),

    each with a bias, for a context ``c``.  The last layer starts at zero, and so does the output.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        hidden: channels between.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        spatial_dims: 1, 2 or 3.
        activation: factory of the activation ``a``, such as :class:`torch.nn.ReLU`.

    Raises:
        ValueError: for a width below 1, spatial_dims out of range, or a context of another shape.
        TypeError: for sizes that are not ints, and a dtype other than that of the parameters, without autocast.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> tuple(nn.ConvNet(2, 4, hidden=8)(torch.randn(5, 2, 6, 6)).shape)
        (5, 4, 6, 6)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int = 64,
        context_features: int = 0,
        spatial_dims: int = 2,
        activation: Activation = torch.nn.ReLU,
    ) -> None:
        hidden = check_count("hidden", hidden)
        in_channels, out_channels = _sizes(in_channels, out_channels)
        super().__init__(hidden, context_features)
        self.first = _conv(spatial_dims, in_channels, hidden, 3)
        middle = _conv(spatial_dims, hidden, hidden, 1)
        self.body = torch.nn.Sequential(activation(), middle, activation())
        self.last = _zero(_conv(spatial_dims, hidden, out_channels, 3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, out_channels, *space]``."""
        body = list(self.body._modules.values())
        layers = [self.first, *body[1::2], self.last]
        if (params := convolutions(x, layers, body[0::2])) is not None:
            return evaluate_convolutions(x, *params, self._context_bias(x, context), False, True)
        out: Tensor = self.last(self.body(self._first_layer(x, context)))
        return out


class ResidualConvNet(NetworkBase):
    r"""A residual network of 3x3 convolutions: ``[N, in_channels, *space] -> [N, out_channels, *space]``.

    Each block is :math:`h \leftarrow h + W_2 * a(W_1 * a(h) + b_1) + b_2`, the last layer a 1x1 convolution that
    starts at zero, and so does the output.  Unlike the original it has no batch normalisation, which would let one
    sample change another's density.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        hidden: channels between.
        blocks: number of residual blocks.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.
        spatial_dims: 1, 2 or 3.
        activation: factory of the activation ``a``, such as :class:`torch.nn.ReLU`.

    Raises:
        ValueError: for a width below 1, spatial_dims out of range, or a context of another shape.
        TypeError: for sizes that are not ints, and a dtype other than that of the parameters, without autocast.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> tuple(nn.ResidualConvNet(2, 4, hidden=8, spatial_dims=1)(torch.randn(5, 2, 6)).shape)
        (5, 4, 6)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        spatial_dims: int = 2,
        activation: Activation = torch.nn.ReLU,
    ) -> None:
        hidden, blocks = check_count("hidden", hidden), check_count("blocks", blocks, 0)
        in_channels, out_channels = _sizes(in_channels, out_channels)
        super().__init__(hidden, context_features)
        self.first = _conv(spatial_dims, in_channels, hidden, 3)
        self.blocks = torch.nn.ModuleList(
            residual_block(
                _conv(spatial_dims, hidden, hidden, 3),
                _conv(spatial_dims, hidden, hidden, 3),
                activation,
            )
            for _ in range(blocks)
        )
        self.last = torch.nn.Sequential(
            activation(), _zero(_conv(spatial_dims, hidden, out_channels, 1))
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, out_channels, *space]``."""
        out: Tensor = self.last(run_blocks(self, self._first_layer(x, context), context))
        return out


class PeriodicInput(torch.nn.Module):
    r"""A network of the angles' :math:`\cos(\pi x / B)` and :math:`\sin(\pi x / B)` in place of ``x``.

    So its output ``[N, out_features]`` is continuous where an angle passes from ``B`` to ``-B``.

    Args:
        in_features: number of angles; the network inside has twice as many inputs.
        out_features: output size.
        conditioner: factory ``(in, out) -> module`` of the network inside.
        bound: ``B``, half the circle's length.

    Raises:
        TypeError: for sizes that are not ints, a bound that is no number, and a context given to a network that
            takes none.
        ValueError: for negative sizes, and a bound that is not positive and finite.

    Source: Rezende et al., "Normalizing Flows on Tori and Spheres" (2020).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> net = nn.PeriodicInput(2, 4, nn.MLP)
        >>> tuple(net(torch.randn(5, 2)).shape)
        (5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        conditioner: Callable[[int, int], torch.nn.Module],
        *,
        bound: float = torch.pi,
    ) -> None:
        super().__init__()
        bound = check_number("bound", bound)
        if not 0 < bound < torch.inf:
            raise ValueError(f"bound must be positive and finite, got {bound}")
        self.factor = torch.pi / bound
        in_features, out_features = _sizes(in_features, out_features)
        self.net = conditioner(2 * in_features, out_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the parameters ``[N, out_features, *space]``."""
        angle = x * self.factor
        features = torch.cat([angle.cos(), angle.sin()], 1)
        return condition(self.net, features, context)


def _sizes(inputs: int, outputs: int) -> tuple[int, int]:
    """Return the sizes of a network's input and output as ints; a network of 0 inputs is a constant."""
    return check_count("the input size", inputs, 0), check_count("the output size", outputs, 0)


def _conv(spatial_dims: int, inputs: int, outputs: int, kernel: int) -> torch.nn.Module:
    if not is_integer(spatial_dims) or spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[spatial_dims - 1]
    return conv(inputs, outputs, kernel, padding=kernel // 2)


def _zero(layer: torch.nn.Module) -> torch.nn.Module:
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer
