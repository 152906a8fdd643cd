"""What is known of nessai's flows, which consist of glasflow's copy of nflows."""

from __future__ import annotations

from typing import Any

import torch

from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._nflows.flows import NessaiDoor
from pyflowkern.interop.nflows import BASE, LINEAR

__all__ = ["FLOW", "LIBRARY"]

_METHODS = ("log_prob", "forward_and_log_prob")


def _flow(module: torch.nn.Module) -> Outcome:
    doors: list[Any] = [NessaiDoor(module, name) for name in _METHODS]
    return Outcome(doors, runs="one op")


FLOW = Kind(_flow, _METHODS, holds=True)
LIBRARY = Library(
    "nessai",
    ("nessai",),
    {
        "flows.realnvp.RealNVP": FLOW,
        "flows.nsf.NeuralSplineFlow": FLOW,
        "flows.maf.MaskedAutoregressiveFlow": FLOW,
        "flows.distributions.MultivariateNormal": BASE,
        "flows.transforms.LULinear": LINEAR,  # deprecated, and the same as its base
    },
)
