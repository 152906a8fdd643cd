"""The fields that sbi's estimators make of their networks, and the traces of their Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.interop._sbi.networks import Dual, Network, is_of, network_of
from pyflowkern.nn.links import Link

__all__ = ["ESTIMATORS", "Field", "estimator_of", "read_field"]

_FLOW = "neural_nets.estimators.flowmatching_estimator.FlowMatchingEstimator"
_SCORE = "neural_nets.estimators.score_estimator"
#: Where the estimators lie whose fields are known.
ESTIMATORS = (_FLOW, *(f"{_SCORE}.{sde}ScoreEstimator" for sde in ("VP", "SubVP", "VE")))


class _Around(NamedTuple):
    """What a field is, at one time: ``gain * net((x - mean) / std) + rest(x)``.

    Args:
        mean: ``[1, D]``, or with sizes of 1, as with all tensors here.
        std: likewise.
        gain: likewise.
        rest: linear in the state.
        slope: of ``rest``.
        time: ``[1]``, as the network reads it.
    """

    mean: Tensor
    std: Tensor
    gain: Tensor
    rest: Callable[[Tensor], Tensor]
    slope: Tensor
    time: Tensor


def _of_flow(estimator: Any, t: Tensor, like: Tensor) -> _Around:
    """Return what flow matching has around its network."""
    time = t.reshape(1)
    mean, std = estimator._get_time_dependent_stats(time)
    shift, gain = estimator._get_velocity_normalization()
    if not estimator.gaussian_baseline:
        return _Around(mean, std, gain, lambda x: shift, torch.zeros_like(gain), time)
    base = estimator._compute_velocity_baseline
    slope = base(torch.ones_like(like), time) - base(torch.zeros_like(like), time)
    return _Around(mean, std, gain, lambda x: base(x, time), slope, time)


def _of_score(estimator: Any, t: Tensor, like: Tensor) -> _Around:
    """Return what the probability flow of a score has around its network."""
    time = t.reshape(1)
    mean, std = estimator.approx_marginal_mean(time), estimator.approx_marginal_std(time)
    noise = estimator.std_fn(time)
    half = 0.5 * estimator.diffusion_fn(like, t) ** 2
    gain = half * (estimator.mean_t_fn(time) / noise)

    def rest(x: Tensor) -> Tensor:
        found: Tensor = estimator.drift_fn(x, t) + half * ((x - mean) / std**2)
        return found

    slope = estimator.drift_fn(torch.ones_like(like), t) + half / std**2
    return _Around(mean, std, gain, rest, slope, noise.reshape(-1))


class Field:
    """The field of an estimator under a condition, which spreads over the state.

    Its layers run once for a condition and a time where all samples have the same, and derivatives go forward.

    Args:
        estimator: of sbi.
        network: its network.
        condition: ``[*, *condition_shape]``.
    """

    def __init__(self, estimator: Any, network: Network, condition: Tensor) -> None:
        self._estimator, self._network, self._condition = estimator, network, condition
        self._around = _of_flow if is_of(estimator, _FLOW) else _of_score

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the field."""
        around = self._around(self._estimator, t, x.new_empty(1, x.shape[-1]))
        hidden = self._hidden(around, x, None).value
        return self._out(around, x, hidden)

    def with_trace(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the field and the trace of its Jacobian."""
        features = x.shape[-1]
        around = self._around(self._estimator, t, x.new_empty(1, features))
        every = torch.eye(features, dtype=x.dtype, device=x.device)
        every = every.reshape(features, *[1] * (x.dim() - 1), features)
        value, tangents = self._hidden(around, x, every / around.std)
        assert tangents is not None
        weight = self._network.last.weight * around.gain.expand(1, features).T
        trace = torch.einsum("d...k,dk->...", tangents, weight)
        trace = trace + around.slope.expand(1, features).sum()
        return self._out(around, x, value), trace.expand(x.shape[:-1])

    def with_estimate(self, t: Tensor, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """Return the field and the product of its Jacobian with a probe from both sides."""
        around = self._around(self._estimator, t, x.new_empty(1, x.shape[-1]))
        value, tangents = self._hidden(around, x, probe[None] / around.std)
        assert tangents is not None
        along = functional.linear(tangents, self._network.last.weight)[0]
        product = (around.gain * along + around.slope * probe) * probe
        return self._out(around, x, value), product.sum(-1)

    def _hidden(self, around: _Around, x: Tensor, tangents: Tensor | None) -> Dual:
        given = Dual((x - around.mean) / around.std, tangents)
        # called as often as sbi does: it may be anything
        condition = self._estimator._embedding_net(self._condition)
        return self._network.hidden(given, condition, around.time)

    def _out(self, around: _Around, x: Tensor, hidden: Tensor) -> Tensor:
        last = self._network.last
        value = functional.linear(hidden, last.weight, last.bias)
        return value * around.gain + around.rest(x)


def estimator_of(ode: Any) -> Any:
    """Return the estimator whose field a ZukoNeuralODE integrates; None for another function."""
    function = ode.__dict__.get("f")
    estimator = getattr(function, "__self__", None)
    if not is_of(estimator, *ESTIMATORS):
        return None
    own = getattr(type(estimator), "ode_fn", None)
    if (
        getattr(function, "__func__", None) is not own
        or {"ode_fn", "score"} & vars(estimator).keys()
    ):
        return None
    return estimator


def read_field(ode: Any, link: Link) -> tuple[Any, Network] | None:
    """Return the estimator of a ZukoNeuralODE and its network, after noting all of it; None for others."""
    estimator = estimator_of(ode)
    if estimator is None or len(estimator.input_shape) != 1:
        return None
    link.facts.append((ode, ("f",)))
    link.watch(estimator)
    network = network_of(estimator._modules.get("net"), link)
    return None if network is None else (estimator, network)
