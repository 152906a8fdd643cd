"""Gradients of the tensors that a field reads, summed over its evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyflowkern.ode.parameters import leaf_node, leaf_node_variable, leaf_nodes

__all__ = ["Gradients", "Parameters"]


class Parameters:
    """The tensors whose gradients a solve returns, and which of them the field has been seen to read.

    Args:
        tensors: the tensors that may be read.
        complete: whether they are the user's own list, which is trusted.  Otherwise the graph of every evaluation is
            searched, and reading any other tensor is an error, since its gradient would be lost in silence.
    """

    def __init__(self, tensors: Sequence[Tensor], complete: bool) -> None:
        self.tensors, self.complete = tensors, complete
        self.read = list(range(len(tensors))) if complete else []
        self._numbers = {} if complete else {leaf_node(p): i for i, p in enumerate(tensors)}
        self._seen: set[object] = set()

    def look(self, value: Tensor, argument: Tensor, stop: Iterable[object] = ()) -> None:
        """Add to ``read`` the tensors that a recorded value depends on.

        Args:
            value: result of the field.
            argument: the state that it was computed from, a leaf that does not count.
            stop: nodes of the graph at which the search turns back.

        Raises:
            RuntimeError: where the value depends on a tensor that is not among :attr:`tensors`.
        """
        if self.complete:
            return
        for node in leaf_nodes(value, stop):
            if node in self._seen:
                continue
            number = self._numbers.get(node)
            if number is None:
                leaf = leaf_node_variable(node)
                if leaf is not None and leaf is not argument:
                    raise RuntimeError(
                        f"func reads a tensor of shape {tuple(leaf.shape)} that requires a gradient and could not be "
                        "found when the solve began: name all such tensors in params="
                    )
            else:
                self._seen.add(node)
                self.read.append(number)

    def wanted(self) -> list[Tensor]:
        """Return the tensors that were read."""
        return [self.tensors[i] for i in self.read]


class Gradients(Parameters):
    """Parameters with one gradient for each, summed over evaluations; None where there is none yet."""

    def __init__(self, tensors: Sequence[Tensor], complete: bool) -> None:
        super().__init__(tensors, complete)
        self.totals: list[Tensor | None] = [None] * len(tensors)

    def pull(self, value: Tensor, argument: Tensor, cotangent: Tensor) -> Tensor | None:
        """Return the gradient of ``argument``, None if it has none, and add up those of the parameters.

        Args:
            value: result of the field, recorded.
            argument: the state that it was computed from, a leaf.
            cotangent: of ``value``.
        """
        if not value.requires_grad:
            return None
        self.look(value, argument)
        first, *others = torch.autograd.grad(
            value,
            (argument, *self.wanted()),
            cotangent.view(value.shape).to(value.dtype),
            retain_graph=True,  # the field may read results of a graph that the caller still needs
            allow_unused=True,
        )
        sums: list[Tensor] = []
        new: list[Tensor] = []
        for i, g in zip(self.read, others, strict=True):
            if g is None:
                continue
            total = self.totals[i]
            if total is None:
                self.totals[i] = g.clone()
            else:
                sums.append(total)
                new.append(g)
        if sums:
            torch._foreach_add_(sums, new)
        return first
