"""The steps of a chain of transforms: each says what it does and which tensors it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.checks import check_choice, check_count, check_flag, check_list, check_number
from pyflowkern.ops.elements import ElementMap, element_map, element_parameters

__all__ = [
    "MOST_PLU",
    "ActNormStep",
    "ChainLayer",
    "ChainNetwork",
    "ElementsStep",
    "LinearStep",
    "PLUStep",
    "PermuteStep",
    "ShiftStep",
    "Step",
]

#: Features up to which the factors of a matrix are multiplied inside of the op.
MOST_PLU = 128
LAYOUTS = ("feature_major", "blocked")
CONTEXTS = ("none", "add", "gate")


@dataclass(frozen=True)
class PermuteStep:
    """Reorder the features: ``z_i = x[order[i]]``; no tensors.

    Args:
        order: a permutation of ``0 ... D - 1``.

    Raises:
        TypeError: for an order that is no list of ints.
        ValueError: for one that is no permutation.

    Example:
        >>> from pyflowkern.ops import PermuteStep
        >>> PermuteStep([1, 0]).order
        (1, 0)
    """

    order: Sequence[int]

    def __post_init__(self) -> None:
        order = _indices("order", self.order)
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must be a permutation of 0 ... D - 1, got {order}")
        object.__setattr__(self, "order", order)


@dataclass(frozen=True)
class ActNormStep:
    r"""Scale and shift each feature: :math:`z = e^{\ell}(x + b)`.

    Tensors: :math:`\ell` ``[D]`` and ``b`` ``[D]``, as for :func:`~pyflowkern.ops.actnorm`.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import ops
        >>> program = ops.ChainProgram(1, [ops.ActNormStep()])
        >>> ops.chain(torch.ones(1, 1), program, [torch.zeros(1), torch.ones(1)])[0].tolist()
        [[2.0]]
    """


@dataclass(frozen=True)
class LinearStep:
    """Multiply by a matrix: ``z = W x``.

    Tensors: ``W`` ``[D, D]`` and the logarithm of its absolute determinant, ``[]``, which is taken as it is given.

    Example:
        >>> import torch
        >>> from pyflowkern import ops
        >>> program, w = ops.ChainProgram(1, [ops.LinearStep()]), torch.tensor([[2.0]])
        >>> ops.chain(torch.ones(1, 1), program, [w, w.log().sum()])[0].tolist()
        [[2.0]]
    """


@dataclass(frozen=True)
class PLUStep:
    """Multiply by a matrix that is given by its factors, for up to 128 features.

    Tensors: permutation ``[D]`` (int64), lower ``[D, D]``, upper ``[D, D]``, log_diag ``[D]`` and sign ``[D]``, as for
    :func:`~pyflowkern.ops.plu_matrix`.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> from pyflowkern import ops
        >>> program = ops.ChainProgram(4, [ops.PLUStep()])
        >>> [wanted.name.split()[0] for wanted in program.tensors]
        ['permutation', 'lower', 'upper', 'log_diag', 'sign']
    """


@dataclass(frozen=True)
class ShiftStep:
    r"""Rotate each feature, an angle: :math:`z = x + s` modulo :math:`2 B`, in :math:`[-B, B)`.

    Tensors: ``s`` ``[D]``.

    Args:
        bound: ``B``.

    Raises:
        TypeError: for a bound that is no number.
        ValueError: for one that is not positive and finite.

    Source: Rezende et al., "Normalizing Flows on Tori and Spheres" (2020).

    Example:
        >>> import torch
        >>> from pyflowkern import ops
        >>> program = ops.ChainProgram(1, [ops.ShiftStep(bound=2.0)])
        >>> ops.chain(torch.ones(1, 1), program, [torch.tensor([1.5])])[0].tolist()
        [[-1.5]]
    """

    bound: float

    def __post_init__(self) -> None:
        bound = check_number("bound", self.bound)
        if not 0 < bound < float("inf"):
            raise ValueError(f"bound must be positive and finite, got {bound}")
        object.__setattr__(self, "bound", bound)


@dataclass(frozen=True)
class ChainLayer:
    r"""One linear layer of a network.

    Tensors: weight ``[outputs, inputs]``, then the bias ``[outputs]`` if there is one; then for ``context="add"`` a
    weight ``C`` ``[outputs, K]``, and for ``"gate"`` a weight ``G`` ``[outputs, K]`` and a bias ``g`` ``[outputs]``.

    Args:
        outputs: number of units.
        inputs: number of values that it reads.
        bias: whether there is a bias.
        prefixes: of each unit, how many inputs it reads, from the first on; ascending.  Weights beyond count as zero.
            None where every unit reads all.
        columns: the columns of the weight stand in the order of the features, and are taken in the order in which the
            network reads them (first layer).
        rows: likewise, units stand in the order of the features, those of one feature together, and are taken in the
            order in which features are moved (last layer).
        context: what a layer between the first and the last does with the context ``c``: ``"add"`` adds ``C c`` to its
            output, ``"gate"`` multiplies it by :math:`\sigma(G c + g)`, before a residual block adds its input.

    Raises:
        TypeError: for sizes that are no ints and flags that are no bools.
        ValueError: for negative sizes, prefixes that do not fit, orders of features without prefixes, and an unknown
            use of the context.

    Example:
        >>> from pyflowkern.ops import ChainLayer
        >>> ChainLayer(outputs=3, inputs=2, prefixes=[0, 1, 2]).prefixes  # each unit sees one more
        (0, 1, 2)
    """

    outputs: int
    inputs: int
    bias: bool = True
    prefixes: Sequence[int] | None = None
    columns: bool = False
    rows: bool = False
    context: str = "none"

    def __post_init__(self) -> None:
        check_choice("context", self.context, CONTEXTS)
        for name in ("outputs", "inputs"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), 0))
        for name in ("bias", "columns", "rows"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        if self.prefixes is None:
            if self.columns or self.rows:
                raise ValueError("columns=True and rows=True are for layers with prefixes")
            return
        prefixes = _indices("prefixes", self.prefixes)
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
    last.  Tensors: those of each layer, then ``C`` ``[units of the first layer, K]`` if the context ``c`` is read.

    Args:
        layers: first to last.
        activation: ``a``: identity, relu, leaky_relu, elu, tanh, sigmoid, silu, gelu or softplus.
        residual: see above.
        activate_last: whether ``a`` precedes the last layer; networks without ``residual`` always have it there.
        context: whether the first layer adds a product with the context; see :class:`ChainLayer` for the others.

    Raises:
        TypeError: for layers that are none, and flags that are no bools.
        ValueError: for layers that do not fit each other, or an unknown activation.

    Source: Germain, Gregor, Murray and Larochelle, "MADE: Masked Autoencoder for Distribution Estimation" (2015), for
    the masks; He et al., "Identity mappings in deep residual networks" (2016), for the blocks.

    Example:
        >>> from pyflowkern.ops import ChainLayer, ChainNetwork
        >>> net = ChainNetwork([ChainLayer(8, 2), ChainLayer(4, 8)], activation="silu", context=True)
        >>> net.seen()  # how many inputs each output depends on
        [2, 2, 2, 2]
    """

    layers: Sequence[ChainLayer]
    activation: str = "relu"
    residual: bool = False
    activate_last: bool = True
    context: bool = False

    def __post_init__(self) -> None:
        check_list("layers", self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, ChainLayer):
                raise TypeError(f"layers[{i}] must be a ChainLayer, got {type(layer).__name__}")
        for name in ("residual", "activate_last", "context"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        count = len(self.layers)
        if not count or (self.residual and count % 2):
            raise ValueError(f"layers must be one at least, blocks are pairs of them; got {count}")
        if not self.residual and not self.activate_last:
            raise ValueError("activate_last=False is for residual networks, got residual=False")
        width = self.layers[0].outputs
        for i, layer in enumerate(self.layers[1:], 1):
            if layer.inputs != self.layers[i - 1].outputs or layer.columns:
                raise ValueError(
                    f"layers[{i}] must read the {self.layers[i - 1].outputs} units before it"
                )
            if self.residual and i < count - 1 and layer.outputs != width:
                raise ValueError(f"layers[{i}] must have the {width} units of its block's input")
        for i, layer in enumerate(self.layers[:-1]):
            if layer.rows:
                raise ValueError(f"layers[{i}] must not have rows=True: that is for the last one")
        for i in (0, count - 1):
            if (how := self.layers[i].context) != "none":
                raise ValueError(
                    f"layers[{i}] must have context='none', which is for layers between the ends, got {how!r}"
                )

    @property
    def contexts(self) -> bool:
        """Whether any layer reads the context."""
        return self.context or any(layer.context != "none" for layer in self.layers)

    def seen(self) -> list[int]:
        """Return how many of the network's inputs each output depends on, from the first on."""
        seen: list[int] = []
        values: list[list[int]] = []  # of every layer
        for i, layer in enumerate(self.layers):
            prefixes = layer.prefixes or (layer.inputs,) * layer.outputs
            seen = [seen[p - 1] if p else 0 for p in prefixes] if i else list(prefixes)
            if self.residual and i and i % 2 == 0 and i < len(self.layers) - 1:
                seen = [max(pair) for pair in zip(seen, values[i - 2], strict=True)]
            values.append(seen)
        return seen


@dataclass(frozen=True)
class ElementsStep:
    r"""Transform some features one by one, with parameters that a network computes from others.

    .. math:: z_m = \tau(x_m; \theta_m), \qquad \theta = g(x_{\text{reads}}, \text{context}).

    That is a coupling where the network reads features that pass, and a masked autoregressive layer where it reads the
    moved ones, each of them only those before it.

    Args:
        transform: :math:`\tau`: ``"affine"``, the name of a scale map, a :class:`~pyflowkern.ops.ScaleMap` or a
            :class:`~pyflowkern.ops.SplineMap`, with ``P`` parameters a feature.
        moves: the features that are transformed.
        reads: the features that the network reads, in the order of its inputs.
        network: ``g``; None for parameters that are the same for all samples: one tensor ``[len(moves) P]``.
        layout: ``"feature_major"``: the parameters of one feature stand together; ``"blocked"``: the first parameters
            of all features come first, then the second ones.

    Raises:
        TypeError: for features that are no ints, and a network that is none.
        ValueError: for features given twice, an unknown transform or layout, a network of other sizes, or one by which
            the parameters of a feature would depend on that feature or on later ones.

    Example:
        >>> from pyflowkern.ops import ChainLayer, ChainNetwork, ElementsStep
        >>> net = ChainNetwork([ChainLayer(8, 1), ChainLayer(2, 8)])
        >>> ElementsStep("tanh", moves=[1], reads=[0], network=net).parameters
        2
    """

    transform: str | ElementMap
    moves: Sequence[int]
    reads: Sequence[int] = ()
    network: ChainNetwork | None = None
    layout: str = "feature_major"

    def __post_init__(self) -> None:
        object.__setattr__(self, "transform", element_map(self.transform))
        for name in ("moves", "reads"):
            indices = _indices(name, getattr(self, name))
            if len(set(indices)) < len(indices):
                raise ValueError(f"{name} must name each feature once, got {indices}")
            object.__setattr__(self, name, indices)
        if not self.moves:
            raise ValueError("moves must name a feature at least, got none")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if len(self.moves) == 1:  # both are the same
            object.__setattr__(self, "layout", "feature_major")
        net = self.network
        if net is None:
            if self.reads:
                raise ValueError(f"reads must be empty without a network, got {self.reads}")
            return
        if not isinstance(net, ChainNetwork):
            raise TypeError(f"network must be a ChainNetwork, got {type(net).__name__}")
        sizes = net.layers[0].inputs, net.layers[-1].outputs
        want = len(self.reads), len(self.moves) * self.parameters
        if sizes != want:
            raise ValueError(f"network must map {want[0]} numbers to {want[1]}, got {sizes}")
        self._check_orders(net)
        self._check_triangular(net)

    @property
    def parameters(self) -> int:
        """How many parameters a moved feature has."""
        return element_parameters(self.element_map)

    @property
    def element_map(self) -> ElementMap:
        """The transform, by whatever name it was given."""
        return element_map(self.transform)

    def _check_orders(self, net: ChainNetwork) -> None:
        if net.layers[0].columns and sorted(self.reads) != list(range(len(self.reads))):
            raise ValueError(f"columns=True needs reads of all features, got {self.reads}")
        if net.layers[-1].rows and (
            self.layout != "feature_major" or sorted(self.moves) != list(range(len(self.moves)))
        ):
            raise ValueError(
                f"rows=True needs layout='feature_major' and moves of all features, got {self.moves}"
            )

    def _check_triangular(self, net: ChainNetwork) -> None:
        """Raise where a feature's parameters depend on it or on a later one: its log-determinant would be another."""
        place = {feature: i for i, feature in enumerate(self.reads)}
        seen, count, per = net.seen(), len(self.moves), self.parameters
        free = len(self.reads)  # how many inputs come before all features that are left
        for j in reversed(range(count)):
            free = min(free, place.get(self.moves[j], free))
            rows = (
                range(j * per, (j + 1) * per)
                if self.layout == "feature_major"
                else range(j, count * per, count)
            )
            if max((seen[r] for r in rows), default=0) > free:
                raise ValueError(
                    f"network must compute the parameters of feature {self.moves[j]} without this and later ones"
                )


Step: TypeAlias = PermuteStep | ActNormStep | LinearStep | PLUStep | ShiftStep | ElementsStep


def _indices(name: str, values: Sequence[int]) -> tuple[int, ...]:
    check_list(name, values)
    return tuple(check_count(f"{name}[{i}]", value, 0) for i, value in enumerate(values))
