"""Sequences of nflows' transforms, and flows: their densities by as few ops as possible."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._layers import ForeignLayer, Runs, arguments, known_layer, layer_of
from pyflowkern.interop._nflows.names import is_named
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link, hooked
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = ["CompositeDoor", "DensityDoor", "FlowDoor", "Identity", "NessaiDoor", "Normal"]


class Identity(ForeignLayer):
    """``transforms.standard.IdentityTransform``."""

    def fitted(self, features: int) -> Identity:
        """Return the layer of as many features as its neighbours have."""
        other = copy.copy(self)  # it may have other neighbours elsewhere
        other.features = features
        return other

    def link(self) -> Link | None:
        link = Link()
        link.watch(self.module)
        return link

    def turned(self) -> Link | None:
        """Return the link of the other direction, which is the same."""
        if (link := self.link()) is not None:
            link.backwards = True
        return link


class CompositeDoor(MethodDoor):
    """One direction of a CompositeTransform."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._runs = Runs(layer_of)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transforms, as many as possible by one op."""
        pair, known = None, arguments(args, kwargs)
        if known is not None and not self._runs.refuse(known[0]):
            inverse = self.name == "inverse"
            pair = self._runs.pair(parts_of(self.module), *known, inverse=inverse)
        if pair is None:
            return self.own(*args, **kwargs)
        outputs, log_det = pair
        return outputs, log_det.to(args[0].dtype)  # the library adds up in the dtype of its input


def parts_of(module: Any) -> list[Any]:
    """Return the transforms of a composite, and in the place of composites among them what these consist of."""
    return [*_flat(module._modules["_transforms"]._modules.values())]


def _flat(modules: Iterable[Any]) -> Iterable[Any]:
    for module in modules:
        if isinstance(module.__dict__.get("forward"), CompositeDoor) and not hooked(module):
            yield from _flat(module._modules["_transforms"]._modules.values())
        else:
            yield module


class Normal(ForeignLayer):
    """A normal base density: what brings it to a standard normal one."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, module._shape[0] if len(module._shape) == 1 else 0)

    def link(self) -> Link | None:
        base, scale = self.module, 1.0
        if any(name in base.__dict__ for name in ("log_prob", "_log_prob")):
            return None
        link = Link()
        link.watch(base, "_shape")
        link.holds.append(_Untouched(base))
        if is_named(base, "distributions.normal.DiagonalNormal"):
            if base.log_std_.shape != (1, self.features) or base.mean_.shape != (1, self.features):
                return None
            link.steps.append(ActNormStep())
            link.make(base, ("log_std_", "mean_"), self._diagonal)
        elif not is_named(
            base, "distributions.normal.StandardNormal"
        ):  # nessai's, of one variance
            link.watch(base, "_var")
            scale = math.sqrt(base._var)
            if scale != 1:
                link.steps.append(ActNormStep())
                link.make(base, ("_log_z", "_log_z"), self._of_variance)
        constant = base._buffers["_log_z"]
        link.holds.append(Holds(base, "_log_z"))
        exact = self.features * (0.5 * math.log(2 * math.pi) + math.log(scale))
        error = abs(float(constant) - exact)
        if error > 1e-5 * max(1.0, abs(exact)):
            return None
        link.in_float64 = error < 1e-12 * max(1.0, abs(exact))
        return link

    def _diagonal(self, inverse: bool) -> list[Tensor]:
        return [-self.module.log_std_[0], -self.module.mean_[0]]

    def _of_variance(self, inverse: bool) -> list[Tensor]:
        scale = self.module._log_z.new_full((self.features,), -0.5 * math.log(self.module._var))
        return [scale, torch.zeros_like(scale)]


class _Untouched:
    """Whether a distribution still has its own methods."""

    def __init__(self, base: torch.nn.Module) -> None:
        self._base = base

    def __call__(self) -> bool:
        methods = self._base.__dict__
        return "log_prob" not in methods and "_log_prob" not in methods


class DensityDoor(MethodDoor):
    """A method that returns the density of a flow."""

    module: Any

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._runs = Runs(layer_of)

    def fused(self, inputs: Any, context: Any) -> tuple[Tensor, Tensor] | None:
        """Return latents and log-densities where one op computes both; None where it does not."""
        if self._runs.refuse(inputs):
            return None
        transform, base = (self.module._modules.get(n) for n in ("_transform", "_distribution"))
        if base is None or known_layer(base) is None:
            return None
        return self._runs.fused([*_flat([transform]), base], inputs, context, base="normal")


class FlowDoor(DensityDoor):
    """``_log_prob`` of a Flow."""

    def run(self, inputs: Any, context: Any) -> Any:
        """Return log-densities, by one op where one computes all of it."""
        flow = self.module
        embedded = flow._embedding_net(context)
        if (pair := self.fused(inputs, embedded)) is not None:
            return pair[1]
        noise, log_det = flow._transform(inputs, context=embedded)
        if getattr(flow, "_context_used_in_base", True):  # an attribute of newer versions
            log_prob = flow._distribution.log_prob(noise, context=embedded)
        else:
            log_prob = flow._distribution.log_prob(noise)
        return log_prob + log_det


class NessaiDoor(DensityDoor):
    """``log_prob`` or ``forward_and_log_prob`` of a flow of nessai or glasflow, whose base takes no context."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return log-densities, and latents where the method does, by one op where one computes all of it."""
        named = {"context" if k == "conditional" else k: v for k, v in kwargs.items()}
        known = arguments(args, named)
        if self.name != "log_prob" and not _is_standard(self.module._distribution):
            known = None  # latents of the op are those of a standard normal density
        pair = None if known is None else self.fused(*known)
        if pair is None:
            return self.own(*args, **kwargs)
        return pair[1] if self.name == "log_prob" else pair


def _is_standard(base: Any) -> bool:
    """Whether a base is the standard normal density itself, with nothing before it."""
    return is_named(base, "distributions.normal.StandardNormal") or getattr(base, "_var", 0) == 1
