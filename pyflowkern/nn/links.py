"""What a layer is in a chain: its steps, where their tensors are read, and what must stay as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from operator import getitem, itemgetter
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.nn._hooks import HOOKS
from pyflowkern.ops.chain_network import ChainLayer
from pyflowkern.ops.chain_steps import Step

__all__ = [
    "ACTIVATIONS",
    "Door",
    "Link",
    "Watched",
    "activation_name",
    "hooked",
    "is_wide",
    "joined",
    "obstructed",
]

_hooks = itemgetter(*HOOKS)
_children = itemgetter("_modules")
#: Makes tensors of a step anew at each call, given whether it is the inverse that runs.
Make = Callable[[bool], Sequence[Tensor]]


#: The name of an activation, and the arguments that it must have.
ACTIVATIONS: dict[type[torch.nn.Module], tuple[str, dict[str, object]]] = {
    torch.nn.Identity: ("identity", {}),
    torch.nn.ReLU: ("relu", {}),
    torch.nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    torch.nn.ELU: ("elu", {"alpha": 1.0}),
    torch.nn.Tanh: ("tanh", {}),
    torch.nn.Sigmoid: ("sigmoid", {}),
    torch.nn.SiLU: ("silu", {}),
    torch.nn.GELU: ("gelu", {"approximate": "none"}),
    torch.nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
}


#: Units of a network without masks up to which one op is the faster one with gradients, too: of networks with at most
#: one product between hidden layers, and of those with more.  The op computes each layer again before its backward
#: pass, which makes 8 operations for a weight and a sample of a step where layers, that keep all units, take 6.  In
#: wide networks products are nearly all of the time, and run at 90% of what a core can do: steps by layers take 0.73
#: (residual, 1,024 units) to 0.93 of the time.  Where there are few products, the passes through memory that the op
#: leaves out weigh more.  The forward pass by layers does not win.
WIDE, WIDE_AND_DEEP = 256, 128


def is_wide(layers: Sequence[ChainLayer]) -> bool:
    """Whether a network without masks is so wide that on the CPU its layers are trained faster than by one op.

    Only products of many inputs and many units count: of two features, the first layer takes no time.

    Example:
        >>> from pyflowkern.ops import ChainLayer
        >>> is_wide([ChainLayer(200, 2), ChainLayer(200, 200), ChainLayer(4, 200)])
        False
        >>> is_wide([ChainLayer(200, 2), *[ChainLayer(200, 200)] * 2, ChainLayer(4, 200)])
        True
    """
    between_hidden = len(layers) - 2
    limit = WIDE if between_hidden <= 1 else WIDE_AND_DEEP
    return any(min(layer.inputs, layer.outputs) > limit for layer in layers)


class Door:
    """What one instance calls in the place of a method of its class, to the same result.

    It lies in the ``__dict__`` of the instance under the name of the method, and goes with it when the instance is
    copied or pickled.
    """

    def __init__(self, module: torch.nn.Module, name: str = "forward") -> None:
        self.module, self.name = module, name


@dataclass
class Link:
    """One layer or several: everything that a chain needs to know of them.

    Tensors are read from the modules at each call, so that nothing is stale; what the steps themselves follow from is
    compared at each call.
    """

    steps: list[Step] = field(default_factory=list)
    #: Modules that are not called, each of exactly the class that it should be.
    modules: list[torch.nn.Module] = field(default_factory=list)
    #: Attributes that the steps follow from.
    facts: list[tuple[torch.nn.Module, tuple[str, ...]]] = field(default_factory=list)
    #: Of each tensor the module, ``_parameters`` or ``_buffers``, and its name.
    sources: list[tuple[torch.nn.Module, str, str]] = field(default_factory=list)
    #: Names of tensors that are None, or not there: wherever they were put, the steps would be others.
    absent: list[tuple[torch.nn.Module, str]] = field(default_factory=list)
    #: Places among the tensors, and what makes them.
    made: list[tuple[int, Make]] = field(default_factory=list)
    #: Whether steps are still what their modules' values say.
    holds: list[Callable[[], bool]] = field(default_factory=list)
    #: Whether the layers themselves must run first.
    waits: list[Callable[[], bool]] = field(default_factory=list)
    #: Size of the context of all networks: 0 for none, None where there are no networks.
    context_features: int | None = None
    #: Whether the layers are the inverses of the steps, the last layer of the first step.
    backwards: bool = False
    #: Whether a network without masks is so wide that its layers are trained faster than by one op.
    wide: bool = False
    #: Whether in float64, too, the steps are what the layers are.
    in_float64: bool = True
    #: Whether layers refuse values outside of an interval, where steps give NaN.
    bounded: bool = False
    #: Makes the link of the same layers with ``backwards`` the other way round; None where there is none.
    turned: Callable[[], Link | None] | None = None

    def watch(self, module: torch.nn.Module, *facts: str) -> None:
        """Note a module that is not called, and the attributes that the steps follow from."""
        self.modules.append(module)
        if facts:
            self.facts.append((module, facts))

    def read(self, module: torch.nn.Module, *names: str) -> None:
        """Note the next tensors: parameters or buffers of a module."""
        for name in names:
            kind = "_parameters" if name in module._parameters else "_buffers"
            self.sources.append((module, kind, name))

    def make(self, module: torch.nn.Module, names: Sequence[str], make: Make) -> None:
        """Note tensors that are made at each call; ``names`` are any tensors of the module, as many of them."""
        self.made.append((len(self.sources), make))
        self.read(module, *names)

    def network(self, layers: Sequence[ChainLayer | None]) -> None:
        """Note the layers of a network without masks: how wide they are."""
        self.wide |= is_wide([layer for layer in layers if layer is not None])

    def append(self, other: Link) -> bool:
        """Add another link behind this one, unless their networks take different contexts.

        What turned them is forgotten: see :func:`joined`.
        """
        sizes = {self.context_features, other.context_features} - {None}
        if len(sizes) > 1:
            return False
        self.context_features = sizes.pop() if sizes else None
        self.made += [(at + len(self.sources), make) for at, make in other.made]
        for name in ("steps", "modules", "facts", "sources", "absent", "holds", "waits"):
            getattr(self, name).extend(getattr(other, name))
        self.wide |= other.wide
        self.in_float64 &= other.in_float64
        self.bounded |= other.bounded
        self.turned = None
        return True


def joined(first: Link, second: Link) -> Link | None:
    """Return the link of layers one after the other, data side first; None where no one op is both.

    The links given may be changed.  Where one is backwards and the other is not, one that can be turned is.
    """
    if not first.modules:
        return second
    if first.backwards != second.backwards:
        turned = second.turned() if second.turned else None
        if turned is not None:
            return joined(first, turned)
        turned = first.turned() if first.turned else None
        return None if turned is None else joined(turned, second)
    one, other = first.turned, second.turned
    ahead, behind = (second, first) if first.backwards else (first, second)
    if not ahead.append(behind):
        return None
    if one and other:
        ahead.turned = partial(_turned, one, other)
    return ahead


def _turned(first: Callable[[], Link | None], second: Callable[[], Link | None]) -> Link | None:
    """Return the turned link of two layers from what turns each of them."""
    one, other = first(), second()
    return None if one is None or other is None else joined(one, other)


def hooked(module: torch.nn.Module) -> bool:
    """Whether hooks hang on a module."""
    return any(_hooks(module.__dict__))


def obstructed(link: Link) -> bool:
    """Whether layers must be called now though they have a link: for hooks, methods, parts, data that they wait for."""
    dicts = [m.__dict__ for m in link.modules]
    return (
        any(map(any, map(_hooks, dicts)))
        or any(_replaced(d, name) for d in dicts for name in _METHODS)
        or any(getattr(m, name, None) is not None for m, name in link.absent)
        or any(waits() for waits in link.waits)
    )


#: What a layer is called by; which of the two goes from data to latent is the library's choice.
_METHODS = ("forward", "inverse")


def _replaced(attributes: dict[str, Any], name: str) -> bool:
    """Whether an instance has a method of its own that may do anything."""
    return name in attributes and not isinstance(attributes[name], Door)


def activation_name(activations: Sequence[torch.nn.Module | None], link: Link) -> str | None:
    """Return the name of the one activation that all are, after noting them; of none, any will do."""
    names = set()
    for module in activations:
        name, options = ACTIVATIONS.get(type(module), ("", {}))  # type: ignore[arg-type]
        if module is None or not name:
            return None
        if any(getattr(module, key) != value for key, value in options.items()):
            return None
        link.watch(module, *options)
        names.add(name)
    if names == {"softplus"}:  # torch's own is linear from 20 on, which leaves out 2e-9
        link.in_float64 = False
    if len(names) > 1:
        return None
    return names.pop() if names else "identity"


class Watched:
    """Whether a link is still what it was, and its tensors: asked at each call, and therefore quick.

    Loops are those of C (``map``, comparisons of lists): sixty modules take some ten microseconds.
    """

    def __init__(self, link: Link) -> None:
        self._modules = link.modules
        self._types = [*map(type, link.modules)]
        self._dicts = [m.__dict__ for m in link.modules]
        self._known_doors = [[d.get(name) for d in self._dicts] for name in _METHODS]
        self._parents = [d for d in self._dicts if d["_modules"]]
        self._known_children = [
            *chain.from_iterable(d["_modules"].values() for d in self._parents)
        ]
        self._facts = [(itemgetter("_modules", *names), m.__dict__) for m, names in link.facts]
        self._known_facts = [get(d) for get, d in self._facts]
        self._homes = [m.__dict__ for m, _, _ in link.sources]
        self._kinds = [kind for _, kind, _ in link.sources]
        self._names = [name for _, _, name in link.sources]
        self._link = link

    def unchanged(self) -> bool:
        """Whether all modules are those that they were, with the same attributes, and nothing hangs on them."""
        link = self._link
        try:
            return (
                [*map(type, self._modules)] == self._types
                and not any(map(any, map(_hooks, self._dicts)))
                and [[*map(dict.get, self._dicts, repeat(name))] for name in _METHODS]
                == self._known_doors
                and [*chain.from_iterable(map(dict.values, map(_children, self._parents)))]
                == self._known_children
                and [get(d) for get, d in self._facts] == self._known_facts
                and all(getattr(m, name, None) is None for m, name in link.absent)
                and all(holds() for holds in link.holds)
                and not any(waits() for waits in link.waits)
            )
        except KeyError:
            return False

    def overrides(self, name: str) -> bool:
        """Whether an instance has a method of its own in the place of its class's."""
        return any(_replaced(d, name) for d in self._dicts)

    def tensors(self, inverse: bool = False) -> list[Tensor] | None:
        """Return the tensors as they are now; None where one is missing, or is no plain tensor."""
        try:
            found: list[Any] = [*map(getitem, map(getitem, self._homes, self._kinds), self._names)]
            for at, make in self._link.made:
                made = make(inverse)
                found[at : at + len(made)] = made
        except KeyError:
            return None
        return found if PLAIN_TENSORS.issuperset(map(type, found)) else None
