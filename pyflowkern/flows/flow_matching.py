"""Flow matching: continuous flows that learn a velocity by regression, without solving an equation in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from pyflowkern.core.checks import check_choice, check_count
from pyflowkern.core.draws import uniform_like
from pyflowkern.flows._distribution import FlowDistribution
from pyflowkern.flows._guidance import (
    GuidedVelocity,
    check_dropout,
    check_guidance,
    check_labels,
    weights_of,
)
from pyflowkern.flows.bases import StandardNormal
from pyflowkern.flows.cnf import CNF
from pyflowkern.nn import BijectionTransform, MultiScale, VectorField, VectorFieldMLP
from pyflowkern.transport import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SinkhornOptimalTransportConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
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

    Classes and contexts may be left out in training now and then, so that one field learns the conditional velocity
    and the unconditional one.  Samples may then be guided, as by a classifier but without one:

    .. math:: v_w(s, x, c) = v(s, x, \varnothing) + w\,\bigl(v(s, x, c) - v(s, x, \varnothing)\bigr)

    with the weight ``w`` of ``guidance``: 1 for the condition as it is, 0 for none, more than 1 for samples that are
    more typical of it and less varied.  Ho and Salimans write :math:`1 + w` for this ``w``.

    Args:
        event_shape: a dimension ``D``, or a shape ``(C, *space)``.
        hidden: widths of the field's hidden layers, or of the levels of a U-Net (``conv="unet"``).
        coupling: how a batch is paired: "independent", "ot" (the exact plan of the batch), "sinkhorn" (an
            entropic plan, whose epsilon is a hundredth of the mean cost of centred batches: close to exact, and many
            times as fast), or a matcher of :mod:`pyflowkern.transport`.  Contexts go where their data go.
        classes: how many classes the data have; 0 for none.  Contexts are then labels ``[N]`` of int64 from 0 on,
            which the field sees as one-hot vectors, or such weights ``[N, context_features]`` themselves; with
            dropout one more weight, the last, stands for no class.
        context_dropout: the probability with which a training step leaves out the context of a sample; without
            classes a learned vector then stands for it.  By default 0.1 with classes, else 0.  Where it is
            positive, no context at all means the unconditional density and samples.
        **options: of :class:`CNF`, among them ``conv``, ``field``, ``context_features``, ``base`` and the
            settings of the solver.  ``duration`` is 1, and there is one block and one level.

    Raises:
        TypeError: for a coupling that is neither a name nor a matcher, and for settings that are unknown or fixed.
        ValueError: for an unknown coupling, classes together with ``context_features``, a dropout out of range or
            without a context, another base than that at which a matcher's paths begin, and as :class:`CNF`.

    Source: Lipman et al. 2023, *Flow Matching for Generative Modeling*; Tong et al. 2024, *Improving and
    generalizing flow-based generative models with minibatch optimal transport*; Ho and Salimans 2022,
    *Classifier-free diffusion guidance*; Zheng et al. 2023, *Guided flows for generative modeling and decision making*.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.FlowMatching(2, hidden=(16, 16), coupling="ot")
        >>> flow.loss(torch.randn(32, 2)).backward()
        >>> tuple(flow.sample(5).shape), tuple(flow.eval().log_prob(torch.randn(4, 2)).shape)
        ((5, 2), (4,))
        >>> flow = flows.FlowMatching(2, hidden=(16, 16), classes=3)
        >>> labels = torch.tensor([0, 1, 2, 2])
        >>> flow.loss(torch.randn(4, 2), labels).backward()
        >>> tuple(flow.sample(4, labels, guidance=2.0).shape)
        (4, 2)
    """

    null_context: torch.nn.Parameter | None

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        *,
        coupling: str | ConditionalFlowMatcher = "independent",
        classes: int = 0,
        context_dropout: float | None = None,
        context_features: int = 0,
        **options: Any,
    ) -> None:
        fixed = sorted({"blocks", "levels", "duration", "train_time"} & options.keys())
        if fixed:
            raise TypeError(f"{', '.join(fixed)}: fixed in FlowMatching, not to be given")
        matcher = _matcher(coupling)
        classes = check_count("classes", classes, 0)
        features = check_count("context_features", context_features, 0)
        if classes and features:
            raise ValueError(f"context_features must be 0 with classes={classes}, got {features}")
        dropout = check_dropout(context_dropout, classes, features)
        if classes:
            features = classes + (dropout > 0)
        super().__init__(event_shape, hidden, context_features=features, **options)
        begins = isinstance(matcher, TargetConditionalFlowMatcher)  # at the standard normal
        if begins and not isinstance(self.base, StandardNormal):
            raise ValueError(
                "base must be the standard normal, where paths of TargetConditionalFlowMatcher begin, "
                f"got {type(self.base).__name__}"
            )
        self.coupling, self.classes, self.context_dropout = matcher, classes, dropout
        learned = dropout > 0 and not classes
        self.null_context = torch.nn.Parameter(torch.zeros(features)) if learned else None

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        quantized: bool = False,
        guidance: float = 1.0,
        chunk: int | None = None,
    ) -> Tensor:
        """Draw ``n`` samples, without gradient.

        Args:
            n: how many.
            context: labels ``[n]`` of a flow with classes, or one label ``[]`` or ``[1]`` for all; else as in
                :meth:`Flow.sample`.
            temperature: factor on the latents.
            generator: source of randomness.
            quantized: return uint8 pixels (flows with ``bits``).
            guidance: the weight ``w`` of the condition, see :class:`FlowMatching`.
            chunk: as in :meth:`Flow.sample`.

        Returns:
            ``[n, *event_shape]``.

        Raises:
            ValueError: for labels out of range, a guidance other than 1 in a flow without ``context_dropout``, and
                as :meth:`Flow.sample`.
            TypeError: for labels of another dtype than int64, and as :meth:`Flow.sample`.
        """
        flow = self._guided("guidance", guidance)
        return super(FlowMatching, flow).sample(
            n,
            context,
            temperature=temperature,
            generator=generator,
            quantized=quantized,
            chunk=chunk,
        )

    def guided(self, weight: float) -> FlowMatching:
        """Return this flow, to the same weights, with the guided velocity: for its samples and their densities.

        Convert and move the flow itself, not what is returned: that would leave the flow with the weights alone.

        Args:
            weight: as ``guidance`` in :meth:`sample`.

        Raises:
            TypeError: for a weight that is no number.
            ValueError: for one that is not finite, or not 1 in a flow without ``context_dropout``.
        """
        return self._guided("weight", weight)

    def _guided(self, name: str, weight: float) -> FlowMatching:
        if (weight := check_guidance(name, weight, self.context_dropout)) == 1:
            return self
        field: Any = next(self.blocks()).field
        velocity = GuidedVelocity(field, self._null(), weight)
        guided = VectorField(velocity, context_features=self.context_features)
        # a copy that shares all weights, and has another field in place of this one
        parts = (*self.parameters(), self.base, self.coupling)
        shared: dict[int, Any] = {id(part): part for part in parts}
        return copy.deepcopy(self, shared | {id(field): guided})

    def distribution(
        self, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """Return a distribution as :meth:`Flow.distribution` does; labels ``[*batch]`` give the batch shape.

        Without a context it is the unconditional one, of flows with ``context_dropout``.
        """
        given = (
            self._null() if context is None and self.context_dropout else self._encoded(context)
        )
        return super().distribution(given, validate_args=validate_args)

    def transform(self, context: Tensor | None = None, **options: Any) -> BijectionTransform:
        """Return the flow as a torch Transform, as :meth:`Flow.transform` does."""
        return super().transform(self._encoded(context), **options)

    def _encoded(self, context: Tensor | None) -> Tensor | None:
        """Return labels of any shape as weights; what is none stays as it is."""
        if not self.classes or not isinstance(context, Tensor) or context.is_floating_point():
            return context
        return weights_of(context, self.classes, self.context_features, self._anchor.dtype)

    def _null(self) -> Tensor:
        """Return what stands for no context, ``[K]``."""
        if self.null_context is not None:
            return self.null_context
        null = self._anchor.new_zeros(self.context_features)
        null[-1] = 1
        return null

    def _check_context(self, context: Tensor | None, n: int) -> Tensor | None:
        if self.classes and isinstance(context, Tensor) and not context.is_floating_point():
            check_labels(context, n, self.context_features)
            return context.expand(
                n
            )  # weights take more memory: they are made for the rows of a call
        return super()._check_context(context, n)

    def _context_of(self, context: Tensor | None, n: int) -> Tensor | None:
        if context is None and self.context_dropout:
            context = self._null()
        elif self.classes and isinstance(context, Tensor):
            check_labels(context, n, self.context_features)
            context = self._encoded(context)
        return super()._context_of(context, n)

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
        velocity: Tensor = self._run(self._field, s, x, context)
        return -velocity

    def _field(self, s: Tensor | float, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the velocity from data to base."""
        given = () if context is None else (context,)
        velocity: Tensor = self._network()(1 - s, self._state(x), *given)
        return velocity.reshape(x.shape)

    def _network(self) -> torch.nn.Module:
        field: torch.nn.Module = next(self.blocks()).field
        return field

    def _state(self, x: Tensor) -> Tensor:
        """Return points as the field takes them: images, or vectors."""
        return x if x.dim() == 2 or isinstance(self.bijection, MultiScale) else x.flatten(1)

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
            context: labels ``[N]`` of a flow with classes, else as in :meth:`forward`.  In training mode
                ``context_dropout`` of them are left out.
            x0: samples of the base, shaped like ``x1``; drawn if None.
            generator: source of ``x0``, of pairs, times, noise and of what is left out, in this order.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or a context that does not fit.
        """
        self._check_data("x1", x1)
        check = super()._context_of if context is None else self._context_of
        context = check(context, x1.shape[0])  # training is never without a context by default
        if self.preprocess is not None:
            x1, _ = self._from_pixels(x1)
        if x0 is None:
            draw = self.base.sample
            drawn: Tensor = self._run(draw, len(x1), temperature=1.0, generator=generator)  # type: ignore[arg-type]
            x0 = drawn.reshape(x1.shape)
        elif not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a torch.Tensor, got {type(x0).__name__}")
        elif x0.shape != x1.shape:
            raise ValueError(f"x0 must have shape {tuple(x1.shape)}, got {tuple(x0.shape)}")
        self._check_dtype("x0", x0)
        loss: Tensor = self._run(self._error, x0, x1, context, generator)
        return loss

    def _error(
        self, x0: Tensor, x1: Tensor, context: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean squared error of the velocity between base and data."""
        matcher: Any = self.coupling
        if context is not None and hasattr(matcher, "guided_sample_location_and_conditional_flow"):
            s, xs, us, _, context = matcher.guided_sample_location_and_conditional_flow(
                x0, x1, y1=context, generator=generator
            )
        else:
            s, xs, us = matcher.sample_location_and_conditional_flow(x0, x1, generator=generator)
        if context is not None and self.training and self.context_dropout:
            draw = uniform_like(x1, (len(x1), 1), generator, torch.float32)
            context = torch.where(draw < self.context_dropout, self._null(), context)
        field = self._network()
        if isinstance(field, VectorFieldMLP):  # which has the gradients from one pass
            ahead = torch.rsub(s, 1)  # shorter than 1 - s
            return field.squared_error(ahead, self._state(xs), self._state(-us), context)
        return mse_loss(self._field(s, xs, context), -us)


def _matcher(coupling: object) -> ConditionalFlowMatcher:
    """Return the matcher of a name, or the user's."""
    if isinstance(coupling, ConditionalFlowMatcher):
        return coupling
    if not isinstance(coupling, str):
        raise TypeError(
            f"coupling must be a name or a matcher of transport, got {type(coupling).__name__}"
        )
    return _COUPLINGS[check_choice("coupling", coupling, _COUPLINGS)]()
