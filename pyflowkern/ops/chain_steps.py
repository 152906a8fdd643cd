"""The steps of a chain of transforms: each says what it does and which tensors it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pyflowkern.core.checks import check_number
from pyflowkern.ops.chain_network import ChainNetwork, indices_of
from pyflowkern.ops.elements import ElementMap, element_map, element_parameters

__all__ = [
    "MOST_PLU",
    "ActNormStep",
    "ElementsStep",
    "LUStep",
    "LinearStep",
    "PLUStep",
    "PermuteStep",
    "ShiftStep",
    "Step",
]

#: Features up to which the factors of a matrix are multiplied inside of the op.
MOST_PLU = 128
LAYOUTS = ("feature_major", "blocked")


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
        order = indices_of("order", self.order)
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
class LUStep:
    r"""Multiply by a matrix in packed triangles and add a bias: ``z = L U x + b``, for up to 128 features.

    ``L`` has ones on its diagonal, ``U`` has :math:`\log(1 + e^r) + \varepsilon` for the raw diagonal ``r``, so that
    the matrix is invertible.

    Tensors: the entries of ``L`` below the diagonal and those of ``U`` above it, row by row ``[D (D - 1) / 2]``, the
    raw diagonal ``[D]`` and the bias ``[D]``.

    Args:
        eps: :math:`\varepsilon`, the least number on the diagonal.

    Raises:
        TypeError: for what is no number.
        ValueError: for a negative or infinite one.

    Source: Oliva et al., "Transformation Autoregressive Networks" (2018), as Durkan et al., "Neural Spline Flows"
    (2019), have it.

    Example:
        >>> import torch
        >>> from pyflowkern import ops
        >>> program = ops.ChainProgram(2, [ops.LUStep(eps=1e-3)])
        >>> tensors = [torch.tensor([0.5]), torch.zeros(1), torch.full((2,), 0.5397), torch.zeros(2)]
        >>> z, log_det = ops.chain(torch.ones(1, 2), program, tensors)
        >>> [round(v, 3) for v in z[0].tolist()], abs(round(log_det.item(), 3))
        ([1.0, 1.5], 0.0)
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        eps = check_number("eps", self.eps)
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be at least 0 and finite, got {eps}")
        object.__setattr__(self, "eps", eps)


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
            indices = indices_of(name, getattr(self, name))
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
        self._check_triangular(net)

    @property
    def parameters(self) -> int:
        """How many parameters a moved feature has."""
        return element_parameters(self.element_map)

    @property
    def element_map(self) -> ElementMap:
        """The transform, by whatever name it was given."""
        return element_map(self.transform)

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


Step: TypeAlias = (
    PermuteStep | ActNormStep | LinearStep | PLUStep | LUStep | ShiftStep | ElementsStep
)
