"""A bijection along an ordinary differential equation, and what is integrated along it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ode, ops
from pyflowkern.core.checks import check_batched, check_context, check_count, check_number
from pyflowkern.core.dtypes import accumulation_dtype, autocasts
from pyflowkern.flows._arguments import check_flags
from pyflowkern.flows._rescue import (
    Dynamics,
    check_export,
    guarded,
    rows_like,
    solve_rows,
)
from pyflowkern.nn import Bijection

__all__ = ["ContinuousBijection", "Integrals", "without_log_det"]

#: The most dimensions of which the trace is exact in eval mode by default.
EXACT_UP_TO = 64
_LOG_DET_WANTED = ContextVar("log_det_wanted", default=True)
#: The same for what a compiler is tracing, which cannot follow a context variable.
_traced_without = False


@contextmanager
def without_log_det() -> Iterator[None]:
    """Make inverses integrate the state alone, which is all that samples need; log-determinants are NaN."""
    if torch.compiler.is_compiling():
        global _traced_without
        before, _traced_without = _traced_without, True
        try:
            yield
        finally:
            _traced_without = before
        return
    token = _LOG_DET_WANTED.set(False)
    try:
        yield
    finally:
        _LOG_DET_WANTED.reset(token)


def _log_det_is_wanted() -> bool:
    return not _traced_without if torch.compiler.is_compiling() else _LOG_DET_WANTED.get()


@dataclass(frozen=True)
class Integrals:
    """The end of a solve and the integrals along it.

    Attributes:
        end: the state at the end.
        log_det: log-determinants ``[N, K]``, one for each probe.
        kinetic: first regularizer ``[N]``, or zeros.
        jacobian: second regularizer ``[N]``, or zeros.
        exact: whether the log-determinant has no estimate in it.
    """

    end: Tensor
    log_det: Tensor
    kinetic: Tensor
    jacobian: Tensor
    exact: bool


class ContinuousBijection(Bijection):
    r"""The map along :math:`dx/dt = f(t, x)` from ``t = 0`` to ``T``.

    Its log-determinant obeys :math:`d \log\det / dt = \operatorname{div} f` and is integrated with
    the state.  The probe of Hutchinson's estimator is drawn once a call and fixed over the solve, so
    that each call in training has another log-determinant, right in expectation.  In eval mode two
    calls return the same.  A sample that cannot be integrated is NaN, with a warning, and changes
    nothing in the others.

    Under torch.compile the solve is a graph break: what ``fullgraph=True`` refuses.  torch.export takes
    flows with fixed steps (``method="rk4", step_size=0.1``, say) and ``strict=False``.

    Args:
        field: with ``velocity_and_divergence(t, x, ...)``, as :class:`~pyflowkern.nn.VectorFieldMLP`
            or :class:`~pyflowkern.nn.VectorField` have it; one with ``context_features`` is given the
            ``context``, too.
        duration: ``T``, positive.
        train_time: learn ``T``, starting from ``duration``: the solve is that of
            :math:`dx/ds = T f(sT, x)` over ``[0, 1]``, whose gradient in ``T`` is exact with every
            adjoint, and step sizes are fractions of ``T``.
        divergence: "hutchinson" or "exact".
        eval_divergence: the same in eval mode: "exact"; "fixed" for Hutchinson's estimator with the same
            probe at every call; "hutchinson" for a new one; "auto" for exact traces of up to 64
            dimensions, which cost a product of the Jacobian for each, and a fixed probe beyond.
        probes: ``K`` for "hutchinson".
        noise: "rademacher" or "gaussian".
        **solver: settings of :func:`pyflowkern.ode.solve`.  The default norm of the error is a mean over the batch, in
            which a few samples may be wrong by more than the tolerance; ``norm="max_sample"`` keeps every sample to
            it, for up to twice the evaluations.

    Raises:
        TypeError: for a field without a divergence, or a setting that no solver has.
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
        train_time: bool = False,
        divergence: str = "hutchinson",
        eval_divergence: str = "auto",
        probes: int = 1,
        noise: str = "rademacher",
        **solver: Any,
    ) -> None:
        super().__init__()
        check_flags(train_time=train_time)
        if not hasattr(field, "velocity_and_divergence"):
            raise TypeError(
                f"field must have velocity_and_divergence, got {type(field).__name__}; "
                "nn.VectorField(net) gives it to any network"
            )
        if isinstance(duration, Tensor) and duration.numel() == 1 and not duration.is_complex():
            duration = duration.item()
        duration = check_number("duration", duration)
        if not 0 < duration < math.inf:
            raise ValueError(f"duration must be positive and finite, got {duration}")
        _check_name("divergence", divergence, ("hutchinson", "exact"))
        _check_name("eval_divergence", eval_divergence, ("auto", "exact", "fixed", "hutchinson"))
        _check_name("noise", noise, ("rademacher", "gaussian"))
        _check_solver(solver)
        self.context_features: int = getattr(field, "context_features", 0)
        self.field, self._duration = field, float(duration)
        self.divergence, self.eval_divergence = divergence, eval_divergence
        self.log_duration: torch.nn.Parameter | None = None
        if train_time:
            self.log_duration = torch.nn.Parameter(torch.tensor(math.log(duration)))
        self.probes, self.noise = check_count("probes", probes), noise
        self.solver = solver

    def _needs_no_divergence(self, x: Tensor) -> bool:
        """Whether the field's ``forward`` gives the velocity, so that the state can be integrated alone.

        An inherited ``forward`` does not count where the class has its own ``velocity_and_divergence``: the two
        velocities may differ.  Under autocast they do, as it lowers the precision of a perceptron's ``forward`` only.
        And a norm of the user's may look at the whole state.
        """
        places = [vars(self.field), *map(vars, type(self.field).__mro__)]

        def depth(name: str) -> int:
            return next((i for i, names in enumerate(places) if name in names), len(places))

        pair = depth("velocity_and_divergence")
        same = depth("forward") <= pair < len(places) and not autocasts(x)
        return same and not callable(self.solver.get("norm"))

    @property
    def duration(self) -> Tensor | float:
        """The end ``T`` of the time, a positive scalar tensor where it is learned."""
        return self._duration if self.log_duration is None else self.log_duration.exp()

    def _way_back(self, inverse: bool) -> str:
        return "keep"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Go from data to latent; return ``(z, log_det[N])``."""
        result = self.integrate(x, context)
        return result.end, result.log_det.mean(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Go from latent to data; return ``(x, log_det[N])``."""
        log_det = _log_det_is_wanted() or not self._needs_no_divergence(z)
        result = self.integrate(z, context, backwards=True, log_det=log_det)
        return result.end, result.log_det.mean(1)

    def integrate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        backwards: bool = False,
        log_det: bool = True,
        probes: int | None = None,
        regularizers: bool = False,
        generator: torch.Generator | None = None,
    ) -> Integrals:
        """Integrate the state, the log-determinant of every probe, and the regularizers; or the state alone.

        Probes and a generator that are given are used in eval mode, too, unless ``divergence`` is exact.
        """
        check_batched("z" if backwards else "x", x)
        check_export(self.solver)
        count = self.probes if probes is None else check_count("probes", probes)
        how = self._estimator(x, probes is not None or generator is not None)
        options: dict[str, Any] = {"regularizers": regularizers, "method": "exact"}
        if how == "exact":
            count = 1
        elif log_det:
            drawn = self._draw(x, count, generator, fixed=how == "fixed")
            options |= {"method": "hutchinson", "probe": drawn, "probes": count, "per_probe": True}

        context = self._context_of(x, context)
        bad = _not_finite(x) if context is None else _not_finite(x) | _not_finite(context)
        scale = self.duration if isinstance(self.duration, Tensor) else None
        zero = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))
        changes = zero[:, None].expand(-1, count).contiguous()
        rest = (changes, *[zero] * (2 * regularizers)) if log_det else ()
        times = [0.0, self._duration if scale is None else 1.0]
        times = times[::-1] if backwards else times
        settings = {"rtol": 1e-5, "atol": 1e-5} | self.solver
        if not log_det:
            settings |= {k: _of_state(settings[k]) for k in ("rtol", "atol")}

        def solve(bad: Tensor, alive: Tensor | None = None, **changes: Any) -> ode.Solution:
            given = _zeroed(bad, context)
            own = {"context": given} if self.context_features else {}
            dynamics = self._dynamics(options | own, scale, log_det)
            start = (_zeroed(bad, x), *rest)
            params = [t for t in (given, scale) if t is not None]
            return ode.solve(
                dynamics if alive is None else guarded(dynamics, alive),
                start,
                times,
                **({"params": (*self.field.parameters(), *params)} | settings | changes),
            )

        ys, _ = solve_rows(solve, bad, settings, times)
        end = [y[-1] for y in ys]
        if not log_det:
            return Integrals(end[0], torch.full_like(changes, math.nan), zero, zero, True)
        kinetic, jacobian = end[2:] if regularizers else (zero, zero)
        return Integrals(end[0], end[1], kinetic, jacobian, exact=how == "exact")

    def _estimator(self, x: Tensor, given: bool) -> str:
        """Return how the divergence is computed now: "exact", "hutchinson" or "fixed"."""
        if self.divergence == "exact":
            return "exact"
        if self.training or given:
            return "hutchinson"
        if self.eval_divergence == "auto":
            return "exact" if math.prod(x.shape[1:]) <= EXACT_UP_TO else "fixed"
        return self.eval_divergence

    def _draw(
        self, x: Tensor, count: int, generator: torch.Generator | None, fixed: bool
    ) -> Tensor:
        """Return the probes of a solve, for which a seed may stand."""
        if fixed and self.noise == "rademacher":
            return ops.draw_probe(x, probes=count, seed=0)
        if fixed and not x.is_meta:
            generator = torch.Generator(x.device).manual_seed(0)
        return ops.draw_probe(x, probes=count, kind=self.noise, generator=generator)

    def _dynamics(self, options: dict[str, Any], scale: Tensor | None, log_det: bool) -> Dynamics:
        """Return the slopes of the state, of each probe's log-determinant and of the regularizers."""
        # by position, as in trajectories
        given = [options["context"]] if "context" in options else []

        def dynamics(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not log_det:
                velocity = self.field(t if scale is None else t * scale, state[0], *given)
                return (velocity if scale is None else scale * velocity,)
            velocity, divergence, *rest = self.field.velocity_and_divergence(  # type: ignore[operator]
                t if scale is None else t * scale, state[0], **options
            )
            divergence = divergence.t() if divergence.dim() == 2 else divergence[:, None]
            slopes = (velocity, divergence, *rest)
            return slopes if scale is None else tuple(scale * slope for slope in slopes)

        return dynamics

    def _context_of(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Return the context if the field takes one; raise where it does not fit."""
        if not self.context_features:
            return None
        check_context(context, self.context_features, x)
        return context

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, times: Sequence[float], context: Tensor | None = None
    ) -> Tensor:
        """Return the states ``[T, N, ...]`` at monotone times, the first being that of ``x``."""
        check_batched("x", x)
        check_export(self.solver)
        settings: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} | self.solver
        context = self._context_of(x, context)
        bad = _not_finite(x) if context is None else _not_finite(x) | _not_finite(context)

        def solve(bad: Tensor, alive: Tensor | None = None, **changes: Any) -> ode.Solution:
            given = () if context is None else (_zeroed(bad, context),)

            def dynamics(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self.field(t, state[0], *given),)

            field = dynamics if alive is None else guarded(dynamics, alive)
            return ode.solve(field, (_zeroed(bad, x),), list(times), **(settings | changes))

        states: list[Tensor] = solve_rows(solve, bad, settings, list(times))[0]
        return states[0]


def _check_name(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(map(repr, known[:-1]))
        raise ValueError(f"{name} must be {listed} or {known[-1]!r}, got {value!r}")


def _of_state(value: Any) -> Any:
    """Return the tolerance of the state: the first, if each integrated quantity has its own."""
    return value[0] if isinstance(value, (tuple, list)) else value


def _check_solver(settings: Mapping[str, Any]) -> None:
    """Raise unless a solve takes the settings."""
    known = set(inspect.signature(ode.solve).parameters) - {"func", "y0", "t"}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an argument of the flow nor a setting of "
            f"pyflowkern.ode.solve, which are {', '.join(sorted(known))}"
        )
    # tuples of tolerances are checked by the call: regularizers make the state longer
    rest = {
        k: v for k, v in settings.items() if not isinstance(v, (tuple, list)) and k != "params"
    }
    with torch.no_grad(), torch.device("cpu"):  # a solve of length 0 checks its settings
        ode.solve(lambda t, y: y, (torch.zeros(1, 1),), [0.0, 0.0], **rest)


def _not_finite(x: Tensor) -> Tensor:
    return ~torch.isfinite(x).flatten(1).all(1)


def _zeroed(bad: Tensor, x: Any) -> Any:
    """Return ``x`` with zeros for the bad samples; None stays None."""
    return None if x is None else x.masked_fill(rows_like(bad, x), 0.0)
