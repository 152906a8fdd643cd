"""Starting couplings and autoregressive layers as the identity."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from pyflowkern.nn._last_layer import last_layer
from pyflowkern.nn.autoregressive import MaskedAutoregressive
from pyflowkern.nn.conditioners import PeriodicInput
from pyflowkern.nn.coupling import AffineCoupling
from pyflowkern.nn.masked import MaskedMLP
from pyflowkern.nn.mixed_spline import MixedSplineCoupling
from pyflowkern.nn.spline import SplineCoupling
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.elements import ElementMap

__all__ = ["start_as_identity"]

Module = TypeVar("Module", bound=torch.nn.Module)


@torch.no_grad()
def start_as_identity(module: Module) -> Module:
    r"""Make all couplings and autoregressive layers of a module the identity, whatever their maps are; return it.

    The last layer of each network gets the weight 0 and the bias for which the map is the identity: :math:`t = 0` and
    :math:`s(u) = 1`, or a spline of slope 1.  Networks of this package start so, but for scale maps with
    :math:`s(0) \ne 1`, such as ``"sigmoid"`` (``s(2) = 0.88``, as Glow has it) and ``"softplus"`` (as nflows has it).
    Other layers, such as matrices and ActNorm, stay as they are.

    Args:
        module: a flow, a layer or any module that holds layers.

    Raises:
        TypeError: for what is no module.
        ValueError: for a layer with a network of the user's, whose last layer is not known, and for a scale map that is
            never 1, such as a sigmoid without ``eps`` or ``max_scale``.  Layers before it have been changed then.

    Source: Kingma and Dhariwal, "Glow" (2018), for last layers of zeros; the identity of nflows' autoregressive
    splines (Durkan et al. 2019).

    Example:
        >>> import torch
        >>> from pyflowkern import flows, nn
        >>> flow = nn.start_as_identity(flows.MAF(3, transforms=2, hidden=8, scale_map="softplus"))
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(flow(x)[0], x, atol=1e-5))
        True
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, layer in module.named_modules():
        if isinstance(layer, MaskedAutoregressive):
            values = _raw(layer.element_map).repeat(layer.features)
        elif isinstance(layer, AffineCoupling):
            values = _raw(layer.scale_map).repeat_interleave(layer.sizes[1])
        elif isinstance(layer, MixedSplineCoupling):
            values = torch.cat([_raw(layer.splines[c]) for c in layer.moved])
        elif isinstance(layer, SplineCoupling):
            values = _raw(layer.spline).repeat(layer.sizes[1])
            if layer.unconditional is not None:
                layer.unconditional.copy_(_raw(layer.spline).repeat(layer.sizes[0]))
        else:
            continue
        last = _last(layer.conditioner)
        if last is None:
            raise ValueError(
                f"the network of {name or 'the layer'} must be one of this package, got a "
                f"{type(layer.conditioner).__name__}, whose last layer is not known"
            )
        last.weight.zero_()  # type: ignore[operator]
        last.bias.copy_(values)  # type: ignore[operator]
    return module


def _raw(transform: ElementMap) -> Tensor:
    """Return the parameters of one element that leave it as it is: a shift and a raw scale, or a spline's."""
    if not isinstance(transform, ScaleMap):
        return transform.identity_raw()
    if transform.kind == "additive":
        return torch.zeros(1)
    return torch.tensor([0.0, transform.identity_raw()])


def _last(network: torch.nn.Module) -> torch.nn.Module | None:
    """Return the layer that makes the parameters; None for networks of others."""
    if isinstance(network, MaskedMLP):
        return network.layers[-1]
    if isinstance(network, PeriodicInput):
        return _last(network.net)
    return last_layer(network)
