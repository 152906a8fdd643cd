"""A bridge as its two networks: drifts, velocity and score, paths, and the density along the probability flow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyflowkern import ode, ops
from pyflowkern.core.checks import (
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_generator,
    check_number,
    is_integer,
)
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.nn import VectorField, VectorFieldConv, VectorFieldMLP
from pyflowkern.ode.solve import warn_unless_ok
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_time import TIMES
from pyflowkern.ops.philox import draw_seed
from pyflowkern.transport._arguments import positive
from pyflowkern.transport._bridge_steps import walk

__all__ = ["BridgeFields", "Density"]

#: The most dimensions of which the trace is exact.
EXACT_UP_TO = 64
#: What the forward drift, the backward one, the velocity and the score times sigma^2 are of the two networks.
OF_VELOCITY_AND_SCORE = {
    "forward": (1.0, 1.0),
    "backward": (1.0, -1.0),
    "velocity": (1.0, 0.0),
    "score": (0.0, 2.0),
}
OF_DRIFTS = {
    "forward": (1.0, 0.0),
    "backward": (0.0, 1.0),
    "velocity": (0.5, 0.5),
    "score": (1.0, -1.0),
}


class HasLogProb(Protocol):
    """A distribution of torch's, or a flow."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log-densities ``[N]``."""


Density = HasLogProb | Callable[[Tensor], Tensor]


