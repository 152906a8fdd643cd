"""The networks of a chain: what the parameters of elements are computed by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_list,
    check_number,
)

__all__ = ["ChainLayer", "ChainNetwork", "indices_of"]

CONTEXTS = ("none", "add", "gate")
FIRST_CONTEXTS = ("none", "add", "joined", "activated")


@dataclass(frozen=True)
class ChainLayer:
    r"""One linear layer of a network.

    Tensors: weight ``[outputs, inputs]``, then the bias ``[outputs]`` if there is one; then for ``context="add"`` a
    weight ``C`` ``[outputs, K]`` and with ``context_bias`` a bias ``d`` ``[outputs]``, and for ``"gate"`` a weight
    ``G`` ``[outputs, K]`` and a bias ``g`` ``[outputs]``.

    Args:
        outputs: number of units.
        inputs: number of values that it reads.
        bias: whether there is a bias.
        prefixes: of each unit, how many inputs it reads, from the first on; ascending.  Weights beyond count as zero.
            None where every unit reads all.
        columns: which column of the weight belongs to each input, where they stand in another order.
        rows: which row of weight and bias, and of those of the context, belongs to each unit, likewise.
        context: what a layer between the first and the last does with the context ``c``: ``"add"`` adds ``C c`` to its
            output, ``"gate"`` multiplies it by :math:`\sigma(G c + g)`, before a residual block adds its input.
        context_bias: ``"add"`` adds ``C c + d``.

    Raises:
        TypeError: for sizes that are no ints and flags that are no bools.
        ValueError: for negative sizes, prefixes that do not fit, orders that are no permutations, an unknown use of the
            context, and a bias of a context that is not added.

    Example:
        >>> from pyflowkern.ops import ChainLayer
        >>> ChainLayer(outputs=3, inputs=2, prefixes=[0, 1, 2]).prefixes  # each unit sees one more
        (0, 1, 2)
    """

    outputs: int
    inputs: int
    bias: bool = True
    prefixes: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    context: str = "none"
    context_bias: bool = False

    def __post_init__(self) -> None:
        check_choice("context", self.context, CONTEXTS)
        if check_flag("context_bias", self.context_bias) and self.context != "add":
            raise ValueError(f"context_bias=True needs context='add', got {self.context!r}")
        for name in ("outputs", "inputs"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), 0))
        object.__setattr__(self, "bias", check_flag("bias", self.bias))
        for name, size in (("columns", self.inputs), ("rows", self.outputs)):
            if (order := getattr(self, name)) is not None:
                order = indices_of(name, order)
                if sorted(order) != list(range(size)):
                    raise ValueError(
                        f"{name} must be a permutation of 0 ... {size - 1}, got {order}"
                    )
                # as it lies
                object.__setattr__(self, name, None if order == tuple(range(size)) else order)
        if self.prefixes is None:
            return
        prefixes = indices_of("prefixes", self.prefixes)
        fits = len(prefixes) == self.outputs and list(prefixes) == sorted(prefixes)
        if not fits or (prefixes and prefixes[-1] > self.inputs):
            raise ValueError(
                f"prefixes must be {self.outputs} ascending numbers from 0 to {self.inputs}, got {prefixes}"
            )
        object.__setattr__(self, "prefixes", prefixes)


@dataclass(frozen=True)
class ChainNetwork:
    r"""A network of linear layers: what the parameters of the moved features are computed by.

    .. math:: h_0 = W_0 x + b_0 + C c, \qquad h_i = W_i\, a(h_{i-1}) + b_i,

    or, with ``residual``, pairs of layers :math:`h \leftarrow h + W'' a(W' a(h) + b') + b''` between the first and the
    last.  Angles among the inputs may be replaced by their cosines and sines, which have no jump.

    Tensors: those of each layer, then those of the first layer's context ``c``, as ``context`` says:

    ========= ========================================= =======================================================
    context   the first layer                           tensors
    ========= ========================================= =======================================================
    none      does not read it                          none
    add       adds ``C c``                              ``C`` ``[units, K]``
    joined    reads it as its last inputs               none: its weight is ``[units, inputs + K]``
    activated adds :math:`a(C c + d)`                   ``C`` ``[units, K]``, ``d`` ``[units]``
    ========= ========================================= =======================================================

    Args:
        layers: first to last.
        activation: ``a``: identity, relu, leaky_relu, elu, tanh, sigmoid, silu, gelu or softplus.
        residual: see above.
        activate_last: whether ``a`` precedes the last layer; networks without ``residual`` always have it there.
        context: what the first layer does with the context; see :class:`ChainLayer` for the others.
        activate_blocks: whether ``a`` precedes the first layer of each residual block; without it blocks are
            :math:`h \leftarrow h + W'' a(W' h + b') + b''`.
        frequencies: of each number that the network reads, ``w`` where :math:`\cos(w x)` and :math:`\sin(w x)` take
            its place, or 0: the first layer has two inputs, one after the other, for each angle.  None for no angles.

    Raises:
        TypeError: for layers that are none, flags that are no bools, and frequencies that are no numbers.
        ValueError: for layers that do not fit each other, an unknown activation, and frequencies that are not finite.

    Source: Germain, Gregor, Murray and Larochelle, "MADE: Masked Autoencoder for Distribution Estimation" (2015), for
    the masks; He et al., "Identity mappings in deep residual networks" (2016), for the blocks.

    Example:
        >>> from pyflowkern.ops import ChainLayer, ChainNetwork
        >>> net = ChainNetwork([ChainLayer(8, 2), ChainLayer(4, 8)], activation="silu", context="add")
        >>> net.seen()  # how many inputs each output depends on
        [2, 2, 2, 2]
    """

    layers: Sequence[ChainLayer]
    activation: str = "relu"
    residual: bool = False
    activate_last: bool = True
    context: str = "none"
    activate_blocks: bool = True
    frequencies: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_list("layers", self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, ChainLayer):
                raise TypeError(f"layers[{i}] must be a ChainLayer, got {type(layer).__name__}")
        check_choice("context", self.context, FIRST_CONTEXTS)
        for name in ("residual", "activate_last", "activate_blocks"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        self._check_frequencies()
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        count = len(self.layers)
        if not count or (self.residual and count % 2):
            raise ValueError(f"layers must be one at least, blocks are pairs of them; got {count}")
        for name in ("activate_last", "activate_blocks"):
            if not self.residual and not getattr(self, name):
                raise ValueError(f"{name}=False is for residual networks, got residual=False")
        width = self.layers[0].outputs
        for i, layer in enumerate(self.layers[1:], 1):
            if layer.inputs != self.layers[i - 1].outputs:
                raise ValueError(
                    f"layers[{i}] must read the {self.layers[i - 1].outputs} units before it"
                )
            if self.residual and i < count - 1 and layer.outputs != width:
                raise ValueError(f"layers[{i}] must have the {width} units of its block's input")
        for i in (0, count - 1):
            if (how := self.layers[i].context) != "none":
                raise ValueError(
                    f"layers[{i}] must have context='none', which is for layers between the ends, got {how!r}"
                )

    def _check_frequencies(self) -> None:
        if self.frequencies is None:
            return
        check_list("frequencies", self.frequencies)
        found = tuple(check_number(f"frequencies[{i}]", w) for i, w in enumerate(self.frequencies))
        if not all(map(math.isfinite, found)):
            raise ValueError(f"frequencies must be finite, got {found}")
        inputs = self.layers[0].inputs if self.layers else 0
        if sum(1 + (w != 0) for w in found) != inputs:
            raise ValueError(
                f"frequencies must make the {inputs} inputs of layers[0], two of each angle, got {found}"
            )
        # without angles there is nothing to say
        object.__setattr__(self, "frequencies", found if any(found) else None)

    @property
    def inputs(self) -> int:
        """How many numbers the network reads, besides the context."""
        return self.layers[0].inputs if self.frequencies is None else len(self.frequencies)

    @property
    def contexts(self) -> bool:
        """Whether any layer reads the context."""
        return self.context != "none" or any(layer.context != "none" for layer in self.layers)

    def seen(self) -> list[int]:
        """Return how many of the numbers that the network reads each output depends on, from the first on."""
        seen: list[int] = []
        values: list[list[int]] = []  # of every layer
        for i, layer in enumerate(self.layers):
            prefixes = layer.prefixes or (layer.inputs,) * layer.outputs
            seen = [seen[p - 1] if p else 0 for p in prefixes] if i else list(prefixes)
            if self.residual and i and i % 2 == 0 and i < len(self.layers) - 1:
                seen = [max(pair) for pair in zip(seen, values[i - 2], strict=True)]
            values.append(seen)
        if self.frequencies is None:
            return seen
        owner = [0]  # how many numbers the first inputs belong to
        for i, w in enumerate(self.frequencies, 1):
            owner += [i] * (1 + (w != 0))
        return [owner[n] for n in seen]


def indices_of(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return a list of indices as a tuple of ints, after checking them."""
    check_list(name, values)
    return tuple(check_count(f"{name}[{i}]", value, 0) for i, value in enumerate(values))
