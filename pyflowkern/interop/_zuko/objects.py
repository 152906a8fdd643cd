"""What accelerated lazy modules of zuko return: its own transforms and flows, of which one op runs what it can.

This module is imported when zuko is.  Its classes are named as those of zuko that they are subclasses of.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform, _InverseTransform
from zuko import distributions, transforms, utils

__all__ = [
    "AutoregressiveTransform",
    "ComposedTransform",
    "CouplingTransform",
    "DependentTransform",
    "FreeFormJacobianTransform",
    "Inverse",
    "NormalizingFlow",
]

Pair = tuple[Tensor, Tensor]
_COMPOSED = ("transforms", "domain_dim", "codomain_dim")
_FLOW = ("transform", "base", "reinterpreted")


class _OneOp:
    """A transform with a door that may run it, and the context it was made with."""

    _door: Any
    _context: Tensor | None
    _graded: bool
    _backwards: bool

    def _pair(self, x: Tensor, inverse: bool = False) -> Pair | None:
        if self._door is None:
            return None
        found: Pair | None = self._door.pair(
            x, self._context, inverse=inverse != self._backwards, graded=self._graded
        )
        return found

    def _call(self, x: Tensor) -> Tensor:
        pair = self._pair(x)
        return super()._call(x) if pair is None else pair[0]  # type: ignore[misc]

    def _inverse(self, y: Tensor) -> Tensor:
        pair = self._pair(y, inverse=True)
        return super()._inverse(y) if pair is None else pair[0]  # type: ignore[misc]

    def call_and_ladj(self, x: Tensor) -> Pair:
        pair = self._pair(x)
        return super().call_and_ladj(x) if pair is None else pair  # type: ignore[misc]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        pair = self._pair(x)
        return super().log_abs_det_jacobian(x, y) if pair is None else pair[1]  # type: ignore[misc]


class _Invertible(_OneOp):
    _inv: Any

    @property
    def inv(self) -> Any:
        """The inverse, which lives as long as something else holds it."""
        found = None if self._inv is None else self._inv()
        if found is None:
            found = Inverse(self)
            self._inv = weakref.ref(found)
        return found


class AutoregressiveTransform(_Invertible, transforms.AutoregressiveTransform):
    """zuko's transform, by one op."""


class CouplingTransform(_Invertible, transforms.CouplingTransform):
    """zuko's transform, by one op."""


class Inverse(_InverseTransform):
    """The inverse of a transform that one op runs."""

    _inv: Any

    def __init__(self, transform: Any) -> None:
        super().__init__(transform)

    def call_and_ladj(self, x: Tensor) -> Pair:
        """Return data and the log-determinant of this direction, both by one op."""
        pair: Pair | None = self._inv._pair(x, inverse=True)
        if pair is None:
            pair = super().call_and_ladj(x)  # type: ignore[misc]  # zuko's, on the class of torch
        return pair

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch takes what it is the inverse of for a cache


class DependentTransform(_OneOp, transforms.DependentTransform):
    """zuko's transform, by one op."""

    @property
    def inv(self) -> Any:
        """The inverse."""
        return equipped(super().inv, self._door, self._context, not self._backwards)


class ComposedTransform(_OneOp, transforms.ComposedTransform):
    """zuko's transform, by one op; its parts are made when they are asked for."""

    def __init__(self, door: Any, context: Tensor | None, backwards: bool = False) -> None:
        Transform.__init__(self)
        self._door, self._context, self._backwards = door, context, backwards
        self._graded = torch.is_grad_enabled()

    def __getattr__(self, name: str) -> Any:
        if name not in _COMPOSED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with torch.set_grad_enabled(self._graded):
            made = self._door.own(self._context)
        made = made.inv if self._backwards else made
        self.__dict__.update({**{key: made.__dict__[key] for key in _COMPOSED}, **self.__dict__})
        return self.__dict__[name]

    @property
    def inv(self) -> Any:
        """The inverse."""
        made = ComposedTransform(self._door, self._context, not self._backwards)
        made._graded = self._graded
        return made


