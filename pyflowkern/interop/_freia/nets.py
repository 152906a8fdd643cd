"""Networks of FrEIA: transforms one after another, of which one op runs as many as it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._freia.blocks import side_by_side
from pyflowkern.interop._freia.parts import FreiaLayer
from pyflowkern.interop._layers import known_layer
from pyflowkern.nn.chain import Chains, Run
from pyflowkern.nn.links import Link

__all__ = ["GraphDoor", "SequenceDoor"]

Key = tuple[int, ...]
Segment = tuple[Key, list[Any], Chains]


class _Place:
    """A transform in a line of them.

    Args:
        module: the transform.
        key: which of all conditions it gets.
        node: the node of a graph that it is the module of.
    """

    def __init__(self, module: Any, key: Key, node: Any = None) -> None:
        self.module, self.key, self.node = module, key, node
        layer = known_layer(module)
        self.layer = layer if isinstance(layer, FreiaLayer) else None
        self.features = 0 if self.layer is None else self.layer.features
        self.preserves_volume = self.layer is not None and self.layer.preserves_volume

    def _chain_link(self) -> Link | None:
        return None if self.layer is None else self.layer._chain_link()

    def call(
        self, x: Tensor, conditions: Sequence[Tensor], rev: bool, jac: bool
    ) -> tuple[Tensor, Any] | None:
        """Call the transform; None for what it does not return as it should."""
        given: dict[str, Any] = {"c": [conditions[i] for i in self.key]} if self.key else {}
        try:
            found = self.module((x,), rev=rev, jac=jac, **given)
        except Exception as error:
            if self.node is None:
                raise
            raise RuntimeError(f"{self.node} encountered an error.") from error
        if type(found) not in (tuple, list) or len(found) != 2:
            return None
        out, log_det = found
        if type(out) not in (tuple, list) or len(out) != 1:
            return None
        return out[0], log_det


class _Line:
    """Transforms one after another, with the conditions that each of them gets."""

    def __init__(self) -> None:
        self._found: tuple[list[Any], list[Segment]] = [], []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty."""
        return _Line, ()

    def refuse(self, x: object) -> bool:
        """Whether all transforms were too wide for such a call a few calls ago."""
        segments = self._found[1]
        return isinstance(x, Tensor) and bool(segments) and all(s.refuse(x) for *_, s in segments)

    def run(
        self,
        modules: list[Any],
        keys: list[Key],
        x: Tensor,
        conditions: Sequence[Tensor],
        rev: bool,
        jac: bool,
        nodes: list[Any] | None = None,
    ) -> tuple[Tensor, Any] | None:
        """Return the output, and the log-determinant as the library adds it up; None where no op would run."""
        known, segments = self._found  # in one piece: other threads may find them, too
        if known != [modules, keys]:
            segments = _segments(modules, keys, nodes)
            self._found = [modules, keys], segments
        found = [(k, s.parts(places, x), places) for k, places, s in segments]
        if all(parts is None for _, parts, _ in found):
            return None
        total: Any = 0
        for key, parts, places in reversed(found) if rev else found:
            given: Sequence[Any] = places if parts is None else parts
            for part in reversed(given) if rev else given:
                pair: tuple[Tensor, Any] | None = None
                if isinstance(part, Run):
                    context = side_by_side([conditions[i] for i in key])
                    pair = part.fused(x, context, inverse=rev)
                    if pair is not None and all(map(_preserves, part.layers)):
                        pair = pair[0], 0.0  # as the library has it
                if pair is None:
                    inner: list[Any] = part.layers if isinstance(part, Run) else [part]
                    pair = _called(inner, x, conditions, rev, jac)
                if pair is None:
                    return None
                x, log_det = pair
                total = _sum(total, log_det, jac)
        return x, total


def _segments(modules: list[Any], keys: list[Key], nodes: list[Any] | None) -> list[Segment]:
    """Divide a line where the conditions are others."""
    found: list[Segment] = []
    run: list[Any] = []
    common: Key = ()
    for i, (module, key) in enumerate(zip(modules, keys, strict=True)):
        if run and key and common and key != common:
            found.append((common, run, Chains()))
            run, common = [], ()
        run.append(_Place(module, key, nodes[i] if nodes else None))
        common = common or key
    return [*found, (common, run, Chains())]


_preserves = attrgetter("preserves_volume")


def _called(
    places: Sequence[_Place], x: Tensor, conditions: Sequence[Tensor], rev: bool, jac: bool
) -> tuple[Tensor, Any] | None:
    total: Any = 0
    for place in reversed(places) if rev else places:
        pair = place.call(x, conditions, rev, jac)
        if pair is None:
            return None
        x, log_det = pair
        total = _sum(total, log_det, jac)
    return x, total


def _sum(total: Any, log_det: Any, jac: bool) -> Any:
    """Return the sum; None where a transform was asked for no log-determinant and gave none."""
    if not jac and (log_det is None or total is None):
        return None
    return log_det + total


