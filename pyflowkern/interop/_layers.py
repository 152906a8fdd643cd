"""Transforms of other libraries as layers of runs that one op replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._doors import MethodDoor
from pyflowkern.nn.chain import Chains, Run, served
from pyflowkern.nn.links import Door, Link

__all__ = [
    "MARK",
    "ForeignLayer",
    "LayerDoor",
    "LayerMark",
    "Runs",
    "arguments",
    "known_layer",
    "layer_of",
    "many",
    "single_doors",
]

Pair = tuple[Tensor, Tensor]
#: Measured: numbers of vectors from which on an op for an affine half is faster than the library's few calls.
_MANY = 50_000
#: Where an instance keeps its mark.
MARK = "_pyflowkern_layer"


class ForeignLayer:
    """A transform of another library, data to latent, with the interface that runs of layers know.

    Args:
        module: the transform.
        features: how many numbers a sample has; 0 for what is never part of a chain.
    """

    def __init__(self, module: torch.nn.Module, features: int = 0) -> None:
        self.module, self.features = module, features
        self._class = type(module)
        #: Whether chains may stand for it.
        self.chained = True

    def link(self) -> Link | None:
        """Return what this transform is in a chain; None where the library must be called.

        It is asked anew whenever a module or an attribute that the last answer followed from is another.
        """
        return None

    def turned(self) -> Link | None:
        """Return what the transform is in a chain of the other direction; None where it cannot be in one."""
        return None

    def fitted(self, features: int) -> ForeignLayer:
        """Return the layer of as many features as all neighbours have: another one where the transform takes any."""
        return self

    def pays(self, x: Tensor) -> bool:
        """Whether :meth:`by_op` is faster than the library for such an input."""
        return True

    def by_op(self, x: Tensor, context: Tensor | None, inverse: bool) -> Pair | None:
        """Do what the transform does by an op of its own, where no chain serves; None where the library should."""
        return None

    def _chain_link(self) -> Link | None:
        # a parametrization puts another class in its place, which may do anything
        same = type(self.module) is self._class
        link = self.link() if same and self.features and self.chained else None
        if link is not None:
            link.turned = self.turned
        return link

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from data to latent."""
        pair: Pair = self.module(x, context)
        return pair

    def inverse(self, z: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from latent to data."""
        pair: Pair = self.module.inverse(z, context)  # type: ignore[operator]
        return pair


class Runs:
    """Transforms of another library one after another, of which one op replaces as many as it can.

    Args:
        make: what makes a layer of a transform; at module level, so that this can be pickled.
    """

    def __init__(self, make: Callable[[torch.nn.Module], ForeignLayer]) -> None:
        self._make = make
        #: Modules, and the layers that they are: replaced as a whole, as other threads may read it.
        self._known: tuple[list[Any], list[ForeignLayer]] = [], []
        self._chains = Chains()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty."""
        return Runs, (self._make,)

    def refuse(self, x: object) -> bool:
        """Whether transforms were too wide for such a call a few calls ago, and should be called one by one."""
        return isinstance(x, Tensor) and self._chains.refuse(x)

    def parts(self, modules: list[Any], x: Tensor) -> Sequence[Any] | None:
        """Return runs, and layers to be called, data side first; None where there are no runs."""
        known, layers = self._known
        if modules != known:
            layers = [self._make(m) for m in modules]
            sizes = {layer.features for layer in layers} - {0}
            if len(sizes) == 1:
                layers = [layer.fitted(*sizes) for layer in layers]
            self._known = modules, layers
        return self._chains.parts(layers, x)

    def pair(
        self, modules: list[Any], x: Any, context: Any = None, *, inverse: bool = False
    ) -> Pair | None:
        """Run the transforms; None where the library should do all of it itself.

        Args:
            modules: the transforms, data side first.
            x: data, or latents with ``inverse``.
            context: ``[N, K]``, or None.
            inverse: from latent to data.
        """
        if not isinstance(x, Tensor) or self._chains.refuse(x) or not served(x):
            return None
        if (parts := self.parts(modules, x)) is None:
            return None
        given, total = x, None
        for part in reversed(parts) if inverse else parts:
            if isinstance(part, Run):
                x, log_det = part(x, context, inverse=inverse, checked=x is given)
            else:
                x, log_det = part.inverse(x, context) if inverse else part(x, context)
            total = log_det if total is None else total + log_det
        return None if total is None else (x, total)

    def fused(
        self,
        modules: list[Any],
        x: Any,
        context: Any = None,
        *,
        base: str = "none",
        inverse: bool = False,
    ) -> Pair | None:
        """Return the result of all transforms, with the base's density if given, where one op computes all of it."""
        if not isinstance(x, Tensor) or self._chains.refuse(x) or not served(x):
            return None
        parts = self.parts(modules, x)
        if parts is None or len(parts) != 1 or not isinstance(parts[0], Run):
            return None
        return parts[0].fused(x, context, base, inverse=inverse, checked=True)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return input and context of a call; None for other arguments than these, which the library may know."""
    if not kwargs:
        return (args[0], args[1] if len(args) == 2 else None) if len(args) in (1, 2) else None
    return (args[0], kwargs["context"]) if len(args) == 1 and [*kwargs] == ["context"] else None


def many(x: Tensor) -> bool:
    """Whether one op is faster than the library's few calls for an affine map: on images, many numbers, and GPUs."""
    return x.dim() != 2 or x.numel() >= _MANY or not x.is_cpu


class LayerDoor(MethodDoor):
    """One direction of a transform that is called with ``(x, context=None)`` and returns a pair.

    Args:
        layer: what the transform is.
        name: the method.
        inverse: whether it is the one from latent to data.
    """

    def __init__(self, layer: ForeignLayer, name: str, inverse: bool) -> None:
        super().__init__(layer.module, name)
        self.layer, self.inverse = layer, inverse
        self._runs = Runs(layer_of)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one op; the library's method where none serves."""
        if args and self._runs.refuse(args[0]) and not self.layer.pays(args[0]):
            return self.own(*args, **kwargs)
        if (known := arguments(args, kwargs)) is not None:
            pair = self._runs.fused([self.module], *known, inverse=self.inverse)
            if pair is None and isinstance(known[0], Tensor) and self.layer.pays(known[0]):
                pair = self.layer.by_op(*known, self.inverse)
            if pair is not None:
                return pair
        return self.own(*args, **kwargs)


class LayerMark(Door):
    """Says what a transform is whose own methods stay: only with others is it faster.

    It stands in the place of no method.
    """

    def __init__(self, layer: ForeignLayer) -> None:
        super().__init__(layer.module, MARK)
        self.layer = layer


def known_layer(module: torch.nn.Module) -> ForeignLayer | None:
    """Return the layer that a module's door says it is; None where there is none."""
    for value in module.__dict__.values():
        if isinstance(value, (LayerDoor, LayerMark)):
            return value.layer
    return None


def layer_of(module: torch.nn.Module) -> ForeignLayer:
    """Return the layer that a module's door says it is; one that is always called where there is none."""
    return known_layer(module) or ForeignLayer(module)


def single_doors(
    layer: ForeignLayer, forward: str = "forward", inverse: str = "inverse"
) -> list[LayerDoor]:
    """Return the doors of a transform's two directions.

    Args:
        layer: what the transform is.
        forward: the method from data to latent.
        inverse: the method from latent to data.
    """
    return [LayerDoor(layer, forward, False), LayerDoor(layer, inverse, True)]
