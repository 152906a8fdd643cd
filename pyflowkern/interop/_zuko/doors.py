"""What the calls of zuko's lazy modules are replaced by: they return objects that run one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.interop._doors import MethodDoor, is_off
from pyflowkern.interop._layers import MARK, Runs
from pyflowkern.interop._watches import Holds
from pyflowkern.interop._zuko.elements import name_of
from pyflowkern.interop._zuko.layers import Called, Conditional
from pyflowkern.interop._zuko.networks import is_of
from pyflowkern.nn.chain import served

__all__ = ["ComposedDoor", "FlowDoor", "TransformDoor", "is_known", "layer_of", "parts_of"]

Pair = tuple[Tensor, Tensor]
#: Classes of transforms of vectors that are called where no chain knows what they are.
_CALLED = (
    "flows.autoregressive.MaskedAutoregressiveTransform",
    "flows.coupling.GeneralCouplingTransform",
    "flows.gaussianization.ElementWiseTransform",
)
#: Base distributions that are made as soon as a sample is drawn.
_BASES = ("zuko.distributions.DiagNormal", "zuko.distributions.BoxUniform")


class TransformDoor(MethodDoor):
    """The call of one lazy transform, which returns zuko's transform with a way to run an op.

    Args:
        layer: what the transform is in a chain.
    """

    def __init__(self, layer: Conditional) -> None:
        super().__init__(layer.module)
        self.layer = layer
        self._runs = Runs(layer_of)

    def run(self, c: Tensor | None = None) -> Any:
        """Return the transform of a context."""
        from pyflowkern.interop._zuko.objects import equipped

        return equipped(self.own(c), self, c)

    def pair(self, x: Any, c: Any, *, inverse: bool, graded: bool) -> Pair | None:
        """Return what the transform returns, by one op; None where zuko should run."""
        # of a wide network, at most an op of the elements is faster
        if self._runs.refuse(x) and not self.layer.pays(x):
            return None
        if not _may_run([self.module], graded):
            return None
        return _by_op(self._one, [self.module], x, c, inverse)

    def _one(self, modules: list[Any], x: Tensor, c: Tensor | None, inverse: bool) -> Pair | None:
        pair = self._runs.fused(modules, x, c, inverse=inverse)
        return self.layer.by_op(x, c, inverse) if pair is None else pair


class ComposedDoor(MethodDoor):
    """The call of a LazyComposedTransform."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._runs = Runs(layer_of)

    def run(self, c: Tensor | None = None) -> Any:
        """Return the transform of a context."""
        modules = parts_of(self.module)
        if modules is None or _hooked(modules) or not _plain(c):
            return self.own(c)
        from pyflowkern.interop._zuko.objects import ComposedTransform

        return ComposedTransform(self, c)

    def pair(self, x: Any, c: Any, *, inverse: bool, graded: bool) -> Pair | None:
        """Return what the transforms return, by as few ops as possible; None where zuko should run."""
        modules = None if self._runs.refuse(x) else parts_of(self.module)
        if modules is None or not _may_run(modules, graded):
            return None
        return _by_op(self._runs.pair, modules, x, c, inverse)


