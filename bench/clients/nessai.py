"""nessai: nested sampling of a mixture of two normal distributions, whose evidence is known."""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import numpy as np

__all__ = ["run"]

BOUND = 10.0


def run(dims: int) -> dict[str, Any]:
    """Run the sampler with its defaults.

    Args:
        dims: number of parameters.
    """
    from nessai.flowsampler import FlowSampler
    from nessai.model import Model

    class Mixture(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            self.names = [f"x{i}" for i in range(dims)]
            self.bounds = {name: [-BOUND, BOUND] for name in self.names}

        def log_prior(self, x: Any) -> Any:
            inside = np.log(self.in_bounds(x), dtype="float")
            return inside - dims * math.log(2 * BOUND)

        def log_likelihood(self, x: Any) -> Any:
            u = self.unstructured_view(x)
            a, b = (-0.5 * ((u - m) ** 2).sum(-1) for m in (-2.0, 2.0))
            return np.logaddexp(a, b) - math.log(2) - 0.5 * dims * math.log(2 * math.pi)

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        sampler = FlowSampler(
            Mixture(),
            output=folder,
            seed=1234,
            nlive=1000,
            pytorch_threads=2,
            resume=False,
            plot=False,
        )
        sampler.run(plot=False, save=False)
        seconds = time.perf_counter() - begin
    state = sampler.ns.state
    return {
        "whole run (s)": seconds,
        "log evidence": float(sampler.log_evidence),
        "its error": float(sampler.log_evidence_error),
        "true log evidence": -dims * math.log(2 * BOUND),
        "likelihood evaluations": int(sampler.ns.model.likelihood_evaluations),
        "iterations": int(getattr(state, "_iteration", 0) or sampler.ns.iteration),
    }
