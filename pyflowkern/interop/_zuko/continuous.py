"""zuko's continuous transform: the trace of the Jacobian in closed form, in place of one backward pass a feature."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS, activation_and_slope
from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.interop._doors import MethodDoor, is_off
from pyflowkern.interop._zuko.networks import is_of, linears_of
from pyflowkern.nn.chain import undisturbed
from pyflowkern.nn.links import Link, Watched, obstructed

__all__ = ["ContinuousDoor", "VelocityAndTrace", "may_solve", "spreads"]


class _Form(NamedTuple):
    """What the network of a field is, and whether it still is that."""

    watched: Watched
    activation: str
    #: Of each layer, whether it has a bias.
    biased: list[bool]


class ContinuousDoor(MethodDoor):
    """The call of ``zuko.flows.continuous.FFJTransform``, whose field is an MLP of time, state and context."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._form: _Form | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_form": None}  # copies look at their own modules

    def run(self, c: Tensor | None = None) -> Any:
        """Return the transform of a context."""
        from pyflowkern.interop._zuko.objects import continuous

        return continuous(self.own(c), self, c)

    def field(self, x: Any, c: Any) -> VelocityAndTrace | None:
        """Return the field at the present parameters; None where zuko should run its own."""
        module = self.module
        if "f" in module.__dict__ or not may_solve(x, c) or not spreads(x, c):
            return None
        form = self._form
        if form is None or not form.watched.unchanged():
            self._form = form = self._find()
        freqs = module._buffers["freqs"]
        if form is None or freqs is None or (tensors := form.watched.tensors()) is None:
            return None
        if not all(t.dtype == x.dtype and t.device == x.device for t in (*tensors, freqs)):
            return None
        parts = iter(tensors)
        layers = [(next(parts), next(parts) if biased else None) for biased in form.biased]
        contexts = 0 if c is None else c.shape[-1]
        if (
            layers[0][0].shape[1] != 2 * freqs.numel() + x.shape[-1] + contexts
            or layers[-1][0].shape[0] != x.shape[-1]
        ):
            return None
        return VelocityAndTrace(layers, form.activation, freqs, c)

    def _find(self) -> _Form | None:
        module, link = self.module, Link()
        net = module._modules.get("ode")
        if not is_of(net, "nn.MLP") or (found := linears_of(net, "nn.Linear", link)) is None:
            return None
        linears, activation = found
        if not link.in_float64:
            return None
        biased = []
        for linear in linears:
            weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
            if weight is None or weight.dim() != 2:
                return None
            link.watch(linear)
            link.read(linear, *(["weight"] if bias is None else ["weight", "bias"]))
            if bias is None:
                link.absent.append((linear, "bias"))
            biased.append(bias is not None)
        link.watch(module)
        return None if obstructed(link) else _Form(Watched(link), activation, biased)


def may_solve(x: Any, c: Any) -> bool:
    """Whether a field in closed form may stand for that of a solve from ``x`` under a context."""
    if is_off() or torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
        return False
    if not x.dim() or not x.is_floating_point() or not undisturbed(x):
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return c is None or (type(c) in PLAIN_TENSORS and c.dim() > 0 and c.dtype == x.dtype)


def spreads(x: Tensor, c: Tensor | None, event: int = 1) -> bool:
    """Whether a context is for ``x [*, D]`` as it is, without more dimensions: zuko's solver keeps its shape.

    Args:
        x: the state.
        c: a context, or None.
        event: how many of its axes, the last ones, are no batch.
    """
    if c is None:
        return True
    lead, batch = x.shape[:-1], c.shape[: c.dim() - event]
    return len(batch) <= len(lead) and all(
        b in (1, a) for a, b in zip(reversed(lead), reversed(batch), strict=False)
    )


