"""Whether a fused op may use layers' weights without calling the layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

__all__ = ["HOOKS", "globally_hooked", "may_be_read"]

#: Where a module keeps its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def globally_hooked() -> bool:
    """Whether hooks of all modules are registered that calling a layer would run."""
    return _module._has_any_global_hook() and not _only_trackers()


def may_be_read(layers: Iterable[torch.nn.Module], *kinds: type[torch.nn.Module]) -> bool:
    """Whether all layers are of exactly these kinds and give the same result when only their weights are used.

    False where a layer has hooks (also those of pruning, and of the old ``weight_norm`` and ``spectral_norm``), where
    hooks of all modules are registered, and where a layer was replaced or ``forward`` overridden, by a class or for one
    instance.  Parametrized layers are fine: reading their weight computes it.  So are torch's FLOP counters, whose
    hooks only note which module runs: they count the op as it runs without them.  Convolutions are not fine if they are
    grouped or dilated, or pad with other numbers than zeros: nothing that reads weights computes them.

    Args:
        layers: modules whose weights an op is to use.
        kinds: their allowed classes; a subclass does not count.
    """
    if globally_hooked():
        return False
    for layer in layers:
        known = layer.__dict__  # nn.Module's own look-up takes longer
        if known["_forward_hooks"] or known["_forward_pre_hooks"]:
            return False
        if known["_backward_hooks"] or known["_backward_pre_hooks"] or "forward" in known:
            return False
        cls = type(layer)
        if cls not in kinds and not (
            "parametrizations" in known["_modules"]
            and cls.__bases__[0] in kinds  # torch puts a class of its own before it
        ):
            return False
        if isinstance(layer, torch.nn.Conv2d) and not _is_plain(layer):
            return False
    return True


def _is_plain(layer: torch.nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and layer.groups == 1 and layer.dilation == (1, 1)


def _only_trackers() -> bool:
    """Whether all hooks of all modules are those by which torch's FLOP counters know the running module."""
    hooks = (
        *_module._global_forward_pre_hooks.values(),
        *_module._global_forward_hooks.values(),
        *_module._global_backward_pre_hooks.values(),
        *_module._global_backward_hooks.values(),
    )
    return all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)
