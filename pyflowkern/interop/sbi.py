"""sbi 0.27 (simulation-based inference): what is known of it, and flows of this package as its density estimators.

.. code-block:: python

    from sbi.inference import NPE
    from pyflowkern.interop.sbi import density_estimator
    inference = NPE(prior, density_estimator=density_estimator(flows.NSF, hidden=50))
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import check_flag
from pyflowkern.flows import MAF, Flow
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._sbi.doors import OdeDoor, why_left
from pyflowkern.interop._sbi.fields import ESTIMATORS
from pyflowkern.nn import Standardize

__all__ = ["FlowEstimator", "density_estimator"]


def density_estimator(
    build: Callable[..., Flow] | None = None,
    *,
    z_score: bool = True,
    embedding_net: torch.nn.Module | None = None,
    likelihood: bool = False,
    **options: Any,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    r"""Return what sbi takes as ``density_estimator``: a function that makes an estimator from simulations.

    Args:
        build: makes the flow, as ``build(features, context_features=K, **options)``: a class of
            :mod:`pyflowkern.flows`, or a function.  None for :class:`~pyflowkern.flows.MAF` with ``hidden=(50, 50)``.
        z_score: standardize the simulations, parameters and observations, by their means and deviations (of each
            number, as ``"independent"`` of sbi).
        embedding_net: network from standardized conditions ``[N, *shape]`` to features ``[N, K]``; None for the
            conditions themselves.  It is trained with the flow.
        likelihood: False for :math:`q(\theta \mid x)`, as NPE wants it; True for :math:`q(x \mid \theta)`, as NLE does.
        **options: more arguments of ``build``.

    Returns:
        A function of ``(theta, x)``, tensors ``[N, ...]``, that returns a :class:`FlowEstimator`.

    Raises:
        TypeError: for a ``build`` that cannot be called, an embedding that is no module, and flags that are no bools;
            later for a ``build`` that returns no :class:`~pyflowkern.flows.Flow`.
        ValueError: later, for arguments that the flow refuses, and for a flow that cannot be standardized
            (:meth:`~pyflowkern.flows.Flow.standardize`).

    Source: Papamakarios and Murray, "Fast epsilon-free inference of simulation models with Bayesian conditional
    density estimation" (2016); Greenberg, Nonnenmacher and Macke, "Automatic posterior transformation for
    likelihood-free inference" (2019), for what sbi trains.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> from pyflowkern.interop.sbi import density_estimator
        >>> theta, x = torch.randn(64, 2), 100 * torch.randn(64, 3)
        >>> estimator = density_estimator(flows.NSF, transforms=2, hidden=8)(theta, x)
        >>> tuple(estimator.loss(theta, x).shape), tuple(estimator.sample((5,), x[:4]).shape)
        ((64,), (5, 4, 2))
    """
    if build is None:
        build = partial(MAF, hidden=(50, 50))
    if not callable(build):
        raise TypeError(
            f"build must be a class of flows or a function, got {type(build).__name__}"
        )
    if embedding_net is not None and not isinstance(embedding_net, torch.nn.Module):
        raise TypeError(f"embedding_net must be a module, got {type(embedding_net).__name__}")
    return partial(
        _estimator,
        build=partial(build, **options),
        z_score=check_flag("z_score", z_score),
        embedding_net=embedding_net,
        likelihood=check_flag("likelihood", likelihood),
    )


def _estimator(
    theta: Tensor,
    x: Tensor,
    *,
    build: Callable[..., Flow],
    z_score: bool,
    embedding_net: torch.nn.Module | None,
    likelihood: bool,
) -> FlowEstimator:
    data, conditions = (x, theta) if likelihood else (theta, x)
    embedding = _Embedding(tuple(conditions.shape[1:]), embedding_net)
    if z_score:
        embedding.standardize.fit(conditions.flatten(1))
    with torch.no_grad():
        features = embedding(conditions[:2]).shape[-1]
    shape = tuple(data.shape[1:])
    flow = build(shape[0] if len(shape) == 1 else shape, context_features=features)
    if not isinstance(flow, Flow):
        raise TypeError(f"build must return a flows.Flow, got {type(flow).__name__}")
    if z_score:
        flow.standardize(data)
    return FlowEstimator(flow, embedding)


class _Embedding(torch.nn.Module):
    """Conditions, standardized, through a network: ``[*lead, *shape] -> [*lead, K]``."""

    def __init__(self, shape: tuple[int, ...], net: torch.nn.Module | None) -> None:
        super().__init__()
        self.shape = shape
        self.standardize = Standardize(torch.Size(shape).numel())
        self.net = torch.nn.Identity() if net is None else net

    def forward(self, conditions: Tensor) -> Tensor:
        cut = conditions.dim() - len(self.shape)
        if cut < 0 or tuple(conditions.shape[cut:]) != self.shape:
            raise ValueError(
                f"condition must have shape [*batch, {', '.join(map(str, self.shape))}], got {tuple(conditions.shape)}"
            )
        lead = conditions.shape[:cut]
        z = self.standardize(conditions.reshape(lead.numel(), -1))[0]
        out: Tensor = self.net(z.reshape(-1, *self.shape)).flatten(1)
        return out.reshape(*lead, out.shape[-1])


class FlowEstimator(torch.nn.Module):
    """A conditional flow with the methods of sbi's ``ConditionalDensityEstimator``, of which it counts as a subclass.

    Args:
        flow: the density of an ``input`` ``[*batch, *input_shape]`` under a context.
        embedding_net: from a ``condition`` ``[*batch, *condition_shape]`` to the context; its attribute ``shape``
            is that of a condition.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.sbi import density_estimator
        >>> theta, x = torch.randn(64, 2), torch.randn(64, 3)
        >>> estimator = density_estimator(transforms=2)(theta, x)
        >>> estimator.input_shape, estimator.condition_shape
        (torch.Size([2]), torch.Size([3]))
        >>> tuple(estimator.log_prob(theta.view(32, 2, 2), x[:2]).shape)
        (32, 2)
    """

    def __init__(self, flow: Flow, embedding_net: torch.nn.Module) -> None:
        super().__init__()
        self.net = flow
        self._embedding_net = embedding_net
        _register()

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one input."""
        return torch.Size(self.net.event_shape)

    @property
    def condition_shape(self) -> torch.Size:
        """Shape of one condition."""
        return torch.Size(self._embedding_net.shape)  # type: ignore[arg-type]

    @property
    def embedding_net(self) -> torch.nn.Module:
        """What makes the flow's context of a condition, standardization included."""
        return self._embedding_net

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """Return the log-density ``[samples, batch]``, broadcast.

        Args:
            input: ``[samples, batch, *input_shape]`` or ``[batch, *input_shape]``.
            condition: ``[batch, *condition_shape]`` or ``[samples, batch, *condition_shape]``.
        """
        if input.dim() <= len(self.input_shape) + 1:
            input = input.unsqueeze(0)
        context = self._embedding_net(condition)
        return self.net.distribution(context, validate_args=False).log_prob(input)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """Return the negative log-density ``[batch]`` of inputs under their conditions."""
        return -self.net.log_prob(input, self._embedding_net(condition))

    def sample(self, sample_shape: torch.Size | tuple[int, ...], condition: Tensor) -> Tensor:
        """Draw ``[*sample_shape, batch, *input_shape]`` under conditions ``[batch, *condition_shape]``."""
        return self.net.distribution(self._embedding_net(condition)).sample(sample_shape)

    def sample_and_log_prob(
        self, sample_shape: torch.Size | tuple[int, ...], condition: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and return their log-densities ``[*sample_shape, batch]`` from the same pass."""
        distribution = self.net.distribution(self._embedding_net(condition))
        return distribution.rsample_and_log_prob(sample_shape)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """Return the latents ``[*batch, D]`` of inputs, with conditions that broadcast."""
        latents: Tensor = self.net.transform(self._embedding_net(condition))(input)
        return latents

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register()


def _register() -> None:
    """Make the estimator count as sbi's, which asks by ``isinstance``, where sbi is in use."""
    if (module := sys.modules.get("sbi.neural_nets.estimators.base")) is not None:
        module.ConditionalDensityEstimator.register(FlowEstimator)


def _look_at_ode(module: torch.nn.Module) -> Outcome:
    if why := why_left(module):
        return Outcome(note=why)
    return Outcome([OdeDoor(module)], runs="own op", note="zuko's own solver, the same steps")


def _look_at_estimator(module: torch.nn.Module) -> Outcome:
    return Outcome(
        note="it is trained as before; what a posterior makes of it is faster by accelerate() without a model, or by"
        " accelerate(posterior.potential_fn.neural_ode)"
    )


LIBRARY = Library(
    "sbi",
    ("sbi",),
    {
        "samplers.ode_solvers.zuko_ode.ZukoNeuralODE": Kind(_look_at_ode, ("get_distribution",)),
        **{where: Kind(_look_at_estimator, ()) for where in ESTIMATORS},
    },
)
