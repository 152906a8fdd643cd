"""Continuous normalizing flows: densities that follow an ordinary differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyflowkern.core.checks import check_choice, check_count
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.flows._arguments import check_counts, parse_shape, plain_ints
from pyflowkern.flows._base import Flow
from pyflowkern.flows._build import check_space, squeezed
from pyflowkern.flows._continuous import ContinuousBijection, Integrals, without_log_det
from pyflowkern.flows._domain import without_density
from pyflowkern.nn import (
    Bijection,
    MultiScale,
    Sequential,
    Split,
    Squeeze,
    VectorFieldConv,
    VectorFieldMLP,
    VectorFieldUNet,
)
from pyflowkern.nn.multiscale import run_through
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_time import TIMES

__all__ = ["CNF", "FFJORD", "ContinuousTerms"]


class ContinuousTerms(NamedTuple):
    r"""The results of one pass through a continuous flow for every sample, each ``[N]``.

    Attributes:
        log_prob: log-density in nats.
        standard_error: of ``log_prob`` over the probes; zero for the exact trace, NaN for one probe.
        kinetic: :math:`\int |f|^2 dt`.
        jacobian: :math:`\int |J e|^2 dt`, for the exact trace :math:`\int \|J\|_F^2 dt`.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.CNF(2, hidden=(8,), divergence="exact", method="rk4", step_size=0.5)
        >>> flow.terms(torch.zeros(3, 2)).standard_error.tolist()
        [0.0, 0.0, 0.0]
    """

    log_prob: Tensor
    standard_error: Tensor
    kinetic: Tensor
    jacobian: Tensor


class CNF(Flow):
    r"""A continuous normalizing flow: :math:`\log p(x) = \log p_Z(z(T)) + \int_0^T \operatorname{div} f\,dt`.

    ``forward`` integrates from data at ``t = 0`` to the latent at ``T``.  Velocity, divergence and
    the terms that RNODE penalizes come from one fused evaluation of the field.
    A sample that cannot be integrated gets NaN, with a warning; the others are not affected.

    Args:
        event_shape: a dimension ``D``, or a shape ``(C, *space)``.
        hidden: widths of the field's hidden layers, or of the levels of a U-Net.
        activation: of the field: "tanh", "softplus", "silu" or "gelu"; None for "tanh", of a U-Net "silu".
        time: how time enters the field: "none", "concat" or "concatsquash"; a U-Net has its own way.
        blocks: fields one after another, each over ``[0, T]``; of images before and after each
            squeeze.
        levels: of images ``(C, H, W)``: each level but the last ends with a squeeze, and half of
            its channels become latents; ``2 ** (levels - 1)`` must divide both sizes.
        conv: convolutional fields on images (:class:`~pyflowkern.nn.VectorFieldConv`), by default
            if ``levels`` is given; "unet" for U-Nets (:class:`~pyflowkern.nn.VectorFieldUNet`); else events
            are flattened.
        field: makes the field of a block from ``D``, or from its channels with ``conv``, in place
            of the perceptron or the convolutions.  Samples need the velocity alone: its ``forward``
            gives it, unless its class overrides ``velocity_and_divergence`` alone.
        duration: ``T``.
        train_time: learn ``T`` of every block, starting from ``duration``; step sizes are then
            fractions of ``T``.
        divergence: "hutchinson", or "exact", which costs no more with at most two hidden layers.
        eval_divergence: the same in eval mode, where two calls return the same: "auto" for exact
            traces of up to 64 dimensions and a fixed probe beyond, "exact", "fixed", or "hutchinson"
            for a new probe at each call (see :class:`ContinuousBijection`).
        probes: ``K`` probes of Hutchinson's estimator, averaged.
        noise: "rademacher" or "gaussian".
        bits: bits a pixel of uint8 data (see :class:`Flow`); None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        context_features: size ``K`` of the context ``[N, K]``, an input of every layer of the fields;
            0 for an unconditional flow.
        base: the latent's distribution (see :class:`Flow`); None for the standard normal.
        **solver: settings of :func:`pyflowkern.ode.odeint`, such as ``method``, ``rtol``, ``atol``
            (1e-5 both), ``step_size``, ``adjoint``.

    Raises:
        TypeError: for a setting that neither the flow nor the solver has.
        ValueError: for sizes below 1 and unknown names.

    Source: Chen et al. 2018, *Neural ordinary differential equations*; Finlay et al. 2020, *How to
    train your neural ODE* (RNODE).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.CNF(2, hidden=(16, 16), divergence="exact", method="rk4", step_size=0.25)
        >>> terms = flow.terms(torch.randn(8, 2))
        >>> loss = (-terms.log_prob + 0.01 * terms.kinetic + 0.01 * terms.jacobian).mean()
        >>> loss.backward()
        >>> tuple(flow.sample(5).shape)
        (5, 2)
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        *,
        activation: str | None = None,
        time: str = "concat",
        blocks: int = 1,
        levels: int | None = None,
        conv: bool | str | None = None,
        field: Callable[[int], torch.nn.Module] | None = None,
        duration: float = 1.0,
        train_time: bool = False,
        divergence: str = "hutchinson",
        eval_divergence: str = "auto",
        probes: int = 1,
        noise: str = "rademacher",
        bits: int | None = None,
        alpha: float = 0.05,
        context_features: int = 0,
        base: torch.nn.Module | Distribution | None = None,
        **solver: Any,
    ) -> None:
        shape = parse_shape(event_shape)
        kind = _kind_of_field(conv, levels, shape)
        blocks, levels = check_counts(blocks=blocks, levels=1 if levels is None else levels)
        context_features = check_count("context_features", context_features, 0)
        own = _own_maker(kind, plain_ints(hidden), activation, time)
        make = _maker(field, partial(own, context_features=context_features))

        def block(size: int) -> ContinuousBijection:
            return ContinuousBijection(
                _with_context(make(size), context_features),
                duration=duration,
                train_time=train_time,
                divergence=divergence,
                eval_divergence=eval_divergence,
                probes=probes,
                noise=noise,
                **solver,
            )

        def stack(size: int) -> list[Bijection]:
            return [block(size) for _ in range(blocks)]

        if kind is not VectorFieldMLP:
            bijection: Bijection = _image_levels(shape, levels, stack)
        else:
            flat = [_Flatten(shape)] if len(shape) > 1 else []
            bijection = Sequential(*flat, *stack(math.prod(shape)))
        super().__init__(
            bijection,
            shape,
            base=base,
            bits=bits,
            alpha=alpha,
            context_features=context_features,
        )

    def blocks(self) -> Iterator[ContinuousBijection]:
        """Yield the continuous parts in order."""
        for layer in self.bijection.modules():
            if isinstance(layer, ContinuousBijection):
                yield layer

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        with without_log_det():
            return super()._decode(z, context)

    def terms(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        probes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ContinuousTerms:
        """Return log-density, its standard error and the regularizers from one pass.

        Args:
            x: ``[N, *event_shape]``.
            context: ``[N, K]`` for a conditional flow.
            probes: ``K``, in place of the flow's own; in eval mode, too, they are then drawn.
            generator: source of the probes, which are drawn in eval mode, too, where it is given.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, a context that does not fit, or probes below 1.
        """
        x, outside = self._inside_domain(x)
        context = self._context_of(context, x.shape[0])
        before: Tensor | None = None
        if self.preprocess is not None:
            x, before = self._from_pixels(x)
        solves: list[Integrals] = []

        def run(layer: Bijection, x: Tensor) -> tuple[Tensor, Tensor]:
            if not isinstance(layer, ContinuousBijection):
                return layer(x, context)  # type: ignore[no-any-return]
            solve = layer.integrate(
                x, context, probes=probes, regularizers=True, generator=generator
            )
            solves.append(solve)
            return solve.end, solve.log_det.mean(1)

        z, log_det = self._run(run_through, self.bijection, x, run)
        log_prob = self._run(self.base.log_prob, z.flatten(1)) + log_det  # type: ignore[arg-type]
        log_prob = without_density(outside, log_prob if before is None else log_prob + before)
        kinetic = torch.stack([s.kinetic for s in solves]).sum(0)
        jacobian = torch.stack([s.jacobian for s in solves]).sum(0)
        error = torch.zeros_like(log_prob)
        if not solves[0].exact:
            log_dets = torch.stack([s.log_det.detach() for s in solves]).sum(0)
            count = log_dets.shape[1]
            spread = log_dets.std(1) if count > 1 else torch.full_like(error, math.nan)
            error = spread / count**0.5
        return ContinuousTerms(log_prob, error, kinetic, jacobian)


class FFJORD(CNF):
    r"""FFJORD: a CNF with concatsquash layers and Hutchinson's estimator, in one or more blocks.

    A layer of its fields multiplies by a gate of the time, and adds a bias of it:

    .. math:: h' = a\bigl(\sigma(c + t\,u) \circ (W h + b) + t\,v\bigr) .

    With ``levels`` it is FFJORD's multi-scale flow on images: fields of convolutions, then a
    squeeze, fields again, and half of the channels become latents.

    Args:
        event_shape: a dimension ``D``, or a shape ``(C, *space)``.
        hidden: widths of the hidden layers of a field.
        blocks: fields one after another.
        **options: of :class:`CNF`; among them ``eval_divergence``, which decides how the trace is computed in eval
            mode, where two calls return the same.

    Raises:
        TypeError, ValueError: as :class:`CNF`.

    Source: Grathwohl et al. 2019, *FFJORD: Free-form Continuous Dynamics for Scalable Reversible
    Generative Models*.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.FFJORD(6, hidden=(60, 60, 60), blocks=2, method="rk4", step_size=0.5)
        >>> tuple(flow.log_prob(torch.randn(4, 6)).shape)
        (4,)
        >>> solver = {"method": "rk4", "step_size": 0.5}
        >>> flow = flows.FFJORD((1, 4, 4), hidden=(8, 8), levels=2, bits=8, **solver)
        >>> x = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
        >>> flow.bits_per_dim(x).mean().backward()
        >>> [tuple(part.shape) for part in flow.split_latents(flow(x)[0])]
        [(3, 2, 2, 2), (3, 2, 2, 2)]
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        *,
        blocks: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            event_shape, hidden, blocks=blocks, **({"time": "concatsquash"} | options)
        )


def _kind_of_field(
    conv: bool | str | None, levels: int | None, shape: tuple[int, ...]
) -> type[VectorFieldMLP | VectorFieldConv | VectorFieldUNet]:
    """Return the class of the fields; raise where the arguments contradict each other."""
    if conv is not None and not isinstance(conv, (bool, str)):
        raise TypeError(f"conv must be True, False, 'unet' or None, got {type(conv).__name__}")
    if isinstance(conv, str) and conv != "unet":
        raise ValueError(f"conv must be True, False, 'unet' or None, got {conv!r}")
    if levels is not None and conv is False:
        raise ValueError(f"conv=False goes without levels, got levels={levels}")
    if not conv and levels is None:
        return VectorFieldMLP
    if len(shape) != 3:
        raise ValueError(
            f"event_shape must be (C, H, W) for convolutional fields and levels, got {shape}"
        )
    return VectorFieldUNet if conv == "unet" else VectorFieldConv


def _own_maker(
    kind: type[torch.nn.Module], widths: Sequence[int], activation: str | None, time: str
) -> Callable[..., Any]:
    """Return what makes a field of a class; names are checked also where a field has no use for them."""
    if activation is None:
        activation = "silu" if kind is VectorFieldUNet else "tanh"
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("time", time, TIMES)
    if kind is VectorFieldUNet:
        return partial(kind, widths=widths, activation=activation)
    return partial(kind, hidden=widths, activation=activation, time=time)


def _maker(field: Callable[[int], Any] | None, own: Callable[[int], Any]) -> Callable[[int], Any]:
    """Return what makes the field of a block: the user's, if given."""
    if field is not None and not callable(field):
        raise TypeError(f"field must make a field of a size, got {type(field).__name__}")
    return own if field is None else field


def _with_context(field: torch.nn.Module, context_features: int) -> torch.nn.Module:
    """Return the field; raise ValueError unless it takes a context of this size."""
    taken = getattr(field, "context_features", 0)
    if taken != context_features:
        raise ValueError(
            f"field must make fields with context_features={context_features}, got {taken}"
        )
    return field


def _image_levels(
    shape: tuple[int, ...], levels: int, stack: Callable[[int], list[Bijection]]
) -> MultiScale:
    """Return FFJORD's levels: a stack, a squeeze, a stack, a split of the channels; the last is a stack alone."""
    check_space(shape, levels - 1)
    parts: list[Bijection] = []
    splits: list[Split] = []
    event = shape
    for _ in range(levels - 1):
        inside = squeezed(event)
        parts.append(Sequential(*stack(event[0]), Squeeze(), *stack(inside[0])))
        splits.append(Split(inside[0]))
        event = (splits[-1].kept, *inside[1:])
    return MultiScale(shape, [*parts, Sequential(*stack(event[0]))], splits)


class _Flatten(Bijection):
    """Events as vectors."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z.reshape(z.shape[0], *self.shape)
        return x, z.new_zeros(z.shape[0], dtype=accumulation_dtype(z.dtype))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape
