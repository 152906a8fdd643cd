"""Solves that end at an event: where a function of time and state changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.first_derivative import once_differentiable
from pyflowkern.ode.fields import packed_field
from pyflowkern.ode.jumps import jump_times, stretches
from pyflowkern.ode.loops.adaptive import Stop
from pyflowkern.ode.loops.adaptive import integrate as integrate_adaptive
from pyflowkern.ode.options import Options, options_for
from pyflowkern.ode.packing import Field, Packing
from pyflowkern.ode.solution import Status, Trajectory
from pyflowkern.ode.solve import solve, warn_unless_ok
from pyflowkern.ode.steppers import Stepper
from pyflowkern.ode.times import number

__all__ = ["solve_until"]

#: Settings of a solve that also apply to the search for the event.
_SEARCH_SETTINGS = frozenset(
    [
        "method",
        "rtol",
        "atol",
        "norm",
        "step_size",
        "first_step",
        "min_step",
        "max_step",
        "max_steps",
        "compat",
    ]
)

_ONE_DERIVATIVE = "the time and the state of an event have first derivatives only"


def solve_until(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    event_fn: Callable[..., Tensor],
    *,
    reverse_time: bool = False,
    max_time: float = 1e6,
    jump_t: Tensor | Sequence[float] | None = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Integrate until an event; :func:`pyflowkern.ode.odeint_event` documents it.

    Args:
        func: field.
        y0: state.
        t0: start, 0-d.
        event_fn: ``(t, y) -> g``.
        reverse_time: integrate towards smaller times.
        max_time: length of the longest search.
        jump_t: as in :func:`solve`.
        **settings: of :func:`solve`.
    """
    if not callable(event_fn):
        raise TypeError(f"event_fn must be callable, got {type(event_fn).__name__}")
    if not 0 < max_time < math.inf:
        raise ValueError(f"max_time must be positive and finite, got {max_time}")
    packing = Packing(y0, False)
    start = packing.pack(y0).detach().contiguous()
    search: dict[str, Any] = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9}
    search |= {k: v for k, v in settings.items() if k in _SEARCH_SETTINGS}
    options = options_for(packing, start.device, dense=True, **search)
    if not options.adaptive and options.step_size is None:
        raise ValueError(
            "method must have step control or come with a step_size, got "
            f"{settings.get('method', 'dopri5')!r}"
        )
    begin = number(t0)
    far = begin - max_time if reverse_time else begin + max_time

    def event(t: Tensor, y: Tensor) -> Tensor:
        return event_fn(t, packing.unpack(y))

    field = packed_field(func, packing)
    crossing = _search(field, event, start, (begin, far), options, jump_times(jump_t))
    times = torch.stack(
        [t0.reshape(()).double(), t0.new_tensor(crossing.time, dtype=torch.float64)]
    )
    solved = solve(func, y0, times, jump_t=jump_t, **settings)
    failed = crossing.status not in (Status.ok, Status.no_event)
    warn_unless_ok(crossing.status if failed else solved.status)
    if crossing.status == Status.ok and not crossing.discontinuous:
        return _correct(field, event_fn, times[1], solved.ys, packing)
    if crossing.status == Status.no_event:
        warn_unless_ok(crossing.status)
    return times[1], solved.ys


@dataclass(frozen=True)
class _Event:
    """The result of a search.

    Args:
        time: of the event, or the last time reached.
        status: ok if there was an event.
        discontinuous: the event function jumps there; it has no zero for a Newton step, and no derivative.
    """

    time: float
    status: Status
    discontinuous: bool = False


