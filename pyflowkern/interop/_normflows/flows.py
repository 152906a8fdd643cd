"""Whole flows of normflows: their densities and samples by as few ops as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._kinds import Kind, Outcome
from pyflowkern.interop._layers import ForeignLayer, Runs, known_layer
from pyflowkern.interop._normflows.parts import is_named
from pyflowkern.interop._normflows.vectors import layer_of
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = ["CLASS_FLOW", "FLOW"]

_METHODS = (
    "forward",
    "forward_and_log_det",
    "inverse",
    "inverse_and_log_det",
    "forward_kld",
    "log_prob",
    "sample",
    "reverse_kld",
)


class _DiagGaussian(ForeignLayer):
    """A diagonal normal base: an ActNorm before a standard normal one."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.d) if module.n_dim == 1 else 0)

    def link(self) -> Link | None:
        base = self.module
        if base.temperature is not None or "log_prob" in base.__dict__:
            return None
        link = Link([ActNormStep()])
        link.watch(base, "temperature")
        link.make(base, ("log_scale", "loc"), self._numbers)
        return link

    def _numbers(self, inverse: bool) -> Sequence[Tensor]:
        base = self.module
        return -base.log_scale[0], -base.loc[0]


def _layer_or_base(module: torch.nn.Module) -> ForeignLayer:
    if is_named(module, "distributions.base.DiagGaussian"):
        return _DiagGaussian(module)
    return layer_of(module)


class _FlowDoor(MethodDoor):
    """A method of a NormalizingFlow or a ConditionalNormalizingFlow."""

    module: Any

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._runs, self._whole = Runs(layer_of), Runs(_layer_or_base)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flows, as many as possible by one op."""
        found = getattr(self, f"_{self.name}")(*args, **kwargs)
        return self.own(*args, **kwargs) if found is None else found

    def _flows(self) -> list[Any]:
        """Return the flows, data side first."""
        return _data_first(self.module)

    def _pair(self, x: Any, *others: Any, inverse: bool = False, **named: Any) -> Any:
        """Return both results of the flows; None for other arguments than those of the library, too."""
        if self._runs.refuse(x) or (context := self._context(others, named)) is _NOT_KNOWN:
            return None
        return self._runs.pair(self._flows(), x, context, inverse=inverse)

    def _context(self, others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not others and not named:
            return None
        conditional = is_named(self.module, "core.ConditionalNormalizingFlow")
        if conditional and len(others) == 1 and not named:
            return others[0]
        return (
            named["context"]
            if conditional and not others and [*named] == ["context"]
            else _NOT_KNOWN
        )

    def _forward(self, z: Any = None, *others: Any, **named: Any) -> Any:
        pair = self._pair(z, *others, inverse=True, **named)
        return None if pair is None else pair[0]

    def _inverse(self, x: Any = None, *others: Any, **named: Any) -> Any:
        pair = self._pair(x, *others, **named)
        return None if pair is None else pair[0]

    def _forward_and_log_det(self, z: Any = None, *others: Any, **named: Any) -> Any:
        return _in_default_dtype(self._pair(z, *others, inverse=True, **named))

    def _inverse_and_log_det(self, x: Any = None, *others: Any, **named: Any) -> Any:
        return _in_default_dtype(self._pair(x, *others, **named))

    def _log_prob(self, x: Any = None, *others: Any, **named: Any) -> Any:
        if self._whole.refuse(x) or self._runs.refuse(x):
            return None
        if (context := self._context(others, named)) is _NOT_KNOWN:
            return None
        flows, base = self._flows(), self.module._modules["q0"]
        if is_named(base, "distributions.base.DiagGaussian"):
            pair = self._whole.fused([*flows, base], x, context, base="normal")
            if pair is not None:
                return pair[1]
        pair = self._runs.pair(flows, x, context)
        if pair is None:
            return None
        z, log_det = pair
        of_base = base.log_prob(z, **self._for_base(context))
        return log_det + of_base.to(log_det.dtype)

    def _forward_kld(self, x: Any = None, *others: Any, **named: Any) -> Any:
        log_prob = self._log_prob(x, *others, **named)
        return None if log_prob is None else -log_prob.to(torch.get_default_dtype()).mean()

    def _sample(self, num_samples: Any = 1, *others: Any, **named: Any) -> Any:
        if (context := self._context(others, named)) is _NOT_KNOWN or not self._flows():
            return None
        return self._draw(num_samples, context)

    def _reverse_kld(self, num_samples: Any = 1, *others: Any, **named: Any) -> Any:
        beta, score = named.pop("beta", 1.0), named.pop("score_fn", True)
        if others and not is_named(self.module, "core.ConditionalNormalizingFlow"):
            return None
        if (context := self._context(others, named)) is _NOT_KNOWN or score is not True:
            return None
        if not self._flows():
            return None
        z, log_q = self._draw(num_samples, context)
        log_p = self.module.p.log_prob(z, **self._for_base(context))
        return torch.mean(log_q) - beta * torch.mean(log_p)

    def _draw(self, num_samples: Any, context: Any) -> tuple[Tensor, Tensor]:
        """Return samples of the base that went through the flows, and their log-densities."""
        given = self._for_base(context)
        z, log_q = self.module._modules["q0"](num_samples, **given)
        return _sampled(self._runs, self._flows(), z, log_q, given)

    def _for_base(self, context: Any) -> dict[str, Any]:
        """Return the context as the library hands it on: conditional flows do so though it be None."""
        conditional = is_named(self.module, "core.ConditionalNormalizingFlow")
        return {"context": context} if conditional else {}


class _ClassFlowDoor(MethodDoor):
    """A method of a ClassCondFlow, whose base alone depends on the class."""

    module: Any

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._runs = Runs(layer_of)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flows, as many as possible by one op."""
        found = getattr(self, f"_{self.name}")(*args, **kwargs)
        return self.own(*args, **kwargs) if found is None else found

    def _log_prob(self, *args: Any, **named: Any) -> Any:
        if len(args) != 2 or named:
            return None
        pair = self._runs.pair(_data_first(self.module), args[0])
        if pair is None:
            return None
        of_base = self.module.q0.log_prob(pair[0], args[1])
        return pair[1] + of_base.to(pair[1].dtype)

    def _forward_kld(self, *args: Any, **named: Any) -> Any:
        log_prob = self._log_prob(*args, **named)
        return None if log_prob is None else -log_prob.mean()

    def _sample(self, num_samples: Any = 1, y: Any = None) -> Any:
        z, log_q = self.module.q0(num_samples, y)
        return _sampled(self._runs, _data_first(self.module), z, log_q, {})


