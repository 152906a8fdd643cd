"""Finds the tensors that a field depends on: in the graph of one evaluation, and by inspecting the field."""

from __future__ import annotations

import dis
import functools
import types
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_params", "leaf_node", "leaf_nodes", "parameters_of", "tensors_in"]

#: Most objects to inspect.  What a field reads is close to it; a data set that it refers to must not be searched whole.
LIMIT = 5000

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)
#: The same without their subclasses, which takes one look-up: most of what is found are these.
_USUAL = frozenset(_PLAIN)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
#: Attributes that every module has; others are its author's.
_OF_MODULES = frozenset(vars(torch.nn.Module()))
#: Packages whose functions read no global tensors of a user.
_LIBRARIES = ("torch", "pyflowkern")


def parameters_of(
    func: Any, slope: Tensor, given: Iterable[Tensor] | None, argument: Tensor | None = None
) -> tuple[list[Tensor], int]:
    """Return the tensors that a field depends on and that require gradients.

    Args:
        func: the user's field, which may read further tensors at other times.
        slope: an evaluation of it that autograd recorded: the leaves of its graph come first.
        given: the user's own list, which replaces the search.
        argument: the state that the slope was evaluated at, a leaf that does not count.

    Returns:
        The tensors, and how many of them, the first ones, the evaluation has read (or the user has given).
    """
    if given is not None:
        named = [p for p in given if p.requires_grad]
        return named, len(named)
    read = [leaf_node_variable(node) for node in leaf_nodes(slope)]
    tensors = {id(p): p for p in read if p is not None and p is not argument}
    count = len(tensors)
    tensors.update({id(p): p for p in tensors_in(func) if id(p) not in tensors})
    return list(tensors.values()), count


def check_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the user's list of tensors; raise TypeError for anything else."""
    if isinstance(params, Tensor) or not isinstance(
        params, Iterable
    ):  # its rows are none of the field's
        raise TypeError(f"params must be a sequence of tensors, got {type(params).__name__}")
    given = list(params)
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors, got {type(p).__name__}")
    return given


# --- graphs --------------------------------------------------------------------------------------


def leaf_node(leaf: Tensor) -> Any:
    """Return the node that accumulates the gradient of a leaf."""
    return torch.autograd.graph.get_gradient_edge(leaf).node


def leaf_node_variable(node: Any) -> Tensor | None:
    """Return the leaf whose gradient a node accumulates, None for a node of another kind."""
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def leaf_nodes(value: Tensor, skip: Collection[Any] = ()) -> list[Any]:
    """Return the nodes of a value's graph that have no parents.

    The graph of every evaluation of a field is searched: this is a loop without calls where it can be.

    Args:
        value: whose graph is searched.
        skip: nodes that are left out, with what can be reached through them alone.
    """
    if not value.requires_grad:
        return []
    root = value.grad_fn
    if root is None:
        root = leaf_node(value)
        if root in skip:
            return []
    seen, todo, leaves = {None, root, *skip}, [root], []
    for node in todo:
        parents = node.next_functions
        if parents:
            for parent, _ in parents:
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
        else:
            leaves.append(node)
    return leaves


# --- fields --------------------------------------------------------------------------------------


def tensors_in(func: Any) -> list[Tensor]:
    """Return the leaves requiring gradients that a callable holds or may read.

    The search goes through modules, closures, bound methods, ``functools.partial``, attributes, containers, and the
    globals that a function's code names; breadth first, at most :data:`LIMIT` objects.
    """
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}
    todo: deque[Any] = deque([func])
    if not isinstance(func, (torch.nn.Module, *_FUNCTIONS)):
        todo.append(type(func).__call__)
    while todo and len(seen) < LIMIT:
        thing = todo.popleft()
        if type(thing) in _USUAL or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            if thing.requires_grad and thing.is_leaf:
                tensors.append(thing)
        else:
            todo.extend(_parts(thing))
    return tensors


def _parts(thing: Any) -> Iterable[Any]:
    """Return what an object holds."""
    if isinstance(thing, torch.nn.Module):
        return _parts_of_module(thing)
    if isinstance(thing, _PLAIN):
        return ()
    if isinstance(thing, types.MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, types.FunctionType):
        return _parts_of_function(thing)
    if isinstance(thing, functools.partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if isinstance(thing, Mapping):
        return list(thing.values()) if len(thing) <= LIMIT else ()
    if isinstance(thing, _SEQUENCES):
        return thing if len(thing) <= LIMIT else ()
    if isinstance(thing, types.ModuleType):
        return ()
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    held = [getattr(thing, name, None) for name in slots if isinstance(name, str)]
    return [*held, *getattr(thing, "__dict__", {}).values()]


def _parts_of_module(module: torch.nn.Module) -> list[Any]:
    parts: list[Any] = [*module._parameters.values(), *module._modules.values()]
    parts += module._buffers.values()
    attributes = vars(module)
    parts += map(attributes.get, filterfalse(_OF_MODULES.__contains__, attributes))
    parts.append(type(module).forward)
    return parts


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    parts: list[Any] = [*vars(function).values(), *(function.__defaults__ or ())]
    parts += (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a variable that has not been assigned yet
            continue
    if (function.__module__ or "").split(".")[0] in _LIBRARIES:
        return parts
    names, attributes = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                parts += [vars(value)[a] for a in attributes if a in vars(value)]
        else:
            parts.append(value)
    return parts


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the globals that a function reads and all attribute names in its code, including inner functions."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    attributes = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            names |= more[0]
            attributes |= more[1]
    return frozenset(names), frozenset(attributes)