def _conditions(c: Any) -> Sequence[Tensor] | None:
    """Return conditions as a sequence; None for what the library must look at itself."""
    if isinstance(c, Tensor):
        return [c]
    if c is None:
        return []
    fit = type(c) in (list, tuple) and all(isinstance(t, Tensor) for t in c)
    return c if fit else None


class SequenceDoor(MethodDoor):
    """``forward`` of a SequenceINN."""

    module: Any

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._line = _Line()

    def run(self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        """Run all transforms, as many as possible by one op."""
        if self._line.refuse(x_or_z):
            return self.own(x_or_z, c, rev, jac)
        found = self._run(x_or_z, c, rev, jac)
        return self.own(x_or_z, c, rev, jac) if found is None else found

    def _run(self, x: Any, c: Any, rev: Any, jac: Any) -> Any:
        module = self.module
        places = module.conditions
        keys: list[Key] = [() if i is None else (i,) for i in places]
        # a tensor alone is one condition for each sample, of which the library takes one
        if not isinstance(x, Tensor) or isinstance(c, Tensor) or not _flags(rev, jac):
            return None
        conditions = _conditions(c)
        if conditions is None or not all(
            type(i) is int and -len(conditions) <= i < len(conditions) for k in keys for i in k
        ):
            return None
        modules = [*module.module_list._modules.values()]
        if len(modules) != len(keys):
            return None
        pair = self._line.run(modules, keys, x, conditions, rev, jac)
        if pair is None:
            return None
        y, total = pair
        if total is None:
            return None
        if not isinstance(total, Tensor) and _starts_with_zeros(module):
            total = torch.zeros(x.shape[0], device=x.device) + total
        return (y,) if module.force_tuple_output else y, total


def _flags(*flags: object) -> bool:
    return all(isinstance(flag, bool) for flag in flags)


def _starts_with_zeros(module: Any) -> bool:
    """Whether this version's log-determinants are tensors though all transforms preserve volume."""
    return "__setitem__" in vars(type(module))


@dataclass
class _Graph:
    """A graph that is a line of nodes with one input and one output each."""

    nodes: list[Any]
    keys: list[Key]


class GraphDoor(MethodDoor):
    """``forward`` of a GraphINN whose nodes are a line."""

    module: Any

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._line = _Line()
        self._list: Any = None
        self._graph: _Graph | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run all nodes, as many as possible by one op."""
        if args and self._line.refuse(args[0]):
            return self.own(*args, **kwargs)
        found = self._run(*args, **kwargs)
        return self.own(*args, **kwargs) if found is None else found

    def _run(self, x: Any, c: Any = None, rev: Any = False, jac: Any = True, **others: Any) -> Any:
        module = self.module
        conditions = _conditions(c)
        if others or not isinstance(x, Tensor) or not _flags(rev, jac) or conditions is None:
            return None
        if len(conditions) != len(module.condition_nodes):
            return None
        if self._list is not module.node_list:
            # in this order: other threads may look between
            self._graph, self._list = line_of(module), module.node_list
        graph = self._graph
        if graph is None:
            return None
        modules = [node.module for node in graph.nodes]
        pair = self._line.run(modules, graph.keys, x, conditions, rev, jac, graph.nodes)
        if pair is None:
            return None
        y, total = pair
        if not jac or not isinstance(total, Tensor):
            total = torch.zeros(x.shape[0]).to(x) + (total if jac else 0)
        return (y,) if module.force_tuple_output else y, total


def line_of(module: Any) -> _Graph | None:
    """Return the nodes of a graph in their order, data side first; None where it branches."""
    if (
        len(module.in_nodes) != 1
        or len(module.out_nodes) != 1
        or getattr(module, "ff_nodes", None)
    ):
        return None
    special = [*module.in_nodes, *module.out_nodes, *module.condition_nodes]
    left = [node for node in module.node_list if not any(node is s for s in special)]
    nodes: list[Any] = []
    keys: list[Key] = []
    at = module.in_nodes[0]
    while True:
        if len(at.outputs) != 1 or at.outputs[0] is None:
            return None
        at = at.outputs[0][0]
        if at is module.out_nodes[0]:
            break
        if len(at.inputs) != 1 or len(nodes) == len(left):
            return None
        key = _key(at, module.condition_nodes)
        if key is None:
            return None
        nodes.append(at)
        keys.append(key)
    return _Graph(nodes, keys) if len(nodes) == len(left) else None


def _key(node: Any, condition_nodes: Sequence[Any]) -> Key | None:
    """Return which conditions a node gets; None for outputs of other nodes."""
    found = []
    for condition in node.conditions:
        of, output = condition if isinstance(condition, tuple) else (condition, 0)
        at = next((i for i, c in enumerate(condition_nodes) if c is of), None)
        if at is None or output != 0:
            return None
        found.append(at)
    return tuple(found)
