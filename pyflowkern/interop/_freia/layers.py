"""Transforms of vectors of FrEIA, as steps of a chain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._freia.moves import Coupling, all_in_one
from pyflowkern.interop._freia.parts import (
    LOG_FIFTH,
    Constants,
    FreiaLayer,
    global_map_of,
)
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.chain_steps import ActNormStep, ElementsStep, LinearStep, PermuteStep

__all__ = [
    "ActNorm",
    "AllInOne",
    "CouplingLayer",
    "FixedLinear",
    "Householder",
    "NewActNorm",
    "Permutation",
    "global_numbers",
]

_ADDITIVE = ScaleMap("additive")
#: ``(x - loc) / exp(log_scale)``.
_NORMALISE = ScaleMap("exp", shift_first=True, divide=True, shift_gain=-1.0)


class CouplingLayer(FreiaLayer):
    """A coupling.

    Args:
        module: the coupling.
        read: finds what it is.
    """

    def __init__(self, read: Callable[[Any], Coupling | None], module: Any) -> None:
        super().__init__(module)
        self._read = read
        known = read(module)
        moves = [] if known is None else known.moves
        self.preserves_volume = bool(moves) and all(move.preserves_volume for move in moves)

    def link(self) -> Link | None:
        coupling, link = self._read(self.module), Link()
        return link if coupling is not None and coupling.add_to(link, self.module) else None


class AllInOne(FreiaLayer):
    """``AllInOneBlock``: a coupling, a scale and a shift for each feature, and a permutation or a matrix."""

    is_block = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._zero, self._factor = Constants([], 0.0), Constants([self.features], LOG_FIFTH)
        self._none = Constants([self.features], 0.0)

    def link(self) -> Link | None:
        module, link = self.module, Link()
        coupling = all_in_one(module)
        found = global_map_of(module.global_scale_activation)
        if coupling is None or found is None or module.input_rank:
            return None
        link.watch(
            module, "global_scale_activation", "input_rank", "reverse_pre_permute", "householder"
        )
        if module.reverse_pre_permute and not self._permute(link, back=True):
            return None
        if not coupling.add_to(link, module):
            return None
        scale_map, factor = found
        every = range(self.features)
        if module.GIN:  # which has no scales of all features
            link.steps.append(ElementsStep("additive", every))
            link.make(module, ["global_offset"], self._offsets)
            return link if self._permute(link, back=False) else None
        link.steps.append(ElementsStep(scale_map, every, layout="blocked"))
        link.make(module, ["global_scale"], self._numbers)
        if factor != 1:
            link.steps.append(ActNormStep())
            link.make(module, ["global_scale", "global_offset"], self._of_factor)
        return link if self._permute(link, back=False) else None

    def _offsets(self, inverse: bool) -> Sequence[Tensor]:
        return (self.module.global_offset.view(-1),)

    def _numbers(self, inverse: bool) -> Sequence[Tensor]:
        """Return the shifts, then the raw scales."""
        module = self.module
        return (torch.cat((module.global_offset, module.global_scale), 1).view(-1),)

    def _of_factor(self, inverse: bool) -> Sequence[Tensor]:
        like = self.module.global_scale
        return self._factor.like(like), self._none.like(like)

    def _permute(self, link: Link, back: bool) -> bool:
        """Add the permutation, or with ``back`` what undoes it; return whether it is known."""
        module = self.module
        names = ["w_perm_inv", "w_perm"] if back else ["w_perm", "w_perm_inv"]
        if module.householder:
            link.steps.append(LinearStep())
            link.make(module, ["global_scale", "global_scale"], partial(self._reflections, back))
            return True
        order, other = (module._parameters.get(name) for name in names)
        if order is None or other is None:
            return False
        if order.dim() == 2:
            link.steps.append(LinearStep())
            link.make(module, names, partial(self._matrix, names))
            return True
        link.watch(module, "permute_function")
        if order.is_floating_point() or order[other].tolist() != [*range(self.features)]:
            return False
        link.steps.append(PermuteStep(order.tolist()))
        link.holds += [Holds(module, names[0]), Holds(module, names[1])]
        return True

    def _matrix(self, names: Sequence[str], inverse: bool) -> Sequence[Tensor]:
        weight: Any = self.module._parameters[names[inverse]]
        return weight, self._zero.like(weight)

    def _reflections(self, back: bool, inverse: bool) -> Sequence[Tensor]:
        weight: Tensor = self.module._construct_householder_permutation()
        return weight.t() if back ^ inverse else weight, self._zero.like(weight)


def global_numbers(module: Any) -> tuple[Tensor, Tensor]:
    """Return the logarithm of an AllInOneBlock's global scale, and its offset divided by the scale: ``[C]`` each."""
    scale = module.global_scale_activation(module.global_scale).view(-1)
    return scale.log(), module.global_offset.view(-1) / scale


