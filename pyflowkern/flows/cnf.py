"""Continuous normalizing flows: densities that follow an ordinary differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern import ode, ops
from pyflowkern.flows._base import Flow
from pyflowkern.flows._build import check_positive, parse_shape
from pyflowkern.nn import Bijection, Sequential, VectorFieldMLP
from pyflowkern.ops._registry import accumulation_dtype

__all__ = ["CNF", "FFJORD", "ContinuousBijection", "ContinuousTerms"]

DIVERGENCES = ("hutchinson", "exact")


class ContinuousTerms(NamedTuple):
    r"""What a pass through a continuous flow tells of every sample, each ``[N]``.

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


@dataclass(frozen=True)
class _Way:
    """A solve: where it went, the log-determinants of each probe ``[N, K]``, the regularizers (else 0)."""

    end: Tensor
    log_det: Tensor
    kinetic: Tensor
    jacobian: Tensor


class ContinuousBijection(Bijection):
    r"""The map along :math:`dx/dt = f(t, x)` from ``t = 0`` to ``T``.

    Its log-determinant obeys :math:`d \log\det / dt = \operatorname{div} f` and is integrated with
    the state.  The probe of the divergence is drawn once a call and fixed over the solve.

    Args:
        field: with ``velocity_and_divergence(t, x, ...)``, as :class:`~pyflowkern.nn.VectorFieldMLP`
            or :class:`~pyflowkern.nn.VectorField` have it.
        duration: ``T``, positive.
        divergence: "hutchinson" or "exact".
        probes: ``K`` for "hutchinson".
        noise: "rademacher" or "gaussian".
        **solver: settings of :func:`pyflowkern.ode.odeint`.

    Raises:
        TypeError: for a field without a divergence.
        ValueError: for a duration that is not positive, unknown names, or probes below 1.

    Source: Chen et al. 2018, *Neural ordinary differential equations*; Grathwohl et al. 2019.

    Example:
        >>> import torch
        >>> from pyflowkern import flows, nn
        >>> flow = flows.ContinuousBijection(nn.VectorFieldMLP(2), method="rk4", step_size=0.1)
        >>> x = torch.randn(5, 2)
        >>> z, log_det = flow(x)
        >>> bool(torch.allclose(flow.inverse(z)[0], x, atol=1e-4)), tuple(log_det.shape)
        (True, (5,))
    """

    def __init__(
        self,
        field: torch.nn.Module,
        *,
        duration: float = 1.0,
        divergence: str = "hutchinson",
        probes: int = 1,
        noise: str = "rademacher",
        **solver: Any,
    ) -> None:
        super().__init__()
        if not hasattr(field, "velocity_and_divergence"):
            raise TypeError(
                f"field must have velocity_and_divergence, got {type(field).__name__}; "
                "nn.VectorField(net) gives it to any network"
            )
        if not 0 < duration < math.inf:
            raise ValueError(f"duration must be positive and finite, got {duration}")
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be 'hutchinson' or 'exact', got {divergence!r}")
        if noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")
        check_positive(probes=probes)
        self.field, self.duration, self.divergence = field, float(duration), divergence
        self.probes, self.noise = probes, noise
        self.solver = solver

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Go from data to latent; return ``(z, log_det[N])``."""
        way = self.way(x)
        return way.end, way.log_det.mean(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Go from latent to data; return ``(x, log_det[N])``."""
        way = self.way(z, backwards=True)
        return way.end, way.log_det.mean(1)

    def way(
        self,
        x: Tensor,
        *,
        backwards: bool = False,
        probes: int | None = None,
        regularizers: bool = False,
        generator: torch.Generator | None = None,
    ) -> _Way:
        """Integrate the state, the log-determinant of every probe, and the regularizers."""
        exact = self.divergence == "exact"
        count = 1 if exact else (self.probes if probes is None else probes)
        check_positive(probes=count)
        options: dict[str, Any] = {"method": self.divergence, "regularizers": regularizers}
        if not exact:
            drawn = ops.draw_probe(x, probes=count, kind=self.noise, generator=generator)
            options |= {"probe": drawn, "probes": count, "per_probe": True}

        def dynamics(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            velocity, divergence, *rest = self.field.velocity_and_divergence(  # type: ignore[operator]
                t, state[0], **options
            )
            return (
                velocity,
                divergence.t() if divergence.dim() == 2 else divergence[:, None],
                *rest,
            )

        # a solve ends for all where one state is not finite: such samples take part as zeros
        bad = ~torch.isfinite(x).all(1, keepdim=True)
        x = x.masked_fill(bad, 0.0)
        zero = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))
        start = (x, zero[:, None].expand(-1, count).contiguous(), *[zero] * (2 * regularizers))
        times = [self.duration, 0.0] if backwards else [0.0, self.duration]
        settings = {"rtol": 1e-5, "atol": 1e-5, "params": tuple(self.field.parameters())}
        end = [s[-1] for s in ode.odeint(dynamics, start, times, **(settings | self.solver))]
        end = [s.masked_fill(bad if s.dim() > 1 else bad[:, 0], math.nan) for s in end]
        return _Way(end[0], end[1], *(end[2:] if regularizers else (zero, zero)))

    @torch.no_grad()
    def trajectory(self, x: Tensor, times: Sequence[float]) -> Tensor:
        """Return the states ``[T, N, D]`` at monotone times, the first being that of ``x``."""
        settings: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} | self.solver
        path: Tensor = ode.odeint(self.field, x, list(times), **settings)
        return path


