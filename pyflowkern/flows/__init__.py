"""Complete flows: densities, samples and a torch distribution from one object."""

from pyflowkern.flows._base import Flow
from pyflowkern.flows._continuous import ContinuousBijection
from pyflowkern.flows._distribution import FlowDistribution
from pyflowkern.flows._lazy import LazyFlow
from pyflowkern.flows.autoregressive import IAF, MAF
from pyflowkern.flows.bases import MixtureOfGaussians, StandardNormal, Uniform
from pyflowkern.flows.cnf import CNF, FFJORD, ContinuousTerms
from pyflowkern.flows.flow_matching import FlowMatching
from pyflowkern.flows.glow import Glow
from pyflowkern.flows.likelihood import NegativeLogLikelihood
from pyflowkern.flows.nsf import NSF
from pyflowkern.flows.realnvp import RealNVP
from pyflowkern.flows.weights import load_flow, load_weights, save_weights

__all__ = [
    "CNF",
    "FFJORD",
    "IAF",
    "MAF",
    "NSF",
    "ContinuousBijection",
    "ContinuousTerms",
    "Flow",
    "FlowDistribution",
    "FlowMatching",
    "Glow",
    "LazyFlow",
    "MixtureOfGaussians",
    "NegativeLogLikelihood",
    "RealNVP",
    "StandardNormal",
    "Uniform",
    "load_flow",
    "load_weights",
    "save_weights",
]