class BridgeFields(nn.Module):
    """The networks of a :class:`SchrodingerBridge`, and what is computed from them."""

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        sigma: float,
        of_drifts: bool,
        times: Sequence[float],
        hidden: Sequence[int],
        activation: str,
        time: str,
        network: Callable[[int], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.event_shape = _shape(event_shape)
        self.dims = math.prod(self.event_shape)
        self.sigma = positive("sigma", sigma)
        self.times = _times(times)
        self._mixes = OF_DRIFTS if of_drifts else OF_VELOCITY_AND_SCORE
        if network is None and len(self.event_shape) not in (1, 3):
            raise ValueError(
                f"event_shape must be D or (C, H, W) unless network is given, got {self.event_shape}"
            )
        check_choice(
            "activation", activation, ACTIVATIONS
        )  # also where a network has no use for it
        check_choice("time", time, TIMES)
        if network is not None and not callable(network):
            raise TypeError(f"network must make a module of a size, got {type(network).__name__}")

        def make() -> nn.Module:
            if network is None:
                kind = VectorFieldMLP if len(self.event_shape) == 1 else VectorFieldConv
                return _silent(kind(self.event_shape[0], hidden, activation, time))
            made = network(self.event_shape[0])
            return made if hasattr(made, "velocity_and_divergence") else VectorField(made)

        self.networks = nn.ModuleList([make(), make()])

    # --- fields -----------------------------------------------------------------------------------

    def drift(self, t: Tensor | float, x: Tensor, *, backward: bool = False) -> Tensor:
        r"""Return the drift :math:`u` of :math:`dX = u\,dt + \sigma\,dW`, ``[N, *shape]``.

        With ``backward`` it is that of the process run backward, :math:`u - \sigma^2 \nabla \log p_t`: from late to
        early times it takes steps :math:`x - u\,dt + \sigma\sqrt{dt}\,z`.

        Args:
            t: a number, a scalar tensor or ``[N]``.
            x: ``[N, *shape]``.
            backward: which.

        Raises:
            TypeError: for another dtype than that of the networks.
            ValueError: for another shape.
        """
        self._check("x", x)
        return self._mixed("backward" if check_flag("backward", backward) else "forward", t, x)

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the velocity of the ODE with the same marginals, :math:`u - \tfrac12 \sigma^2 \nabla \log p_t`."""
        self._check("x", x)
        return self._mixed("velocity", t, x)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla \log p_t(x)`, ``[N, *shape]``."""
        self._check("x", x)
        return self._mixed("score", t, x) / self.sigma**2

    def _mixed(self, kind: str, t: Tensor | float, x: Tensor) -> Tensor:
        parts = [
            net(t, x) if weight == 1 else weight * net(t, x)
            for net, weight in zip(self.networks, self._mixes[kind], strict=True)
            if weight
        ]
        mixed: Tensor = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return mixed

    def _check(self, name: str, x: Tensor) -> None:
        check_floating(name, x)
        if tuple(x.shape[1:]) != self.event_shape or x.dim() != len(self.event_shape) + 1:
            wanted = ", ".join(map(str, ("N", *self.event_shape)))
            raise ValueError(f"{name} must have shape [{wanted}], got {tuple(x.shape)}")
        if (own := next(self.networks.parameters(), None)) is not None:
            check_dtype(name, x, own.dtype, "bridge")

    def _span(
        self, start: float | None, end: float | None, backward: bool | None
    ) -> tuple[float, float]:
        """Return the times at which a run begins and ends, checked; ``backward`` is None where any order will do."""
        first, last = self.times[0], self.times[-1]
        ends = [last, first] if backward else [first, last]
        for i, (name, given) in enumerate((("start", start), ("end", end))):
            if given is not None:
                ends[i] = check_number(name, given)
                if not first <= ends[i] <= last:
                    raise ValueError(f"{name} must be between {first} and {last}, got {given}")
        if ends[0] == ends[1]:
            raise ValueError(f"start and end must differ, both are {ends[0]}")
        if backward is not None and (ends[0] > ends[1]) != backward:
            order = (
                "after end with backward=True" if backward else "before end with backward=False"
            )
            raise ValueError(f"start must be {order}, got {ends[0]} and {ends[1]}")
        return ends[0], ends[1]

    # --- paths ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        x0: Tensor,
        steps: int = 100,
        *,
        backward: bool = False,
        heun: bool = False,
        start: float | None = None,
        end: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Draw paths of the SDE from the first time to the last, or ``backward``, by Euler and Maruyama's steps.

        Args:
            x0: where the paths begin, ``[N, *shape]``: at the time ``start``.
            steps: how many, of equal length.
            backward: the direction.
            heun: take the mean of the drifts at both ends of a step, which has weak order 2 at twice the cost.
            start: the time at which the paths begin; the first, or the last if ``backward``, if None.
            end: the time at which they end; the other one if None.
            generator: the source of the seed of all random numbers, on any device.  They depend on it and on their
                place alone: see :func:`pyflowkern.ops.euler_maruyama`.

        Returns:
            ``[steps + 1, N, *shape]``, in the order of the run: ``x0`` is first.

        Raises:
            TypeError: for steps that are no int, flags that are no bools, a wrong generator or dtype.
            ValueError: for less than one step, another shape, times outside of the bridge, and times in the other
                order than ``backward`` says.
        """
        self._check("x0", x0)
        steps = check_count("steps", steps)
        check_flag("heun", heun)
        check_generator(generator)
        times = equal_times(*self._span(start, end, check_flag("backward", backward)), steps)
        drift = partial(self.drift, backward=backward)
        seed = draw_seed(None, generator, x0.device)
        path = x0.new_empty(steps + 1, *x0.shape)  # a list of points would take as much again
        path[0] = x0
        for k, x in enumerate(walk(drift, x0, times, self.sigma, seed, heun=heun)):
            path[k + 1] = x
        return path

    def flow_map(
        self,
        x: Tensor,
        *,
        backward: bool = False,
        start: float | None = None,
        end: float | None = None,
        **solver: Any,
    ) -> Tensor:
        """Return where the probability flow takes points ``[N, *shape]`` from one time to another.

        Args:
            x: points at the time ``start``.
            backward: the direction.
            start: as in :meth:`sample`.
            end: as in :meth:`sample`.
            **solver: settings of :func:`pyflowkern.ode.solve`; ``rtol`` and ``atol`` are 1e-5 by default.

        Raises:
            TypeError, ValueError: as :meth:`sample`.
        """
        self._check("x", x)
        ends = self._span(start, end, check_flag("backward", backward))
        settings = {"rtol": 1e-5, "atol": 1e-5} | solver
        out = ode.solve(self.velocity, x, list(ends), **settings)
        warn_unless_ok(out.status)
        return out.ys[-1]  # type: ignore[no-any-return]

    def log_prob(
        self,
        x: Tensor,
        base: Density,
        *,
        divergence: str = "auto",
        start: float | None = None,
        end: float | None = None,
        generator: torch.Generator | None = None,
        **solver: Any,
    ) -> Tensor:
        r"""Return the log-density at the last time, ``[N]``, given that at the first.

        .. math:: \log p_1(x) = \log p_0(x_0) - \int \operatorname{div} v(t, x_t)\,dt

        along the probability flow, which ends at ``x``.  It is that of the SDE where the networks are exact.  Times 0
        and 1 may be any two of the bridge, ``start`` and ``end``, in either order.

        Args:
            x: ``[N, *shape]``.
            base: the log-density :math:`\log p_0`: a distribution or flow with ``log_prob``, or a function.
            divergence: "exact", "hutchinson", or "auto": exact up to 64 dimensions.
            start: the time of ``base``; the first if None.
            end: the time of ``x``; the last if None.
            generator: source of the probe of "hutchinson"; always the same probe if None.
            **solver: as in :meth:`flow_map`.

        Raises:
            TypeError: for a base that is neither, or another dtype.
            ValueError: for another shape, an unknown divergence, times that are equal or outside of the bridge, and a
                base whose log-densities are not one for each sample.
        """
        self._check("x", x)
        span = self._span(start, end, None)
        check_generator(generator)
        if divergence not in ("auto", "exact", "hutchinson"):
            raise ValueError(
                f"divergence must be 'auto', 'exact' or 'hutchinson', got {divergence!r}"
            )
        density = getattr(base, "log_prob", base)
        if not callable(density):
            raise TypeError(f"base must be a distribution or callable, got {type(base).__name__}")
        exact = divergence == "exact" or (divergence == "auto" and self.dims <= EXACT_UP_TO)
        options: dict[str, Any] = {"method": "exact"}
        if not exact:
            seed = 0 if generator is None else None
            options = {"probe": ops.draw_probe(x, seed=seed, generator=generator)}

        def slopes(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            pairs = [
                (w, net.velocity_and_divergence(t, state[0], **options))  # type: ignore[operator]
                for net, w in zip(self.networks, self._mixes["velocity"], strict=True)
                if w
            ]
            return tuple(sum(w * pair[i] for w, pair in pairs) for i in (0, 1))

        zero = x.new_zeros(len(x), dtype=accumulation_dtype(x.dtype))
        settings = {"rtol": 1e-5, "atol": 1e-5} | solver
        out = ode.solve(slopes, (x, zero), list(span[::-1]), **settings)
        warn_unless_ok(out.status)
        first, change = (y[-1] for y in out.ys)
        log_prob = density(first)
        if not isinstance(log_prob, Tensor) or log_prob.shape != change.shape:
            shape = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else log_prob
            raise ValueError(
                f"base must return a log-density for each sample, shape ({len(x)},), got {shape}"
            )
        total: Tensor = log_prob + change
        return total

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.event_shape}, sigma={self.sigma}, times={self.times}"


def equal_times(start: float, end: float, steps: int) -> list[float]:
    """Return ``steps + 1`` equal times, exact at both ends."""
    return [start + (end - start) * k / steps for k in range(steps)] + [end]


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if is_integer(shape) else tuple(shape) if isinstance(shape, Sequence) else ()
    if not sizes or not all(is_integer(n) and n >= 1 for n in sizes):
        raise ValueError(
            f"event_shape must be a dimension D or a shape of positive ints, got {shape!r}"
        )
    return tuple(int(n) for n in sizes)


def _times(times: Sequence[float]) -> tuple[float, ...]:
    if isinstance(times, (str, Tensor)) or not isinstance(times, Sequence):
        raise TypeError(f"times must be a sequence of numbers, got {type(times).__name__}")
    numbers = tuple(check_number("times", t) for t in times)
    rising = all(a < b for a, b in itertools.pairwise(numbers))
    if len(numbers) < 2 or not rising or not all(map(math.isfinite, numbers)):
        raise ValueError(f"times must be two or more finite numbers that rise, got {list(times)}")
    return numbers


def _silent(field: VectorFieldMLP | VectorFieldConv) -> nn.Module:
    """Return a field whose last layer is zero: the bridge begins as Brownian motion."""
    with torch.no_grad():
        for parameter in (*field.layers[-1].parameters(), *list(field.times)[-1:]):
            parameter.zero_()
    return field
