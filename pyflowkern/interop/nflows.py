"""What is known of nflows 0.14 and its copies in other packages."""

from __future__ import annotations

from typing import Any

import torch

from pyflowkern.interop._check import disagreement
from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._layers import ForeignLayer, Runs, layer_of, single_doors
from pyflowkern.interop._networks import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import PermuteStep

__all__ = ["LIBRARY"]


class _Permutation(ForeignLayer):
    """``nflows.transforms.permutations.Permutation`` along the features."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, module._permutation.numel())  # type: ignore[operator]

    def link(self) -> Link | None:
        index = self.module._buffers["_permutation"]
        if index is None or self.module._dim != 1:
            return None
        order = index.tolist()
        link = Link([PermuteStep(order)])
        link.watch(self.module, "_dim")
        link.holds.append(Holds(self.module, "_permutation"))
        return link


class _CompositeDoor(MethodDoor):
    """One direction of a CompositeTransform."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._runs = Runs(layer_of)

    def run(self, inputs: Any, context: Any = None) -> Any:
        """Run the transforms, as many as possible by one op."""
        modules = [*self.module._transforms._modules.values()]  # type: ignore[union-attr]
        pair = self._runs.pair(modules, inputs, context, inverse=self.name == "inverse")
        return self.own(inputs, context) if pair is None else pair


def _single(make: type[ForeignLayer]) -> Kind:
    def look(module: torch.nn.Module) -> Outcome:
        if why := disagreement(module, make):
            return Outcome(note=why)
        return Outcome(single_doors(make(module)), runs="one op")

    return Kind(look)


def _composite(module: torch.nn.Module) -> Outcome:
    return Outcome(
        [_CompositeDoor(module, "forward"), _CompositeDoor(module, "inverse")], runs="one op"
    )


LIBRARY = Library(
    "nflows",
    ("nflows", "glasflow.nflows"),
    {
        "transforms.base.CompositeTransform": Kind(_composite),
        "transforms.permutations.Permutation": _single(_Permutation),
        "transforms.permutations.RandomPermutation": _single(_Permutation),
        "transforms.permutations.ReversePermutation": _single(_Permutation),
    },
)
