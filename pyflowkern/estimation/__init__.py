"""Estimates with their errors: importance sampling, bounds of a likelihood, and whether two samples are of one law."""

from pyflowkern.estimation.bounds import LikelihoodBounds, likelihood_bounds
from pyflowkern.estimation.classifier import classifier_test
from pyflowkern.estimation.importance import (
    ImportanceEstimate,
    importance_estimate,
    importance_sampling,
    pareto_smoothed,
)
from pyflowkern.estimation.means import Estimate, mean_with_error
from pyflowkern.estimation.two_sample import TwoSample, energy_test, mmd_test, sliced_test

__all__ = [
    "Estimate",
    "ImportanceEstimate",
    "LikelihoodBounds",
    "TwoSample",
    "classifier_test",
    "energy_test",
    "importance_estimate",
    "importance_sampling",
    "likelihood_bounds",
    "mean_with_error",
    "mmd_test",
    "pareto_smoothed",
    "sliced_test",
]
