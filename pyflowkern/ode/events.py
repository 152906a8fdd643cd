"""Solves that end where a function of time and state changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.first_derivative import once_differentiable
from pyflowkern.ode.fields import packed_field
from pyflowkern.ode.loops.adaptive import Stop
from pyflowkern.ode.loops.adaptive import integrate as integrate_adaptive
from pyflowkern.ode.options import Options, options_for
from pyflowkern.ode.packing import Field, Packing
from pyflowkern.ode.solution import Status, Trajectory
from pyflowkern.ode.solve import solve, warn_unless_ok
from pyflowkern.ode.steppers import Stepper

__all__ = ["odeint_event"]

_ONE_DERIVATIVE = "the time and the state of an event have first derivatives only"


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    max_time: float = 1e6,
    method: str = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    first_step: float | None = None,
    max_step: float = math.inf,
    max_steps: int | None = None,
    step_size: float | None = None,
    norm: str | Callable[[Any], Tensor] = "rms",
    **settings: Any,
) -> tuple[Tensor, Any]:
    r"""Integrate until ``event_fn(t, y)`` changes its sign; return that time and the states.

    The step in which the sign changes is searched by bisection on the dense output; the state there comes from a solve
    that ends there, corrected by one Newton step.  That step also carries the gradient: with :math:`g` the event,

    .. math:: dt^* = -\frac{g_y \cdot dy}{g_t + g_y \cdot f}.

    An event that changes its sign twice within a step is missed: limit ``max_step``.  One that jumps over zero, or that
    depends on nothing with a gradient, is where the sign changes, and its time has no derivative.

    Args:
        func: ``(t, y) -> dy/dt``.
        y0: tensor or tuple of tensors.
        t0: start; a tensor may want its gradient.
        event_fn: ``(t, y) -> g``; of several components, the first that changes its sign ends the solve.
        reverse_time: integrate towards smaller times.
        max_time: how far from ``t0`` to go; without an event there, a warning is given.
        method: one with step control, or any with a ``step_size``.
        rtol: relative tolerance.
        atol: absolute tolerance; the bisection ends at rounding level.
        first_step: as in :func:`solve`.
        max_step: largest step.
        max_steps: of the whole solve.
        step_size: fixed steps of this length, which the search takes, and then the solve.
        norm: as in :func:`solve`.
        **settings: more of :func:`solve`, for the differentiable solve.

    Returns:
        ``(event_t, ys)``: a 0-d float64 tensor, and the states at the start and at the event, ``[2, *shape]``.  Where
        the solve failed before an event, they are the last time that it came to and the state there.

    Warns:
        RuntimeWarning: naming the status, if there was no event within ``max_time`` or the solve failed before.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> def fall(t, y):  # height and speed
        ...     return torch.stack([y[1], torch.full_like(y[1], -9.81)])
        >>> height = torch.tensor(10.0, requires_grad=True)
        >>> y0 = torch.stack([height, torch.zeros(())])
        >>> t, _ = ode.odeint_event(fall, y0, 0.0, event_fn=lambda t, y: y[0])
        >>> round(t.item(), 4)  # sqrt(2 h / g)
        1.4278
        >>> t.backward()
        >>> round(height.grad.item(), 5)  # t / (2 h)
        0.07139
    """
    if not callable(event_fn):
        raise TypeError(f"event_fn must be callable, got {type(event_fn).__name__}")
    if not 0 < max_time < math.inf:
        raise ValueError(f"max_time must be positive and finite, got {max_time}")
    packing = Packing(y0, False)
    start = packing.pack(y0).detach().contiguous()
    steps: dict[str, Any] = {
        "method": method, "rtol": rtol, "atol": atol, "first_step": first_step,
        "max_step": max_step, "max_steps": max_steps, "step_size": step_size, "norm": norm,
    }  # fmt: skip
    options = options_for(packing, start.device, dense=True, **steps)
    if not options.adaptive and options.step_size is None:
        raise ValueError(f"method must have step control or come with a step_size, got {method!r}")
    if not isinstance(t0, Tensor):
        t0 = torch.tensor(float(t0), dtype=torch.float64)
    begin = float(t0.detach())
    far = begin - max_time if reverse_time else begin + max_time

    def event(t: Tensor, y: Tensor) -> Tensor:
        return event_fn(t, packing.unpack(y))

    field = packed_field(func, packing)
    found = _search(field, event, start, begin, far, options)
    times = torch.stack([t0.reshape(()).double(), torch.tensor(found.time, dtype=torch.float64)])
    solved = solve(func, y0, times, **steps, **settings)
    failed = found.status not in (Status.ok, Status.no_event)
    warn_unless_ok(found.status if failed else solved.status)
    if found.status == Status.ok and not found.leaps:
        return _correct(field, event_fn, times[1], solved.ys, packing)
    if found.status == Status.no_event:
        warn_unless_ok(found.status)
    return times[1], solved.ys


@dataclass(frozen=True)
class _Found:
    """What a search came to.

    Args:
        time: of the event, or the last one reached.
        status: whether there was an event.
        leaps: the event jumps there: it has no zero to correct towards, and no derivative.
    """

    time: float
    status: Status
    leaps: bool = False


@torch.no_grad()
def _search(
    field: Field,
    event: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    begin: float,
    far: float,
    options: Options,
) -> _Found:
    """Return the time of the first change of sign, or the last one reached, and whether there was a change."""
    found: list[_Found] = []

    def at(t: float, y: Tensor) -> Tensor:
        return event(torch.full((), t, dtype=y.dtype, device=y.device), y)

    signs = torch.sign(at(begin, y0))

    def least(t: float, y: Tensor) -> float:
        return float((at(t, y) * signs).min())

    def stop(stepper: Stepper, t: float, dt: float, y: Tensor, y1: Tensor) -> bool:
        nonlocal signs
        if bool((signs == 0).any()):  # one that starts on zero counts from where it left
            new = torch.sign(at(t + dt, y1))
            signs = torch.where(signs == 0, new, signs)
        after = least(t + dt, y1)
        if after > 0:
            return False
        first = before = least(t, y)
        low, high = 0.0, 1.0
        for _ in range(60):  # to the last bit of a fraction
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            value = least(t + middle * dt, stepper.dense(y, dt, middle))
            if value > 0:
                low, before = middle, value
            else:
                high, after = middle, value
        # rounding of the time and of the state moves a continuous event by far less
        leaps = before - after > 1e-3 * max(abs(first), abs(after))
        found.append(_Found(t + high * dt, Status.ok, leaps))
        return True

    walk = integrate_adaptive if options.adaptive else _fixed_steps
    out = walk(field, y0, (begin, far), options, stop=stop)
    if found:
        return found[0]
    if out.status == Status.ok:
        return _Found(far, Status.no_event)
    assert isinstance(out.status, Status)
    assert out.end is not None
    return _Found(out.end, out.status)


def _fixed_steps(
    field: Field, y0: Tensor, times: tuple[float, float], options: Options, *, stop: Stop
) -> Trajectory:
    """Take steps of one length until ``stop`` says so, as the loop of adaptive steps does."""
    out = Trajectory(y0[None], end=times[0])
    assert options.step_size is not None
    begin, far = times
    dt = math.copysign(options.step_size, far - begin)
    stepper = Stepper(field, options.method, y0)
    stepper.start(begin, y0)
    y = y0
    for n in range(options.max_steps):
        t, t1 = begin + n * dt, begin + (n + 1) * dt
        y1 = stepper.step(t, t1 - t, y)
        if not bool(torch.isfinite(y1).all()):
            out.status = Status.non_finite
            return out
        if stop(stepper, t, t1 - t, y, y1):
            return out
        if abs(t1 - begin) >= abs(far - begin):
            return out
        stepper.advance()
        y, out.end = y1, t1
    out.status = Status.max_steps
    return out


def _along(gradient: Tensor, slope: Tensor) -> Tensor:
    """Return the derivative along a slope; of complex states by their real and imaginary parts."""
    if gradient.is_complex():
        return (gradient.conj() * slope).real.sum()
    return (gradient * slope).sum()


def _correct(
    field: Field, event_fn: Any, t: Tensor, ys: Any, packing: Packing
) -> tuple[Tensor, Any]:
    """Take one Newton step towards the event; its derivative is that of the implicit function.

    An event that depends on nothing that has a gradient happens when it does, whatever the state is: there is nothing
    to correct.
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
        # the component that ended the solve is the one nearest to zero
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