class FlowDoor(MethodDoor):
    """The call of a Flow, which returns a distribution."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._runs = Runs(layer_of)
        #: The base, what it makes, and whether that is a distribution of vectors.
        self._base: tuple[Any, Any, bool] = (None, None, False)
        self._standard = _Standard()

    def run(self, c: Tensor | None = None) -> Any:
        """Return the distribution of a context."""
        children, modules = self.module._modules, self.transforms()
        ends = [children.get("transform"), children.get("base")]
        if modules is None or None in ends or _hooked(modules + ends) or not _plain(c):
            return self.own(c)
        from pyflowkern.interop._zuko.objects import NormalizingFlow

        return NormalizingFlow(self, c)

    def log_prob(self, x: Any, c: Any, graded: bool) -> Tensor | None:
        """Return the log-density by one op; None where zuko should run."""
        modules = None if self._runs.refuse(x) else self.transforms()
        if modules is None or not _may_run(modules, graded):
            return None
        pair = _by_op(self._density, modules, x, c, False)
        return None if pair is None else pair[1]

    def _density(self, modules: list[Any], x: Any, c: Any, inverse: bool) -> Pair | None:
        # to fake and other tensors that do not serve, values of the base must not be asked
        if not served(x) or not self._is_standard():
            return None
        return self._runs.fused(modules, x, c, base="normal")

    def pair(self, x: Any, c: Any, *, inverse: bool, graded: bool) -> Pair | None:
        """Return what the transforms return; None where zuko should run."""
        modules = None if self._runs.refuse(x) else self.transforms()
        if modules is None or not _may_run(modules, graded):
            return None
        return _by_op(self._runs.pair, modules, x, c, inverse)

    def base(self, c: Tensor | None) -> Any:
        """Return the base distribution of a context; None for one that zuko should make with the rest."""
        base = self._vectors()
        if is_off() or base is None:
            return None
        return base(c) if c is None else base(c).expand(c.shape[:-1])

    def transforms(self) -> list[Any] | None:
        """Return the transforms, data side first; None where one may be anything."""
        transform = self.module._modules.get("transform")
        if is_of(transform, "lazy.LazyComposedTransform"):
            return parts_of(transform)
        return [transform] if is_known(transform) else None

    def _vectors(self) -> Any:
        """Return the base if it is one of vectors, with one tensor for each of its two arguments."""
        base: Any = self.module._modules.get("base")
        made = getattr(base, "f", None)  # mixtures and flows have none
        if base is not self._base[0] or made is not self._base[1]:
            self._base = base, made, _of_vectors(base)
        return base if self._base[2] else None

    def _is_standard(self) -> bool:
        """Whether the base is the standard normal distribution, by the values that it has now."""
        base = self._vectors()
        if base is None or base.f.__name__ != "DiagNormal" or base._parameters:
            return False
        return self._standard.is_true_of(base)


def _of_vectors(base: Any) -> bool:
    if not is_of(base, "lazy.UnconditionalDistribution") or name_of(base.f) not in _BASES:
        return False
    tensors = [*base._parameters.values(), *base._buffers.values()]
    return base._nargs + len(base._keys) == len(tensors) and [
        t is not None and t.dim() for t in tensors
    ] == [1, 1]


class _Standard:
    """Whether a base has mean 0 and scale 1, looked at again where it was changed: on a GPU a look waits."""

    def __init__(self) -> None:
        self._known: tuple[Any, list[str], list[Holds], bool] = (None, [], [], False)

    def __reduce__(self) -> tuple[type[_Standard], tuple[()]]:
        """Copies and pickles start empty."""
        return _Standard, ()

    def is_true_of(self, base: Any) -> bool:
        buffers = [*base._buffers.values()]
        if len(buffers) != 2 or any(b is None or b.requires_grad for b in buffers):
            return False
        known, names, holds, standard = self._known
        if base is not known or [*base._buffers] != names or not all(h() for h in holds):
            standard, names = _has_standard_values(base), [*base._buffers]
            self._known = base, names, [Holds(base, n) for n in names], standard
        return standard


def _has_standard_values(base: Any) -> bool:
    loc, scale = base._buffers.values()
    if "scale" in base._buffers and next(iter(base._buffers)) == "scale":
        loc, scale = scale, loc
    return not loc.any() and bool((scale == 1).all())


# --- calls ---------------------------------------------------------------------------------------


def _by_op(
    function: Callable[..., Pair | None], modules: list[Any], x: Any, c: Any, inverse: bool
) -> Pair | None:
    """Run a function of samples ``[N, D]`` and contexts ``[N, K]`` over all leading dimensions."""
    if type(x) not in PLAIN_TENSORS or x.dim() == 0:
        return None
    if c is None:
        if x.dim() == 2:
            return function(modules, x, None, inverse=inverse)
        batch = x.shape[:-1]
    else:
        batch = x.shape[:-1]
        if batch != c.shape[:-1]:
            try:
                batch = torch.broadcast_shapes(batch, c.shape[:-1])
            except RuntimeError:  # zuko says so
                return None
            if batch != x.shape[:-1]:
                if any(
                    is_of(module, "flows.coupling.GeneralCouplingTransform") for module in modules
                ):
                    return None  # which keeps the shape of x
                x = x.expand(*batch, x.shape[-1])
            c = c.expand(*batch, c.shape[-1])
        if len(batch) == 1:
            return function(modules, x, c, inverse=inverse)
        c = c.reshape(-1, c.shape[-1])
    if not batch.numel():
        return None
    pair = function(modules, x.reshape(-1, x.shape[-1]), c, inverse=inverse)
    return None if pair is None else (pair[0].view(*batch, -1), pair[1].view(batch))


def _plain(c: object) -> bool:
    return c is None or (type(c) in PLAIN_TENSORS and c.dim() > 0)  # type: ignore[attr-defined]


def _hooked(modules: list[Any]) -> bool:
    """Whether calls of modules do more than their forward."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def _may_run(modules: list[Any], graded: bool) -> bool:
    """Whether an op may run now for what was made when gradients were recorded, or not (``graded``)."""
    if is_off() or torch.compiler.is_compiling():
        return False
    # zuko has read some parameters already, without the gradients that would be recorded now
    return graded or not torch.is_grad_enabled() or not any(layer_of(m).early for m in modules)


# --- modules -------------------------------------------------------------------------------------


def layer_of(module: torch.nn.Module) -> Called:
    """Return the layer that a module's door says it is; one that is always called where there is none."""
    door = _known(module)
    return Called(module) if door is None else door.layer


def _known(module: object) -> Any:
    """Return the door or the mark that says what a lazy transform is; None where there is none."""
    own = getattr(module, "__dict__", {})
    door, mark = own.get("forward"), own.get(MARK)
    return door if isinstance(door, TransformDoor) else mark


def is_known(module: object) -> bool:
    """Whether a lazy transform is one of vectors, with or without a door."""
    if _known(module) is not None:
        return True
    if "forward" in getattr(module, "__dict__", {}):
        return False
    if is_of(module, "lazy.LazyInverse"):
        return is_known(module._modules.get("transform"))  # type: ignore[attr-defined]
    return any(is_of(module, where) for where in _CALLED)


def parts_of(composed: Any) -> list[Any] | None:
    """Return the transforms of a composed one, data side first; None where one may be anything."""
    inner = composed._modules.get("transforms")
    if type(inner) is not torch.nn.ModuleList:
        return None
    parts = [*inner._modules.values()]
    return parts if parts and all(map(is_known, parts)) else None
