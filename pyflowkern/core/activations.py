"""Activations in plain PyTorch, as ``csrc/core/activations.h`` computes them: the one place of their formulas.

All are accurate to rounding of their value, far left of zero, too, and differentiable to second order.  Where torch's
own function has that accuracy, it is the function here.  Two are not:

- ``torch.nn.functional.softplus`` is linear from 20 on, which leaves out 2e-9 there;
- ``torch.nn.functional.gelu`` adds 1 to an error function near -1, which loses the left tail: 2% at -8 in float64,
  everything below -8.3.

A network whose inverse runs in a kernel needs the accurate ones: else forward and inverse are different functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.dtypes import accumulation_dtype, cast

__all__ = ["ACTIVATIONS", "activation_and_slope", "gelu", "silu", "softplus"]

#: From here on softplus(x) = x in float64, too: exp(-x) is less than half a unit in the last place of x.
_LINEAR = 40.0
#: Beyond these bounds the derivatives are constant in float64, too; products with x could overflow there.
_GELU_BOUND, _SILU_BOUND = 40.0, 800.0


def softplus(x: Tensor) -> Tensor:
    r"""Return :math:`\log(1 + e^x)`.

    Second derivatives are exact on the left; on the right, where they vanish, they have the rounding error of 1.

    Example:
        >>> import torch
        >>> from pyflowkern.core.activations import softplus
        >>> x = torch.tensor(20.5, dtype=torch.float64)
        >>> bool(softplus(x) - x > 1.2e-9)
        True
    """
    return functional.softplus(x, threshold=_LINEAR)


def silu(x: Tensor) -> Tensor:
    r"""Return :math:`x \, \sigma(x)` (Elfwing, Uchibe and Doya, 2017)."""
    return functional.silu(x)


def gelu(x: Tensor) -> Tensor:
    r"""Return :math:`x \, \Phi(x)` with the normal distribution :math:`\Phi` (Hendrycks and Gimpel, 2016).

    Half precision is computed in float32.

    Example:
        >>> import torch
        >>> from pyflowkern.core.activations import gelu
        >>> f"{gelu(torch.tensor(-8.0, dtype=torch.float64)).item():.4e}"
        '-4.9768e-15'
    """
    wide = cast(x, accumulation_dtype(x.dtype))
    return cast(wide * _normal_cdf(wide.clamp(-_GELU_BOUND, _GELU_BOUND)), x.dtype)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


#: Activations by name, in the order in which the kernels of masked networks number them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": silu,
    "gelu": gelu,
    "softplus": softplus,
}


def activation_and_slope(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return an activation and its derivative, both differentiable by autograd to any order.

    At a kink the derivative is that from the left, as autograd's.

    Args:
        a: what is activated.
        activation: one of :data:`ACTIVATIONS`.
    """
    if activation == "tanh":
        h = torch.tanh(a)
        return h, 1 - h * h
    if activation == "sigmoid":
        h = torch.sigmoid(a)
        return h, h * torch.sigmoid(-a)
    if activation == "gelu":
        return _gelu_and_slope(a)
    return ACTIVATIONS[activation](a), _SLOPES[activation](a)


def _gelu_and_slope(a: Tensor) -> tuple[Tensor, Tensor]:
    wide = cast(a, accumulation_dtype(a.dtype))
    near = wide.clamp(-_GELU_BOUND, _GELU_BOUND)
    cdf, density = _normal_cdf(near), torch.exp(-0.5 * near * near) / math.sqrt(2 * math.pi)
    return cast(wide * cdf, a.dtype), cast(cdf + near * density, a.dtype)


def _silu_slope(a: Tensor) -> Tensor:
    near = a.clamp(-_SILU_BOUND, _SILU_BOUND)
    return torch.sigmoid(near) * (1 + near * torch.sigmoid(-near))


#: Of those that share nothing with the activation.
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda a: (a > 0).to(a.dtype),
    "leaky_relu": lambda a: (a > 0).to(a.dtype).clamp_min(0.01),
    # exp is not taken where it could overflow: its gradient would be inf times 0
    "elu": lambda a: a.clamp(max=0).exp(),
    "silu": _silu_slope,
    "softplus": torch.sigmoid,
}
