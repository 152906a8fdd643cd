"""Warnings, each given once, about data that do not suit a flow."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn import Module

from pyflowkern._library import transformed
from pyflowkern.flows._domain import Domain
from pyflowkern.nn import ActNorm, BatchNorm, Bijection, Standardize

__all__ = ["has_statistics", "warn_of_unsuitable"]

#: Data of this typical size and above are too large for networks and splines of unit scale.
_LARGE = 100.0


def warn_of_unsuitable(
    x: Tensor, outside: Tensor | None, domain: Domain | None, bijection: Bijection
) -> bool:
    """Warn of data outside of the domain, or on the real line of a scale that needs to be changed first.

    Args:
        x: the data as they were given.
        outside: which samples ``[N]`` lie outside of the domain.
        domain: of the flow.
        bijection: of the flow; one with ActNorm finds the scale of the data itself, in training mode.
            One with BatchNorm or Standardize has it.

    Returns:
        Whether that is done: not under transforms, where nothing can be looked at.  Data on a GPU are not
        looked at, since it would be waited for.
    """
    if x.device.type != "cpu":
        return True
    if type(x) is not Tensor or transformed() or not x.numel():
        return False
    norms = [m for m in bijection.modules() if isinstance(m, ActNorm)]
    if domain is not None and outside is not None:
        count = int(outside.sum())
        if count:
            warnings.warn(
                f"values of {count} of {x.shape[0]} samples lie outside of the domain {domain.ends}, where "
                f"log_prob is -inf; {domain.hint(x)}",
                stacklevel=4,
            )
    elif domain is None and not any(map(_has_scale, bijection.modules())):
        size = float(x.detach()[:1000].abs().float().nanmedian())
        if size > _LARGE:
            other = (
                "call the flow in training mode first, where ActNorm finds their scale"
                if norms
                else "begin with flow.standardize(data) or nn.ActNorm"
            )
            warnings.warn(
                f"the data are of size {size:.3g}, and this flow is made for about unit variance: standardise them "
                f"as (x - mean) / std, or {other}",
                stacklevel=4,
            )
    return True


def has_statistics(layer: ActNorm) -> bool:
    """Whether the layer has seen data or been given parameters."""
    return bool((layer.initialized != 0) | layer.log_scale.any() | layer.bias.any())


def _has_scale(layer: Module) -> bool:
    """Whether the layer has seen data or been given parameters, or takes its scale from the data that it sees now."""
    if isinstance(layer, ActNorm):
        return layer.training or has_statistics(layer)
    if isinstance(layer, BatchNorm):
        return layer.training or bool(layer.batches > 0)
    return isinstance(layer, Standardize) and bool(layer.log_scale.any() | layer.bias.any())
