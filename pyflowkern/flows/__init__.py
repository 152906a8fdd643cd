"""Complete flows: densities, samples and a torch distribution from one object."""

from pyflowkern.flows._base import Flow
from pyflowkern.flows._distribution import FlowDistribution, StandardNormal
from pyflowkern.flows.cnf import CNF, FFJORD, ContinuousBijection, ContinuousTerms
from pyflowkern.flows.glow import Glow
from pyflowkern.flows.realnvp import RealNVP

__all__ = [
    "CNF",
    "FFJORD",
    "ContinuousBijection",
    "ContinuousTerms",
    "Flow",
    "FlowDistribution",
    "Glow",
    "RealNVP",
    "StandardNormal",
]
