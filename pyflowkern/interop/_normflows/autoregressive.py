"""Masked autoregressive flows of normflows, as steps of a chain."""

from __future__ import annotations

from typing import Any

from pyflowkern.interop._networks import masked_network
from pyflowkern.interop._normflows.parts import FAMILY
from pyflowkern.interop._normflows.vectors import Layer
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.chain_steps import ElementsStep

__all__ = ["MaskedAffine"]

_SCALE_MAP = ScaleMap("sigmoid", offset=2.0, eps=1e-3)
#: Of a feature the raw scale comes before the shift.
_PARAMETERS = (1, 0)


class MaskedAffine(Layer):
    """``MaskedAffineAutoregressive``, which computes samples by one pass, and densities feature by feature."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.features))

    def link(self) -> Link | None:
        module = self.module
        link = Link(backwards=True)
        link.watch(module, "features")
        net = module._modules.get("autoregressive_net")
        made = masked_network(FAMILY, net, link, _PARAMETERS)
        if made is None:
            return None
        try:
            link.steps.append(ElementsStep(_SCALE_MAP, made.order, made.order, made.network))
        except ValueError:  # sizes that do not fit each other
            return None
        return link
