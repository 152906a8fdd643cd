"""The steps of a chain of transforms: each says what it does and which tensors it takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from pyflowkern.core.checks import check_flag, check_number
from pyflowkern.ops.chain_network import ChainNetwork, indices_of
from pyflowkern.ops.elements import ElementMap, element_map, element_parameters
from pyflowkern.ops.scale_map import ScaleMap
from pyflowkern.ops.spline_map import SplineMap

__all__ = [
    "MOST_PLU",
    "ActNormStep",
    "ElementsStep",
    "Group",
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


class Group(NamedTuple):
    """Moved features, one after the other, that have the same transform."""

    transform: ElementMap
    #: The first of them, among the moved ones, and how many there are.
    begin: int
    features: int
    #: The first of their parameters.
    row: int
    #: How many parameters each of them has.
    parameters: int


@dataclass(frozen=True)
class ElementsStep:
    r"""Transform some features one by one, with parameters that a network computes from others.

    .. math:: z_m = \tau(x_m; \theta_m), \qquad \theta = g(x_{\text{reads}}, \text{context}).

    That is a coupling where the network reads features that pass, and a masked autoregressive layer where it reads the
    moved ones, each of them only those before it.

    Args:
        transform: :math:`\tau`: ``"affine"``, the name of a scale map, a :class:`~pyflowkern.ops.ScaleMap` or a
            :class:`~pyflowkern.ops.SplineMap`, with ``P`` parameters a feature; or a list of them, one for each moved
            feature, whose numbers of parameters may differ.
        moves: the features that are transformed.
        reads: the features that the network reads, in the order of its inputs.
        network: ``g``; None for parameters that are the same for all samples: one tensor ``[len(moves) P]``.
        layout: ``"feature_major"``: the parameters of one feature stand together; ``"blocked"``: the first parameters
            of all features come first, then the second ones.
        centred: the mean of a sample's log-scales is subtracted from each of them, so that the step preserves volume.
        turned: features are angles of a circle from ``-B`` to ``B``, the bound of their splines, and are turned by
            half of it before the spline: :math:`z = \tau((x \bmod 2 B) - B)`.

    Raises:
        TypeError: for features that are no ints, a network that is none, and flags that are no bools.
        ValueError: for features given twice, an unknown transform or layout, another number of transforms, a network of
            other sizes, or one by which the parameters of a feature would depend on that feature or on later ones; for
            ``centred`` with anything but one scale map and features that the network does not read, and for ``turned``
            with anything but splines that have linear tails.

    Source: Sorrenson, Rother and Köthe, "Disentanglement by nonlinear ICA with general incompressible-flow networks
    (GIN)" (2020), for ``centred``; Rezende et al., "Normalizing Flows on Tori and Spheres" (2020), for ``turned``.

    Example:
        >>> from pyflowkern.ops import ChainLayer, ChainNetwork, ElementsStep
        >>> net = ChainNetwork([ChainLayer(8, 1), ChainLayer(2, 8)])
        >>> ElementsStep("tanh", moves=[1], reads=[0], network=net).parameters
        2
    """

    transform: str | ElementMap | Sequence[str | ElementMap]
    moves: Sequence[int]
    reads: Sequence[int] = ()
    network: ChainNetwork | None = None
    layout: str = "feature_major"
    centred: bool = False
    turned: bool = False
    #: The moved features, in their order, by transforms.
    groups: tuple[Group, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("moves", "reads"):
            indices = indices_of(name, getattr(self, name))
            if len(set(indices)) < len(indices):
                raise ValueError(f"{name} must name each feature once, got {indices}")
            object.__setattr__(self, name, indices)
        if not self.moves:
            raise ValueError("moves must name a feature at least, got none")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        self._set_transform()
        self._set_groups()
        if len(self.moves) == 1:  # both are the same
            object.__setattr__(self, "layout", "feature_major")
        self._check_flags()
        net = self.network
        if net is None:
            if self.reads:
                raise ValueError(f"reads must be empty without a network, got {self.reads}")
            return
        if not isinstance(net, ChainNetwork):
            raise TypeError(f"network must be a ChainNetwork, got {type(net).__name__}")
        sizes, want = (net.inputs, net.layers[-1].outputs), (len(self.reads), self.outputs)
        if sizes != want:
            raise ValueError(f"network must map {want[0]} numbers to {want[1]}, got {sizes}")
        self._check_triangular(net)

    def _set_transform(self) -> None:
        given = self.transform
        if not isinstance(given, list | tuple):
            object.__setattr__(self, "transform", element_map(given))  # type: ignore[arg-type]
            return
        maps = tuple(map(element_map, given))
        if len(maps) != len(self.moves):
            raise ValueError(f"transform must be {len(self.moves)} maps, got {len(maps)}")
        alike = len({*maps}) == 1
        if not alike and self.layout != "feature_major":
            raise ValueError(
                f"layout must be 'feature_major' for several maps, got {self.layout!r}"
            )
        object.__setattr__(self, "transform", maps[0] if alike else maps)

    def _set_groups(self) -> None:
        groups, begin, row = [], 0, 0
        for transform, members in itertools.groupby(self.maps):
            size, parameters = len(list(members)), element_parameters(transform)
            groups.append(Group(transform, begin, size, row, parameters))
            begin, row = begin + size, row + size * parameters
        object.__setattr__(self, "groups", tuple(groups))

    def _check_flags(self) -> None:
        if check_flag("centred", self.centred):
            (only, *others) = self.groups
            scales = isinstance(only.transform, ScaleMap) and only.transform.kind != "additive"
            if others or not scales or {*self.moves} & {*self.reads}:
                raise ValueError(
                    "centred=True needs one scale map that is not additive, and a network that reads none of moves"
                )
        if check_flag("turned", self.turned) and not all(
            isinstance(m, SplineMap) and m.tails == "linear" and m.parameterization != "domain"
            for m in self.maps
        ):
            raise ValueError("turned=True needs splines with linear tails on a fixed interval")

    @property
    def maps(self) -> tuple[ElementMap, ...]:
        """The transform of each moved feature."""
        if isinstance(self.transform, tuple):
            return self.transform
        return (self.transform,) * len(self.moves)  # type: ignore[return-value]

    @property
    def parameters(self) -> int:
        """How many parameters a moved feature has; where transforms differ, the most."""
        return max(group.parameters for group in self.groups)

    @property
    def outputs(self) -> int:
        """How many parameters all moved features have."""
        return sum(group.features * group.parameters for group in self.groups)

    def _check_triangular(self, net: ChainNetwork) -> None:
        """Raise where a feature's parameters depend on it or on a later one: its log-determinant would be another."""
        place = {feature: i for i, feature in enumerate(self.reads)}
        seen, count, groups = net.seen(), len(self.moves), self.groups
        free = len(self.reads)  # how many inputs come before all features that are left
        for group in reversed(groups):
            per = group.parameters
            for j in reversed(range(group.features)):
                feature = self.moves[group.begin + j]
                free = min(free, place.get(feature, free))
                first = group.row + j * per
                rows = (
                    range(first, first + per)
                    if self.layout == "feature_major"
                    else range(j, count * per, count)
                )
                if max((seen[r] for r in rows), default=0) > free:
                    raise ValueError(
                        f"network must compute the parameters of feature {feature} without this and later ones"
                    )


Step: TypeAlias = (
    PermuteStep | ActNormStep | LinearStep | PLUStep | LUStep | ShiftStep | ElementsStep
)