def _data_first(module: Any) -> list[Any]:
    """Return the flows, data side first."""
    flows = module._modules.get("flows")
    return [] if flows is None else [*flows._modules.values()][::-1]


def _sampled(
    runs: Runs, flows: list[Any], z: Any, log_q: Tensor, context: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return samples of a base that went through the flows, and their log-densities."""
    pair = runs.pair(flows, z, context.get("context"), inverse=True)
    if pair is not None:
        return pair[0], log_q - pair[1].to(log_q.dtype)
    for flow in reversed(flows):
        z, log_det = flow(z, **context)
        log_q -= log_det
    return z, log_q


_NOT_KNOWN = object()


def _in_default_dtype(pair: Any) -> Any:
    """Return log-dets in torch's default dtype, whatever that of the model: as the library does."""
    return None if pair is None else (pair[0], pair[1].to(torch.get_default_dtype()))


def _has_layers(module: torch.nn.Module) -> bool:
    """Whether a flow is a transform that a chain knows."""
    layers = [known_layer(m) for m in _data_first(module) if m is not None]
    return any(layer is not None and layer.features for layer in layers)


def _look(module: torch.nn.Module) -> Outcome:
    if not _has_layers(module):
        return Outcome()
    return Outcome([_FlowDoor(module, name) for name in _METHODS], runs="one op")


def _look_at_classes(module: torch.nn.Module) -> Outcome:
    if not _has_layers(module):
        return Outcome()
    return Outcome([_ClassFlowDoor(module, name) for name in _OF_CLASSES], runs="one op")


_OF_CLASSES = ("log_prob", "forward_kld", "sample")
FLOW = Kind(_look, _METHODS, quiet=True, holds=True)
CLASS_FLOW = Kind(_look_at_classes, _OF_CLASSES, quiet=True, holds=True)