class VelocityAndTrace:
    r"""A field of dense layers with the trace of its Jacobian, by products forward alone.

    With hidden slopes :math:`s_l`, the Jacobian is :math:`W_L \cdots s_2 W_2 s_1 W_1`.  Its trace is
    :math:`s_2^T (W_2 \odot (W_1 W_3)^T)\, s_1` for two hidden layers; deeper fields take a tangent for each feature.

    Args:
        layers: weights and biases; the first one reads cosines and sines of time, the state and the context.
        activation: its name.
        freqs: frequencies of time.
        context: ``[*, K]``, or None.
    """

    def __init__(
        self,
        layers: list[tuple[Tensor, Tensor | None]],
        activation: str,
        freqs: Tensor,
        context: Tensor | None,
    ) -> None:
        self._layers, self._freqs, self._context = layers, freqs, context
        self._activation = activation
        self._features = layers[-1][0].shape[0]
        with torch.no_grad():
            self._kept = self._middle()

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the field."""
        hidden = self._units(t, x)[-1]
        return (
            functional.linear(self._activated(hidden), *self._layers[-1])
            if len(self._layers) > 1
            else hidden
        )

    def with_trace(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the field and the trace of its Jacobian."""
        units = self._units(t, x)
        if len(self._layers) == 1:
            return units[0], self._middle().expand(x.shape[:-1])
        middle = self._middle() if torch.is_grad_enabled() else self._kept
        velocity = functional.linear(self._activated(units[-1]), *self._layers[-1])
        slopes = [*map(self._slope, units)]
        if len(slopes) == 1:
            return velocity, slopes[0] @ middle
        if len(slopes) == 2:
            return velocity, (functional.linear(slopes[0], middle) * slopes[1]).sum(-1)
        tangents = slopes[0] * self._weight().T.reshape(-1, *[1] * (x.dim() - 1), len(middle))
        for (weight, _), slope in zip(self._layers[1:-1], slopes[1:], strict=True):
            tangents = functional.linear(tangents, weight) * slope
        return velocity, torch.einsum("d...k,dk->...", tangents, self._layers[-1][0])

    def with_estimate(self, t: Tensor, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """Return the field and the product of its Jacobian with a probe from both sides."""
        units = self._units(t, x)
        tangent = functional.linear(probe, self._weight())
        if len(self._layers) == 1:
            return units[0], (tangent * probe).sum(-1)
        for unit, (weight, _) in zip(units, self._layers[1:], strict=True):
            tangent = functional.linear(self._slope(unit) * tangent, weight)
        velocity = functional.linear(self._activated(units[-1]), *self._layers[-1])
        return velocity, (tangent * probe).sum(-1)

    def _activated(self, a: Tensor) -> Tensor:
        return ACTIVATIONS[self._activation](a)

    def _slope(self, a: Tensor) -> Tensor:
        return activation_and_slope(a, self._activation)[1]

    def _weight(self) -> Tensor:
        """Return the columns of the first weight that belong to the state."""
        return self._layers[0][0].narrow(1, 2 * len(self._freqs), self._features)

    def _middle(self) -> Tensor:
        """Return what does not depend on the state."""
        first, last = self._weight(), self._layers[-1][0]
        if len(self._layers) == 1:
            return first.diagonal().sum()
        if len(self._layers) == 2:
            return (first * last.T).sum(1)
        if len(self._layers) == 3:
            return self._layers[1][0] * (first @ last).T
        return first

    def _units(self, t: Tensor, x: Tensor) -> list[Tensor]:
        """Return what the activations are applied to; of a single layer, what it returns."""
        angle = self._freqs * t
        at = 2 * len(angle)
        weight, bias = self._layers[0]
        shift = functional.linear(torch.cat((angle.cos(), angle.sin())), weight[:, :at], bias)
        if self._context is not None:
            shift = shift + functional.linear(self._context, weight[:, at + self._features :])
        units = [functional.linear(x, self._weight()) + shift]
        for layer in self._layers[1:-1]:
            units.append(functional.linear(self._activated(units[-1]), *layer))
        return units
