"""What couplings of FrEIA are: which features they move, by which networks and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._freia.domains import Domain, Segments
from pyflowkern.interop._freia.networks import sequential
from pyflowkern.interop._freia.parts import clamp_of
from pyflowkern.nn.links import Link
from pyflowkern.ops import ElementsStep, ScaleMap, SplineMap

__all__ = [
    "Coupling",
    "Move",
    "all_in_one",
    "conditional_affine",
    "gin",
    "glow",
    "nice",
    "one_sided",
    "rnvp",
]

_FACTS = ("split_len1", "split_len2", "conditional", "clamp", "f_clamp", "ndims")


@dataclass(frozen=True)
class Move:
    """One half that is moved by what networks read from the other.

    Args:
        nets: names of the networks; of two, one gives the raw scales and the other the shifts.
        second: whether the second half is moved; None for everything, by the conditions alone.
        map: the map of its numbers.
        centred: axes over which log-scales have mean 0; none where they need not.
        domain: of a spline.
    """

    nets: Sequence[str]
    second: bool | None
    map: ScaleMap | SplineMap
    centred: tuple[int, ...] = ()
    domain: Domain | Segments | None = None

    @property
    def numbers(self) -> int:
        """How many raw numbers all networks make for an element."""
        if self.domain is not None:
            return self.domain.numbers
        return 1 if self.map.kind == "additive" else 2

    @property
    def preserves_volume(self) -> bool:
        """Whether all its log-determinants are 0."""
        return bool(self.centred) or getattr(self.map, "kind", "") == "additive"

    @property
    def chained(self) -> bool:
        """Whether a chain has it."""
        of_features = self.centred in ((), (1,))
        return of_features and (self.domain is None or self.domain.plain)


@dataclass(frozen=True)
class Coupling:
    """One move or two, in the order from data to latent.

    Args:
        moves: see there.
        first: how many features the first half has.
        count: how many features there are.
        context: how many numbers all conditions have.
        facts: attributes of the module that this follows from.
    """

    moves: Sequence[Move]
    first: int
    count: int
    context: int
    facts: Sequence[str] = _FACTS

    def halves(self, move: Move) -> tuple[range, range]:
        """Return the features that a move reads, and those that it moves."""
        ahead, behind = range(self.first), range(self.first, self.count)
        if move.second is None:
            return range(0), range(self.count)
        return (ahead, behind) if move.second else (behind, ahead)

    def add_to(self, link: Link, module: torch.nn.Module) -> bool:
        """Add the steps to a link; return False where a network is not known."""
        link.watch(module, *self.facts)
        if self.context:
            link.context_features = self.context
        if not all(move.chained for move in self.moves):
            return False
        try:
            return all(self._add(move, link, module) for move in self.moves)
        except ValueError:  # a network of other sizes: calling it says so
            return False

    def _add(self, move: Move, link: Link, module: torch.nn.Module) -> bool:
        reads, moved = self.halves(move)
        nets = [module._modules.get(name) for name in move.nets]
        half = len(moved)
        if not half:
            return False
        if len(nets) == 2:  # first the scales, without shifts, then the shifts
            assert isinstance(move.map, ScaleMap)
            scale = sequential(nets[0], link, self.context, zeros=half)
            if scale is None:
                return False
            scales = replace(move.map, shift_gain=0.0)
            link.steps.append(ElementsStep(scales, moved, reads, scale, "blocked"))
            if (shift := sequential(nets[1], link, self.context)) is None:
                return False
            link.steps.append(ElementsStep(ScaleMap("additive"), moved, reads, shift, "blocked"))
            return True
        rows = None
        if isinstance(move.map, ScaleMap) and move.map.kind != "additive":
            rows = [*range(half, 2 * half), *range(half)]  # here raw scales come first
        if (net := sequential(nets[0], link, self.context, rows)) is None:
            return False
        layout = "feature_major" if isinstance(move.map, SplineMap) else "blocked"
        centred = bool(move.centred)
        link.steps.append(ElementsStep(move.map, moved, reads, net, layout, centred))
        return True


def _base(module: Any, moves: Sequence[Move]) -> Coupling | None:
    """Return a coupling of those that have ``split_len1``."""
    if any(move.map is None for move in moves):
        return None
    context = sum(int(shape[0]) for shape in module.dims_c) if module.conditional else 0
    return Coupling(moves, module.split_len1, module.split_len1 + module.split_len2, context)


def _clamped(module: Any) -> Any:
    clamp = module.clamp
    if isinstance(clamp, bool) or not isinstance(clamp, (int, float)) or not clamp > 0:
        return None
    return clamp_of(module.f_clamp, float(clamp))


def glow(module: Any) -> Coupling | None:
    """Return what a GLOWCouplingBlock is."""
    scale_map = _clamped(module)
    return _base(module, [Move(["subnet2"], False, scale_map), Move(["subnet1"], True, scale_map)])


def rnvp(module: Any) -> Coupling | None:
    """Return what an RNVPCouplingBlock is."""
    scale_map = _clamped(module)
    return _base(
        module,
        [
            Move(["subnet_s2", "subnet_t2"], False, scale_map),
            Move(["subnet_s1", "subnet_t1"], True, scale_map),
        ],
    )


def nice(module: Any) -> Coupling | None:
    """Return what a NICECouplingBlock is."""
    additive = ScaleMap("additive")
    return _base(module, [Move(["F"], False, additive), Move(["G"], True, additive)])


def one_sided(module: Any) -> Coupling | None:
    """Return what an AffineCouplingOneSided is."""
    return _base(module, [Move(["subnet"], True, _clamped(module))])


def gin(module: Any) -> Coupling | None:
    """Return what a GINCouplingBlock is."""
    scale_map = _clamped(module)
    moves = [("subnet2", False), ("subnet1", True)]
    return _base(module, [Move([net], second, scale_map, (1,)) for net, second in moves])


def conditional_affine(module: Any) -> Coupling | None:
    """Return what a ConditionalAffineTransform is."""
    return _base(module, [Move(["subnet"], None, _clamped(module))])


def all_in_one(module: Any) -> Coupling | None:
    """Return what the coupling of an AllInOneBlock is."""
    clamp, splits = module.clamp, module.splits
    if isinstance(clamp, bool) or not isinstance(clamp, (int, float)) or not clamp > 0:
        return None
    if len(splits) != 2 or not all(splits):
        return None
    # version 0.2 does not divide by the clamp within the tanh
    gain = _gain(type(module), float(clamp))
    if gain is None:
        return None
    scale_map = ScaleMap("tanh", clamp=float(clamp), gain=gain, shift_gain=0.1)
    context = int(module.condition_channels) if module.conditional else 0
    facts = ("clamp", "splits", "GIN", "sum_dims", "conditional", "condition_channels")
    centred = tuple(module.sum_dims) if module.GIN else ()
    move = Move(["subnet"], True, scale_map, centred)
    return Coupling([move], splits[0], sum(splits), context, facts)


def _gain(cls: Any, clamp: float) -> float | None:
    """Return the factor of the raw scale with which a class of AllInOneBlock computes; None for another form."""
    block = SimpleNamespace(clamp=clamp, GIN=False, sum_dims=(1,))
    raw = torch.tensor([[7.0, 0.0]], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        try:
            found = cls._affine(block, torch.zeros_like(raw[:, :1]), raw.clone())[1]
        except Exception:
            return None
    for gain in (0.1 * clamp, 0.1):
        if torch.allclose(found, _tanh(gain * raw[:, 0], clamp)):
            return gain
    return None


def _tanh(u: Tensor, clamp: float) -> Tensor:
    return clamp * torch.tanh(u / clamp)
