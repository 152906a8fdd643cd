"""Transport between two distributions: Sinkhorn without the matrix, flow matching, Gaussian bridges in closed form."""

from pyflowkern.transport.assignment import assignment
from pyflowkern.transport.batches import PairedBatches
from pyflowkern.transport.bridge import SchrodingerBridge
from pyflowkern.transport.gaussian import (
    GaussianBridge,
    GaussianPath,
    gaussian_bridge,
    independent_gaussian_path,
)
from pyflowkern.transport.matchers import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
    SinkhornOptimalTransportConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)
from pyflowkern.transport.plan import Plan
from pyflowkern.transport.rectified import RectifiedFlow
from pyflowkern.transport.samplers import OTPlanSampler, wasserstein
from pyflowkern.transport.solution import Solution, Status
from pyflowkern.transport.solver import sinkhorn, sinkhorn_divergence

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "GaussianBridge",
    "GaussianPath",
    "OTPlanSampler",
    "PairedBatches",
    "Plan",
    "RectifiedFlow",
    "SchrodingerBridge",
    "SchrodingerBridgeConditionalFlowMatcher",
    "SinkhornOptimalTransportConditionalFlowMatcher",
    "Solution",
    "Status",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "assignment",
    "gaussian_bridge",
    "independent_gaussian_path",
    "sinkhorn",
    "sinkhorn_divergence",
    "wasserstein",
]