@torch.no_grad()
def _search(
    field: Field,
    event: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    span: tuple[float, float],
    options: Options,
    jumps: Sequence[float],
) -> _Event:
    """Integrate until an accepted step contains a change of sign, and bisect within that step.

    Args:
        field: of packed states.
        event: ``(t, packed state) -> g``; the first component to change its sign ends the search.
        y0: first state.
        span: first time, and the time at which the search gives up.
        options: settings of the search.
        jumps: times at which the field is discontinuous.
    """
    events: list[_Event] = []

    def at(t: float, y: Tensor) -> Tensor:
        return event(torch.full((), t, dtype=y.dtype, device=y.device), y)

    signs = torch.sign(at(span[0], y0))

    def least(
        t: float, y: Tensor
    ) -> float:  # positive as long as no component has changed its sign
        return float((at(t, y) * signs).min())

    def stop(stepper: Stepper, t: float, dt: float, y: Tensor, y1: Tensor) -> bool:
        nonlocal signs
        # a component that starts at zero takes its sign from the first step
        if bool((signs == 0).any()):
            new = torch.sign(at(t + dt, y1))
            signs = torch.where(signs == 0, new, signs)
        after = least(t + dt, y1)
        if after > 0:
            return False
        first = before = least(t, y)
        low, high = 0.0, 1.0
        for _ in range(60):  # more halvings than a float64 fraction has bits
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            value = least(t + middle * dt, stepper.dense(y, dt, middle))
            if value > 0:
                low, before = middle, value
            else:
                high, after = middle, value
        # a continuous event function changes by rounding only between two adjacent times
        discontinuous = before - after > 1e-3 * max(abs(first), abs(after))
        events.append(_Event(t + high * dt, Status.ok, discontinuous))
        return True

    integrate = integrate_adaptive if options.adaptive else _fixed_steps
    y = y0
    for part in stretches(span, jumps, y0):
        times = (part.times[0], part.times[-1])
        out = integrate(part.field(field) if jumps else field, y, times, options, stop=stop)
        if events:
            return events[0]
        if out.status != Status.ok:
            assert isinstance(out.status, Status)
            assert out.end is not None
            return _Event(out.end, out.status)
        y = out.ys[-1]
    return _Event(span[1], Status.no_event)


def _fixed_steps(
    field: Field, y0: Tensor, times: tuple[float, float], options: Options, *, stop: Stop
) -> Trajectory:
    """Take steps of one length until ``stop`` returns true, as the loop of adaptive steps does."""
    out = Trajectory(y0[None], end=times[0])
    assert options.step_size is not None
    begin, far = times
    dt = math.copysign(options.step_size, far - begin)
    stepper = Stepper(field, options.method, y0)
    stepper.start(begin, y0)
    y = y0
    for n in range(options.max_steps):
        t, t1 = begin + n * dt, begin + (n + 1) * dt
        t1 = far if abs(t1 - begin) >= abs(far - begin) else t1
        y1 = stepper.step(t, t1 - t, y)
        if not bool(torch.isfinite(y1).all()):
            out.status = Status.non_finite
            return out
        if stop(stepper, t, t1 - t, y, y1):
            return out
        stepper.advance()
        y, out.end = y1, t1
        out.ys = y[None]
        if t1 == far:
            return out
    out.status = Status.max_steps
    return out


def _along(gradient: Tensor, slope: Tensor) -> Tensor:
    """Return the directional derivative along a slope; complex numbers count as pairs of real ones."""
    if gradient.is_complex():
        return (gradient.conj() * slope).real.sum()
    return (gradient * slope).sum()


def _correct(
    field: Field, event_fn: Any, t: Tensor, ys: Any, packing: Packing
) -> tuple[Tensor, Any]:
    """Take one Newton step towards the event, whose derivative is that of the implicit function theorem.

    An event function that has no graph, as of a comparison, gives no derivative: the result is then returned as it is.
    """
    entries = ys if packing.is_tuple else (ys,)
    end = tuple(e[-1] for e in entries)

    def as_state(parts: tuple[Tensor, ...]) -> Any:
        return parts if packing.is_tuple else parts[0]

    time = t.to(packing.dtype)
    with torch.enable_grad():
        leaves = tuple(e.detach().requires_grad_() for e in end)
        moment = time.detach().requires_grad_()
        value = event_fn(moment, as_state(leaves))
        if not value.requires_grad:
            return t, ys
        # the component that ended the search is the one nearest to zero
        flat = value.reshape(-1)
        which = int(flat.detach().abs().argmin())
        grads = torch.autograd.grad(flat[which], (moment, *leaves), allow_unused=True)
    with torch.no_grad():
        slope = packing.unpack(field(time, packing.pack(as_state(end))))
        slopes = slope if packing.is_tuple else (slope,)
        rate = torch.zeros_like(time) if grads[0] is None else grads[0]
        for g, k in zip(grads[1:], slopes, strict=True):
            if g is not None:
                rate = rate + _along(g, k)
        safe = torch.where(rate == 0, torch.full_like(rate, math.inf), rate)
    now = event_fn(time, as_state(end)).reshape(-1)[which]
    shift = -once_differentiable(now, _ONE_DERIVATIVE) / safe
    new = tuple(
        torch.cat([e[:-1], (e[-1] + k * shift.to(k.dtype))[None]])
        for e, k in zip(entries, slopes, strict=True)
    )
    return t + shift.double(), as_state(new)