class NormalizingFlow(distributions.NormalizingFlow):
    """zuko's distribution, whose density and samples are one op; its parts are made when they are asked for."""

    def __init__(self, door: Any, context: Tensor | None) -> None:
        Distribution.__init__(self)
        self._door, self._context, self._graded = door, context, torch.is_grad_enabled()

    def __getattr__(self, name: str) -> Any:
        if name not in _FLOW:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with torch.set_grad_enabled(self._graded):
            made = self._door.own(self._context)
        self._made = {key: made.__dict__[key] for key in _FLOW}
        self.__dict__.update({**self._made, **self.__dict__})
        return self.__dict__[name]

    def _untouched(self) -> bool:
        """Whether nobody has put another transform or base in the place of its own."""
        made = self.__dict__.get("_made", {})
        return all(self.__dict__.get(key) is made.get(key) for key in _FLOW)

    def expand(self, batch_shape: Any, new: Any = None) -> Any:
        """Return zuko's own distribution of a larger batch, whose transform is this one."""
        if new is None:
            new = distributions.NormalizingFlow.__new__(distributions.NormalizingFlow)
        new.transform, new.base = self.transform, self.base.expand(batch_shape)
        new.reinterpreted = self.reinterpreted
        Distribution.__init__(new, validate_args=False)
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density."""
        if self._untouched():
            found: Tensor | None = self._door.log_prob(x, self._context, self._graded)
            if found is not None:
                return found
        return super().log_prob(x)  # type: ignore[no-any-return]

    def rsample(self, shape: Any = ()) -> Tensor:
        """Return samples through which gradients flow."""
        if self._untouched() and (base := self._base()) is not None:
            z = base.rsample(shape)
            pair = self._door.pair(z, self._context, inverse=True, graded=self._graded)
            found: Tensor = self.transform.inv(z) if pair is None else pair[0]
            return found
        return super().rsample(shape)  # type: ignore[no-any-return]

    def rsample_and_log_prob(self, shape: Any = ()) -> Pair:
        """Return samples through which gradients flow, and their log-densities."""
        if self._untouched() and (base := self._base()) is not None:
            z = base.rsample(shape)
            pair = self._door.pair(z, self._context, inverse=True, graded=self._graded)
            x, ladj = self.transform.inv.call_and_ladj(z) if pair is None else pair
            return x, base.log_prob(z) - ladj
        return super().rsample_and_log_prob(shape)  # type: ignore[no-any-return]

    def _base(self) -> Any:
        return self.__dict__.get("base") or self._door.base(self._context)


class FreeFormJacobianTransform(transforms.FreeFormJacobianTransform):
    """zuko's transform and its solver, of a field whose trace is known in closed form."""

    _door: Any
    _context: Tensor | None

    @property
    def inv(self) -> Any:
        """The inverse."""
        return continuous(super().inv, self._door, self._context)

    def _call(self, x: Tensor) -> Tensor:
        return self._moved(x, self.t0, self.t1)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._moved(y, self.t1, self.t0)

    def _moved(self, x: Tensor, t0: Any, t1: Any) -> Tensor:
        field = self._door.field(x, self._context)
        f = self.f if field is None else field.velocity
        moved: Tensor = utils.odeint(f, x, t0, t1, self.phi, self.atol, self.rtol)
        return moved

    def call_and_ladj(self, x: Tensor) -> Pair:
        """Return the state at the other time, and the log-determinant."""
        field = self._door.field(x, self._context)
        if field is None:
            return super().call_and_ladj(x)  # type: ignore[no-any-return]
        scale = self.trace_scale
        probe = None if self.exact else torch.randn_like(x)

        def f(t: Tensor, x: Tensor, _: Tensor) -> Pair:
            if probe is None:
                velocity, trace = field.with_trace(t, x)
            else:
                velocity, trace = field.with_estimate(t, x, probe)
            return velocity, trace * scale

        start = x, torch.zeros_like(x[..., 0])
        y, ladj = utils.odeint(f, start, self.t0, self.t1, self.phi, self.atol, self.rtol)
        return y, ladj * (1 / scale)


def continuous(transform: Any, door: Any, context: Tensor | None) -> Any:
    """Let a door say the field of a transform that zuko has made."""
    if type(transform) is transforms.FreeFormJacobianTransform:
        transform.__class__ = FreeFormJacobianTransform
        transform._door, transform._context = door, context
    return transform


_EQUIPPED = {
    transforms.AutoregressiveTransform: AutoregressiveTransform,
    transforms.CouplingTransform: CouplingTransform,
    transforms.DependentTransform: DependentTransform,
}


def equipped(transform: Any, door: Any, context: Tensor | None, backwards: bool = False) -> Any:
    """Let a door run a transform that zuko has made; return others than those of vectors as they are."""
    if (cls := _EQUIPPED.get(type(transform))) is None:
        return transform
    transform.__class__ = cls
    transform._door, transform._context, transform._backwards = door, context, backwards
    transform._graded = torch.is_grad_enabled()
    return transform
