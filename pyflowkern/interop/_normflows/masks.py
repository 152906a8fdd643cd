"""RealNVP with masks, of normflows, as steps of a chain."""

from __future__ import annotations

from typing import Any

import torch

from pyflowkern.interop._normflows.networks import Ends, mlp
from pyflowkern.interop._normflows.vectors import Layer
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.chain_steps import ElementsStep

__all__ = ["MaskedCoupling"]

_SHIFT = ScaleMap("additive", shift_gain=-1.0)
#: The shifts that it is given, which a network of scales does not have, do not count.
_SCALE = ScaleMap("exp", divide=True, shift_gain=0.0)


class MaskedCoupling(Layer):
    """``MaskedAffineFlow``: ``x = z exp(s(z_b)) + t(z_b)`` where ``b`` is 0.

    From data to latent that is two steps with a network each, both of which read what passes.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.b.numel() if module.b.dim() == 2 else 0)

    def link(self) -> Link | None:
        module = self.module
        mask = module._buffers.get("b")
        if mask is None or not ((mask == 0) | (mask == 1)).all():
            return None
        passing, moved = (
            where.flatten().nonzero().flatten().tolist() for where in (mask == 1, mask == 0)
        )
        if not passing or not moved:
            return None
        link = Link()
        link.watch(module)
        link.holds.append(Holds(module, "b"))
        link.context_features = 0
        for name, scale_map, outputs in (("t", _SHIFT, moved), ("s", _SCALE, moved * 2)):
            net = module._modules.get(name)
            if net is None:
                if vars(module).get(name) is not torch.zeros_like:
                    return None
                link.facts.append((module, (name,)))
                continue
            network = mlp(net, link, Ends(passing, outputs))
            if network is None:
                return None
            try:
                step = ElementsStep(scale_map, moved, passing, network, "blocked")
            except ValueError:  # sizes that do not fit each other
                return None
            link.steps.append(step)
        return link if link.steps else None
