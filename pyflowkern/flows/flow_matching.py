"""Flow matching: continuous flows that learn a velocity by regression, without solving an equation in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern.flows.cnf import CNF
from pyflowkern.nn import MultiScale
from pyflowkern.transport import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SinkhornOptimalTransportConditionalFlowMatcher,
)

__all__ = ["FlowMatching"]

_COUPLINGS: dict[str, Callable[[], ConditionalFlowMatcher]] = {
    "independent": ConditionalFlowMatcher,
    "ot": ExactOptimalTransportConditionalFlowMatcher,
    "sinkhorn": partial(
        SinkhornOptimalTransportConditionalFlowMatcher, reg=0.01, normalize_cost="spread"
    ),
}


class FlowMatching(CNF):
    r"""A continuous flow trained by regression: :math:`\min_v E\,|v(s, x_s) - u_s|^2`, no solve in a training step.

    Samples :math:`x_0` of the base and data :math:`x_1` are paired by ``coupling``, which also gives
    a point :math:`x_s` of the path between them and the velocity :math:`u_s` there.  With the independent
    coupling :math:`x_s = (1 - s) x_0 + s x_1` and :math:`u_s = x_1 - x_0`.  Densities, samples and
    :meth:`CNF.terms`, with its standard error, are those of a continuous flow.

    The time :math:`s` of paths runs from base to data, that of the field from data to base, as in every
    continuous flow here: :math:`v(s, x) = -f(1 - s, x)`.

    Args:
        event_shape: a dimension ``D``, or a shape ``(C, *space)``.
        hidden: widths of the field's hidden layers.
        coupling: how a batch is paired: "independent", "ot" (the exact plan of the batch), "sinkhorn" (an
            entropic plan, whose epsilon is a hundredth of the mean cost of centred batches: close to exact, and many
            times as fast), or a matcher of :mod:`pyflowkern.transport`.  Contexts go where their data go.
        **options: of :class:`CNF`, among them ``conv``, ``field``, ``context_features``, ``base`` and the
            settings of the solver.  ``duration`` is 1, and there is one block and one level.

    Raises:
        TypeError: for a coupling that is neither a name nor a matcher, and for settings that are unknown or fixed.
        ValueError: for an unknown coupling, and as :class:`CNF`.

    Source: Lipman et al. 2023, *Flow Matching for Generative Modeling*; Tong et al. 2024, *Improving and
    generalizing flow-based generative models with minibatch optimal transport*.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.FlowMatching(2, hidden=(16, 16), coupling="ot")
        >>> flow.loss(torch.randn(32, 2)).backward()
        >>> tuple(flow.sample(5).shape), tuple(flow.eval().log_prob(torch.randn(4, 2)).shape)
        ((5, 2), (4,))
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        *,
        coupling: str | ConditionalFlowMatcher = "independent",
        **options: Any,
    ) -> None:
        fixed = sorted({"blocks", "levels", "duration", "train_time"} & options.keys())
        if fixed:
            raise TypeError(f"{', '.join(fixed)}: fixed in FlowMatching, not to be given")
        matcher = _matcher(coupling)
        super().__init__(event_shape, hidden, **options)
        self.coupling = matcher

    def velocity(self, s: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity from base to data at points ``x``, shaped like ``x``.

        Args:
            s: time, 0 at the base and 1 at the data: a number, a scalar tensor, or ``[N]``.
            x: ``[N, *event_shape]``; of flows with ``bits`` points of the real line, not pixels.
            context: as in :meth:`forward`.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or a context that does not fit.
        """
        self._check_data("x", x)
        context = self._context_of(context, x.shape[0])
        return self._velocity(s, x, context)

    def _velocity(self, s: Tensor | float, x: Tensor, context: Tensor | None) -> Tensor:
        given = () if context is None else (context,)
        field = next(self.blocks()).field
        state = x if isinstance(self.bijection, MultiScale) else x.flatten(1)  # images, or vectors
        velocity: Tensor = field(1 - s, state, *given)
        return -velocity.reshape(x.shape)

    def loss(
        self,
        x1: Tensor,
        context: Tensor | None = None,
        *,
        x0: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Return the mean of :math:`(v(s, x_s) - u_s)^2` over samples and elements, a scalar.

        Args:
            x1: data ``[N, *event_shape]``; with ``bits`` also uint8.
            context: as in :meth:`forward`.
            x0: samples of the base, shaped like ``x1``; drawn if None.
            generator: source of ``x0``, of pairs, times and noise, in this order.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or a context that does not fit.
        """
        self._check_data("x1", x1)
        context = self._context_of(context, x1.shape[0])
        if self.preprocess is not None:
            x1, _ = self._from_pixels(x1)
        if x0 is None:
            drawn: Tensor = self.base.sample(len(x1), temperature=1.0, generator=generator)  # type: ignore[operator]
            x0 = drawn.reshape(x1.shape)
        elif not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a torch.Tensor, got {type(x0).__name__}")
        elif x0.shape != x1.shape:
            raise ValueError(f"x0 must have shape {tuple(x1.shape)}, got {tuple(x0.shape)}")
        self._check_dtype("x0", x0)
        matcher: Any = self.coupling
        if context is not None and hasattr(matcher, "guided_sample_location_and_conditional_flow"):
            s, xs, us, _, context = matcher.guided_sample_location_and_conditional_flow(
                x0, x1, y1=context, generator=generator
            )
        else:
            s, xs, us = matcher.sample_location_and_conditional_flow(x0, x1, generator=generator)
        error: Tensor = self._velocity(s, xs, context) - us
        return error.square().mean()


def _matcher(coupling: object) -> ConditionalFlowMatcher:
    """Return the matcher of a name, or the user's."""
    if isinstance(coupling, ConditionalFlowMatcher):
        return coupling
    if not isinstance(coupling, str):
        raise TypeError(
            f"coupling must be a name or a matcher of transport, got {type(coupling).__name__}"
        )
    if coupling not in _COUPLINGS:
        raise ValueError(f"coupling must be one of {sorted(_COUPLINGS)}, got {coupling!r}")
    return _COUPLINGS[coupling]()
