"""What is known of glasflow's own flows and couplings, around its copy of nflows."""

from __future__ import annotations

from pyflowkern.interop._kinds import Library
from pyflowkern.interop._nflows.elements import Coupling
from pyflowkern.interop.nessai import FLOW
from pyflowkern.interop.nflows import elements

__all__ = ["LIBRARY"]

_MASKED = (
    "Affine",
    "PiecewiseLinear",
    "PiecewiseQuadratic",
    "PiecewiseCubicAutoregressive",  # as it is called there
    "PiecewiseRationalQuadratic",
)
LIBRARY = Library(
    "glasflow",
    ("glasflow",),
    {
        "transforms.coupling.AffineCouplingTransform": elements(Coupling),
        "flows.realnvp.RealNVP": FLOW,
        "flows.nsf.CouplingNSF": FLOW,
        "flows.coupling.CouplingFlow": FLOW,
        "flows.autoregressive.MaskedAutoregressiveFlow": FLOW,
        **{f"flows.autoregressive.Masked{name}AutoregressiveFlow": FLOW for name in _MASKED},
    },
)
