"""All transforms of normflows that are steps of a chain."""

from __future__ import annotations

from typing import Any

from pyflowkern.interop._normflows.autoregressive import MaskedAffine
from pyflowkern.interop._normflows.masks import MaskedCoupling
from pyflowkern.interop._normflows.parts import is_named
from pyflowkern.interop._normflows.splines import AutoregressiveSpline, CoupledSpline
from pyflowkern.interop._normflows.vectors import (
    AffineCoupling,
    AffineMatrix,
    ConstantAffine,
    Layer,
    Permute,
    Shuffle,
    turned_round,
)
from pyflowkern.nn.links import Link

__all__ = ["LAYERS", "Turned"]

#: By class.
LAYERS: dict[str, type[Layer]] = {
    "flows.affine.autoregressive.MaskedAffineAutoregressive": MaskedAffine,
    "flows.affine.coupling.AffineConstFlow": ConstantAffine,
    "flows.affine.coupling.AffineCouplingBlock": AffineCoupling,
    "flows.affine.coupling.MaskedAffineFlow": MaskedCoupling,
    "flows.mixing.InvertibleAffine": AffineMatrix,
    "flows.mixing.LULinearPermute": Shuffle,
    "flows.mixing.Permute": Permute,
    "flows.neural_spline.wrapper.AutoregressiveRationalQuadraticSpline": AutoregressiveSpline,
    "flows.neural_spline.wrapper.CoupledRationalQuadraticSpline": CoupledSpline,
    "flows.normalization.ActNorm": ConstantAffine,
}


class Turned(Layer):
    """``Reverse``, which exchanges the directions of a flow."""

    def __init__(self, module: Any) -> None:
        self._inner = _layer_for(module._modules.get("flow"))
        super().__init__(module, 0 if self._inner is None else self._inner.features)

    def link(self) -> Link | None:
        return self._link(False)

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        return self._link(True)

    def _link(self, turned: bool) -> Link | None:
        inner = self._inner
        if inner is None or inner.module is not self.module._modules.get("flow"):
            return None
        link = inner.turned() if turned else inner.link()
        if link is not None:
            link.watch(self.module)
        return turned_round(link)


def _layer_for(module: Any) -> Layer | None:
    """Return the layer that a transform is; None for others."""
    return next((layer(module) for name, layer in LAYERS.items() if is_named(module, name)), None)