class Permutation(FreiaLayer):
    """``PermuteRandom``."""

    preserves_volume = True

    def link(self) -> Link | None:
        module = self.module
        order, back = (module._parameters.get(name) for name in ("perm", "perm_inv"))
        if order is None or back is None or order[back].tolist() != [*range(self.features)]:
            return None
        link = Link([PermuteStep(order.tolist())])
        link.watch(module)
        link.holds += [Holds(module, "perm"), Holds(module, "perm_inv")]
        return link


class ActNorm(FreiaLayer):
    """``ActNorm`` of version 0.2: ``x exp(scale) + bias``."""

    def link(self) -> Link | None:
        module = self.module
        link = Link([ElementsStep(ScaleMap("exp"), range(self.features), layout="blocked")])
        link.watch(module)
        link.make(module, ["scale"], self._numbers)
        link.waits.append(partial(_new, module))
        return link

    def _numbers(self, inverse: bool) -> Sequence[Tensor]:
        return (torch.cat((self.module.bias, self.module.scale), 1).view(-1),)


def _new(module: Any) -> bool:
    return bool(module.init_on_next_batch)


class NewActNorm(FreiaLayer):
    """``ActNorm`` of later versions: ``(x - loc) / exp(log_scale)``."""

    def link(self) -> Link | None:
        module = self.module
        link = Link([ElementsStep(_NORMALISE, range(self.features), layout="blocked")])
        link.watch(module)
        link.make(module, ["loc"], self._numbers)
        link.waits.append(partial(_not_initialised, module))
        return link

    def _numbers(self, inverse: bool) -> Sequence[Tensor]:
        return (torch.cat((self.module.loc, self.module.log_scale), 1).view(-1),)


def _not_initialised(module: Any) -> bool:
    return not module.is_initialized


class FixedLinear(FreiaLayer):
    """``FixedLinearTransform``: ``x M + b``."""

    def link(self) -> Link | None:
        module, link = self.module, Link([LinearStep()])
        link.watch(module)
        names = ["M", "logDetM"]
        link.make(module, names, self._matrix)
        b = module.b
        if isinstance(b, Tensor) and b.dim():
            link.steps.append(ElementsStep(_ADDITIVE, range(self.features)))
            link.make(module, ["b"], self._shift)
        elif b != 0:
            return None
        else:
            link.holds.append(partial(_still_zero, module))
        return link

    def _matrix(self, inverse: bool) -> Sequence[Tensor]:
        module = self.module
        return (module.M_inv if inverse else module.M).t(), module.logDetM

    def _shift(self, inverse: bool) -> Sequence[Tensor]:
        return (self.module.b.view(-1),)


def _still_zero(module: Any) -> bool:
    return not isinstance(module.b, Tensor) or (not module.b.dim() and not module.b)


class Householder(FreiaLayer):
    """``HouseholderPerm`` without a condition."""

    preserves_volume = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._zero = Constants([], 0.0)

    def link(self) -> Link | None:
        module = self.module
        if module.conditional or self._product() is None:
            return None
        link = Link([LinearStep()])
        link.watch(module, "conditional", "fixed")
        link.make(module, ["Vs", "Vs"], self._matrix)
        return link

    def _product(self) -> Any:
        return getattr(sys.modules.get(type(self.module).__module__), "_fast_h", None)

    def _matrix(self, inverse: bool) -> Sequence[Tensor]:
        module = self.module
        weight = module.W if module.fixed else self._product()(module.Vs)
        return weight if inverse else weight.t(), self._zero.like(weight)