class CNF(Flow):
    r"""A continuous normalizing flow: :math:`\log p(x) = \log p_Z(z(T)) + \int_0^T \operatorname{div} f\,dt`.

    ``forward`` integrates from data at ``t = 0`` to the latent at ``T``.  Velocity, divergence and
    the terms that RNODE penalizes come from one fused evaluation of the field.

    Args:
        event_shape: a dimension ``D``, or a shape whose events are flattened.
        hidden: widths of the field's hidden layers.
        activation: of the field: "tanh", "softplus", "silu" or "gelu".
        time: how time enters the field: "none", "concat" or "concatsquash".
        blocks: fields one after another, each over ``[0, T]``.
        field: makes the field of a block from ``D``, in place of the perceptron.
        duration: ``T``.
        divergence: "hutchinson", or "exact", which costs no more with at most two hidden layers.
        probes: ``K`` probes of Hutchinson's estimator, averaged.
        noise: "rademacher" or "gaussian".
        bits: bits a pixel of uint8 data (see :class:`Flow`); None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        **solver: settings of :func:`pyflowkern.ode.odeint`, such as ``method``, ``rtol``, ``atol``
            (1e-5 both), ``step_size``, ``adjoint``.

    Raises:
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
        activation: str = "tanh",
        time: str = "concat",
        blocks: int = 1,
        field: Callable[[int], torch.nn.Module] | None = None,
        duration: float = 1.0,
        divergence: str = "hutchinson",
        probes: int = 1,
        noise: str = "rademacher",
        bits: int | None = None,
        alpha: float = 0.05,
        **solver: Any,
    ) -> None:
        shape = parse_shape(event_shape)
        check_positive(blocks=blocks)
        dims = math.prod(shape)

        def block() -> ContinuousBijection:
            made = field(dims) if field else VectorFieldMLP(dims, hidden, activation, time)
            return ContinuousBijection(
                made,
                duration=duration,
                divergence=divergence,
                probes=probes,
                noise=noise,
                **solver,
            )

        layers = [block() for _ in range(blocks)]
        flat = [_Flatten(shape)] if len(shape) > 1 else []
        super().__init__(Sequential(*flat, *layers), shape, bits=bits, alpha=alpha)

    def blocks(self) -> Iterator[ContinuousBijection]:
        """Yield the continuous parts in order."""
        for layer in self.bijection:  # type: ignore[attr-defined]
            if isinstance(layer, ContinuousBijection):
                yield layer

    def terms(
        self,
        x: Tensor,
        *,
        probes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ContinuousTerms:
        """Return log-density, its standard error and the regularizers from one pass.

        Args:
            x: ``[N, *event_shape]``.
            probes: ``K``, in place of the flow's own.
            generator: source of the probes.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or probes below 1.
        """
        self._check_data("x", x)
        z, before = x, None
        if self.preprocess is not None:
            z, before = self.preprocess(x)
        z = z.flatten(1).to(self._anchor)
        log_dets: Tensor | None = None
        kinetic = jacobian = z.new_zeros(z.shape[0], dtype=accumulation_dtype(z.dtype))
        for block in self.blocks():
            way = block.way(z, probes=probes, regularizers=True, generator=generator)
            z = way.end
            log_dets = way.log_det if log_dets is None else log_dets + way.log_det
            kinetic, jacobian = kinetic + way.kinetic, jacobian + way.jacobian
        assert log_dets is not None
        log_prob = self.base.log_prob(z) + log_dets.mean(1)  # type: ignore[operator]
        log_prob = log_prob if before is None else log_prob + before
        error = torch.zeros_like(log_prob)
        if next(self.blocks()).divergence != "exact":
            count = log_dets.shape[1]
            spread = log_dets.detach().std(1) if count > 1 else torch.full_like(error, math.nan)
            error = spread / count**0.5
        return ContinuousTerms(log_prob, error, kinetic, jacobian)


class FFJORD(CNF):
    """FFJORD: a CNF with concatsquash layers and Hutchinson's estimator, in one or more blocks.

    Args:
        event_shape: a dimension ``D``, or a shape whose events are flattened.
        hidden: widths of the hidden layers of a field.
        blocks: fields one after another.
        **options: of :class:`CNF`.

    Source: Grathwohl et al. 2019, *FFJORD: Free-form Continuous Dynamics for Scalable Reversible
    Generative Models*.

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.FFJORD(6, hidden=(60, 60, 60), blocks=2, method="rk4", step_size=0.5)
        >>> tuple(flow.log_prob(torch.randn(4, 6)).shape)
        (4,)
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
