"""Whether a layer must be called, or may be read: a fused op takes weights and calls no layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.modules import module as _module

__all__ = ["may_be_read"]


def may_be_read(layers: Iterable[torch.nn.Module], *kinds: type[torch.nn.Module]) -> bool:
    """Whether all layers are of exactly these kinds and nobody would notice that they are not called.

    Someone would notice with hooks of a layer (also those of pruning, of the old ``weight_norm`` and
    ``spectral_norm``), with hooks of all modules, as FLOP counters register them, and with layers that were replaced
    or have a forward of their own.  Parametrized layers may be read: reading their weight computes it.
    """
    if _module._has_any_global_hook():
        return False
    for layer in layers:
        known = layer.__dict__  # nn.Module's own look-up takes longer
        if known["_forward_hooks"] or known["_forward_pre_hooks"]:
            return False
        if known["_backward_hooks"] or known["_backward_pre_hooks"]:
            return False
        cls = type(layer)
        if "parametrizations" in known["_modules"]:
            cls = cls.__bases__[0]  # torch puts a class of its own before it
        if cls not in kinds:
            return False
    return True
