"""zuko's continuous transform: the trace of the Jacobian in closed form, in place of one backward pass a feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.interop._doors import MethodDoor, is_off
from pyflowkern.interop._zuko.networks import is_of, linears_of
from pyflowkern.nn.chain import undisturbed
from pyflowkern.nn.links import Link, Watched, obstructed

__all__ = ["ContinuousDoor", "VelocityAndTrace"]


def _leaky_slope(a: Tensor) -> Tensor:
    return torch.where(a > 0, 1.0, 0.01)


def _silu_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _sigmoid_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s)


#: Activations and their slopes; both can be differentiated again.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda a: a, torch.ones_like),
    "relu": (functional.relu, lambda a: (a > 0).to(a.dtype)),
    "leaky_relu": (functional.leaky_relu, lambda a: _leaky_slope(a).to(a.dtype)),
    # exp is not taken where it could overflow: its gradient would be inf times 0
    "elu": (functional.elu, lambda a: a.clamp(max=0).exp()),
    "tanh": (torch.tanh, lambda a: 1 - torch.tanh(a).square()),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "silu": (functional.silu, _silu_slope),
}


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
        if not self._serves(x, c):
            return None
        if self._form is None or not self._form.watched.unchanged():
            self._form = self._find()
        if self._form is None or self.module._buffers["freqs"] is None:
            return None
        tensors = self._form.watched.tensors()
        if tensors is None or not all(
            t.dtype == x.dtype and t.device == x.device for t in tensors
        ):
            return None
        parts = iter(tensors)
        layers = [(next(parts), next(parts) if biased else None) for biased in self._form.biased]
        times = 2 * self.module._buffers["freqs"].numel()
        contexts = 0 if c is None else c.shape[-1]
        if (
            layers[0][0].shape[1] != times + x.shape[-1] + contexts
            or layers[-1][0].shape[0] != x.shape[-1]
        ):
            return None
        return VelocityAndTrace(layers, self._form.activation, self.module._buffers["freqs"], c)

    def _serves(self, x: Any, c: Any) -> bool:
        if is_off() or torch.compiler.is_compiling() or type(x) not in PLAIN_TENSORS:
            return False
        if not x.dim() or not x.is_floating_point() or not undisturbed(x):
            return False
        if torch._C._functorch.maybe_current_level() is not None:
            return False
        if c is None:
            return True
        if type(c) not in PLAIN_TENSORS or not c.dim() or c.dtype != x.dtype:
            return False
        # zuko's solver keeps the shape of x
        lead, batch = x.shape[:-1], c.shape[:-1]
        return len(batch) <= len(lead) and all(
            b in (1, a) for a, b in zip(reversed(lead), reversed(batch), strict=False)
        )

    def _find(self) -> _Form | None:
        module, link = self.module, Link()
        net = module._modules.get("ode")
        if not is_of(net, "nn.MLP") or (found := linears_of(net, "nn.Linear", link)) is None:
            return None
        linears, activation = found
        if activation not in _ACTIVATIONS:
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
        self._activation, self._slope = _ACTIVATIONS[activation]
        self._features = layers[-1][0].shape[0]
        with torch.no_grad():
            self._kept = self._middle()

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the field."""
        hidden = self._units(t, x)[-1]
        return (
            functional.linear(self._activation(hidden), *self._layers[-1])
            if len(self._layers) > 1
            else hidden
        )

    def with_trace(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the field and the trace of its Jacobian."""
        units = self._units(t, x)
        if len(self._layers) == 1:
            return units[0], self._middle().expand(x.shape[:-1])
        middle = self._middle() if torch.is_grad_enabled() else self._kept
        velocity = functional.linear(self._activation(units[-1]), *self._layers[-1])
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
        velocity = functional.linear(self._activation(units[-1]), *self._layers[-1])
        return velocity, (tangent * probe).sum(-1)

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
            units.append(functional.linear(self._activation(units[-1]), *layer))
        return units
