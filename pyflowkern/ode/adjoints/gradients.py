"""Gradients of the tensors that a field reads, summed over its evaluations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field
from pyflowkern.ode.parameters import leaf_node, leaf_nodes, tensors_in

__all__ = ["Gradients", "Parameters", "vector_jacobian"]


def vector_jacobian(
    value: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Return what ``torch.autograd.grad`` does, None for unused inputs; the graph is kept.

    Its checks of arguments take a tenth of the time of a small field, so they are left out.  The graph is kept because
    the field may read results of a graph that the caller still needs.

    Args:
        value: recorded; requires a gradient.
        inputs: leaves or intermediate results.
        cotangent: of ``value``, with its shape and dtype.
        create_graph: whether the result is recorded, too.
    """
    products: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        (value,), (cotangent,), True, create_graph, inputs, True, accumulate_grad=False
    )
    return products


class Parameters:
    """The tensors whose gradients a solve returns, and which of them the field has been seen to read.

    Args:
        tensors: the tensors that may be read.
        complete: whether they are the user's own list, which is trusted as long as the field still reads it.  Otherwise
            the graph of every evaluation is searched, and reading any other tensor is an error, since its gradient
            would be lost in silence.
        field: whose evaluations are looked at.
        held: what the field held when the solve began, if the list is the user's.
    """

    def __init__(
        self, tensors: Sequence[Tensor], complete: bool, field: Field, held: Sequence[Tensor]
    ) -> None:
        self.tensors, self.complete, self.field, self.held = tensors, complete, field, held
        self.read = list(range(len(tensors))) if complete else []
        self._numbers = {} if complete else {leaf_node(p): i for i, p in enumerate(tensors)}
        self._read_nodes: set[object] = set()
        self._wanted = list(tensors) if complete else []
        self._compared = False

    def look(self, value: Tensor, argument: Tensor, stop: Collection[object] = ()) -> None:
        """Add to ``read`` the tensors that a recorded value depends on.

        Args:
            value: result of the field.
            argument: the state that it was computed from, a leaf that does not count.
            stop: nodes of the graph at which the search turns back.

        Raises:
            RuntimeError: where the value depends on a tensor that is not among :attr:`tensors`.
        """
        if self.complete:
            if not self._compared:
                self._compared = True
                self._compare(value, argument)
            return
        known = self._read_nodes
        for node in leaf_nodes(value, known.union(stop) if stop else known):
            number = self._numbers.get(node)
            if number is None:
                leaf = getattr(node, "variable", None)
                if leaf is not argument and isinstance(leaf, Tensor):
                    raise RuntimeError(
                        f"func reads a tensor of shape {tuple(leaf.shape)} that requires a gradient and could not be "
                        "found when the solve began: name all such tensors in params="
                    )
            else:
                known.add(node)
                self.read.append(number)
                self._wanted.append(self.tensors[number])

    def _compare(self, value: Tensor, argument: Tensor) -> None:
        """Raise RuntimeError where a field has other tensors in place of some on the user's list.

        ``torch.func.functional_call`` puts a module's own tensors back before a backward pass evaluates it again.
        """
        read = {n for n in leaf_nodes(value) if hasattr(n, "variable")}
        listed = {leaf_node(p) for p in self.tensors if p.is_leaf and p.requires_grad}
        unread, others = listed - read, {n for n in read - listed if n.variable is not argument}
        if not unread or not others:
            return
        # what the field still holds it may read at other times, and its list may leave out others on purpose
        holds = {leaf_node(p) for p in tensors_in(self.field)}
        if not unread <= holds or others & holds - {leaf_node(p) for p in self.held}:
            raise RuntimeError(
                "func reads other tensors in the backward pass than in the solve, so that gradients would be lost: "
                "call backward() inside of the module that torch.func.functional_call runs"
            )

    def wanted(self) -> list[Tensor]:
        """Return the tensors that were read: a list that :meth:`look` adds to."""
        return self._wanted


class Gradients(Parameters):
    """Parameters with one gradient for each, summed over evaluations; None where there is none yet."""

    def __init__(
        self, tensors: Sequence[Tensor], complete: bool, field: Field, held: Sequence[Tensor]
    ) -> None:
        super().__init__(tensors, complete, field, held)
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
        first, *others = vector_jacobian(
            value, (argument, *self._wanted), cotangent.view(value.shape).to(value.dtype)
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
