"""The functions of torchdiffeq 0.2.5 (Chen, 2018), by the solvers of :mod:`pyflowkern.ode`.

They take the same steps and call the field as often.  What these solvers do not have is left to torchdiffeq, where it
is installed: the methods of Adams and scipy, constants of the step control other than the usual ones, times that are
not float64, a limit of steps for each of several outputs, and solves inside of compilers and transforms of torch.func.
So are "adaptive_heun" and "fehlberg2", of which torchdiffeq saves a slope of each step; without it they are taken here,
with all their slopes.

Other than there,

* the field of :func:`odeint_adjoint` need not be a module, and times need not be a tensor;
* a step size counts as a constant in gradients; torchdiffeq differentiates its guess of the first one, too, where none
  is given, which moves gradients by less than the tolerance;
* gradients of ``t`` cost one evaluation for each time (those through fixed steps are left to torchdiffeq), and are not
  in the norm of the backward solve, where torchdiffeq has the one of the time even if nobody wants it;
* ``interp="cubic"`` costs one evaluation more in each fixed step;
* each stretch between two times of ``jump_t`` or ``step_t`` begins with a step size of its own;
* the time of an event is exact to rounding, where torchdiffeq bisects down to ``atol``, and has its gradient without
  :func:`odeint_event`, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ode
from pyflowkern._library import observed
from pyflowkern.interop._doors import ORIGINAL, is_off
from pyflowkern.ode import Solution, Status
from pyflowkern.ode.torchdiffeq import settings_of_adjoint, settings_of_options

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

_Options = Mapping[str, Any] | None

_ADAPTIVE = frozenset(["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"])
#: torchdiffeq takes the last slope of a step for the first one of the next, though they differ in these.
_REUSING = frozenset(["adaptive_heun", "fehlberg2"])
_FIXED = frozenset(["euler", "midpoint", "heun2", "heun3", "rk4"])
#: Options of both, as torchdiffeq has them; it warns of others.
_OPTIONS = {
    True: {"first_step", "min_step", "max_step", "max_num_steps", "norm", "step_t", "jump_t", "safety", "ifactor",
           "dfactor", "dtype"},
    False: {"step_size", "grid_constructor", "interp", "perturb", "norm"},
}  # fmt: skip
#: Constants of the step control, which :mod:`pyflowkern.ode` has in no other way.
_CONSTANTS: dict[str, Any] = {
    "safety": 0.9,
    "ifactor": 10.0,
    "dfactor": 0.2,
    "dtype": torch.float64,
}

_FAILURES = {
    Status.max_steps: "max_num_steps exceeded",
    Status.dt_underflow: "underflow in dt: the tolerance asks for a step that does not change the time",
    Status.non_finite: "non-finite values in state `y`, or underflow in dt on the way there",
}


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: _Options = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> Any:
    r"""Integrate ``dy/dt = func(t, y)`` from ``y(t[0]) = y0``, with gradients through the steps.

    The slopes of all stages are kept for the backward pass, which does not call the field again; fixed steps are one
    graph.

    Args:
        func: ``(t, y) -> dy/dt``; ``t`` is a 0-d tensor of the state's dtype.
        y0: tensor or tuple of tensors.
        t: ``[T]``, increasing or decreasing.
        rtol: allowed error relative to the state.
        atol: allowed absolute error.
        method: "dopri5" (None), "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2",
            "heun3", "rk4"; torchdiffeq itself has others.
        options: as torchdiffeq's; see :func:`pyflowkern.ode.odeint`.
        event_fn: end the solve where this function of time and state changes its sign.

    Returns:
        States at the times, ``[T, *shape]`` for each entry; with ``event_fn`` the time of the event and the states at
        the start and there.

    Raises:
        AssertionError: as torchdiffeq, where steps become too small, numbers are not finite, or ``max_num_steps`` are
            not enough.
        ImportError: for what only torchdiffeq has, without it.
        TypeError: as :func:`pyflowkern.ode.solve`.
        ValueError: likewise.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.torchdiffeq import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
        >>> round(y[-1, 0].item(), 4)
        0.3679
    """
    settings = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    if not _serves(method, options, t) or (_moves(method, t) and _original("odeint") is not None):
        return _theirs("odeint", settings)(func, y0, t, event_fn=event_fn, **settings)
    if event_fn is not None:
        settings["method"] = method or "dopri5"
        return ode.odeint(func, y0, t, event_fn=event_fn, compat="torchdiffeq", **settings)
    more = settings_of_options("options", options or {}, method or "dopri5", func, y0)
    solution = ode.solve(
        func, y0, t, method=method or "dopri5", rtol=rtol, atol=atol, checkpoint=False,
        compat="torchdiffeq", **more,
    )  # fmt: skip
    return _states(solution, method, partial(odeint, func, y0, t, **settings))


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: _Options = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: _Options = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    r"""Integrate with gradients by the adjoint ODE, solved backwards (Chen et al., 2018): constant memory.

    Args:
        func: as in :func:`odeint`.
        y0: likewise.
        t: likewise.
        rtol: likewise.
        atol: likewise.
        method: likewise.
        options: likewise.
        event_fn: likewise.
        adjoint_rtol: of the backward solve; None for that of the forward solve, as with what follows.
        adjoint_atol: likewise.
        adjoint_method: likewise.
        adjoint_options: likewise; see :func:`pyflowkern.ode.odeint_adjoint`.
        adjoint_params: tensors to differentiate by; None for all that the field depends on.

    Returns:
        As :func:`odeint`.

    Raises:
        AssertionError: as :func:`odeint`.
        ImportError: likewise.
        TypeError: likewise.
        ValueError: likewise, and for ``options`` with another ``adjoint_method`` and no ``adjoint_options``.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.torchdiffeq import odeint_adjoint
        >>> field = torch.nn.Linear(2, 2)
        >>> y = odeint_adjoint(lambda t, y: field(y), torch.ones(4, 2), torch.tensor([0.0, 1.0]))
        >>> y[-1].sum().backward()
        >>> tuple(field.weight.grad.shape)
        (2, 2)
    """
    forward = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    back = {
        "adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol, "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_params": None if adjoint_params is None else tuple(adjoint_params),
    }  # fmt: skip
    both = forward | back
    serves = _serves(adjoint_method or method, adjoint_options, None)
    if not (serves and _serves(method, options, t)):
        return _theirs("odeint_adjoint", both)(func, y0, t, event_fn=event_fn, **both)
    name = method or "dopri5"
    if event_fn is not None:
        both["method"] = name
        return ode.odeint_adjoint(func, y0, t, event_fn=event_fn, compat="torchdiffeq", **both)
    settings = settings_of_adjoint(func, y0, method, options, **back)
    settings |= settings_of_options("options", options or {}, name, func, y0)
    solution = ode.solve(
        func, y0, t, method=name, rtol=rtol, atol=atol, adjoint="continuous",
        compat="torchdiffeq", **settings,
    )  # fmt: skip
    return _states(solution, method, partial(odeint_adjoint, func, y0, t, **both))


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Integrate until ``event_fn(t, y)`` changes its sign; return that time and the states, with their gradients.

    Args:
        func: as in :func:`odeint`.
        y0: likewise.
        t0: start.
        event_fn: ``(t, y) -> g``; of several components, the first that changes its sign ends the solve.
        reverse_time: integrate towards smaller times.
        odeint_interface: :func:`odeint`, :func:`odeint_adjoint`, those of torchdiffeq, or a ``functools.partial`` of
            them; torchdiffeq runs others.
        **kwargs: of ``odeint_interface``; a ``method`` without step control needs a ``step_size``.

    Returns:
        ``(event_t, ys)``: a 0-d tensor like ``t0``, and the states at the start and at the event, ``[2, *shape]``.

    Raises:
        ImportError: as :func:`odeint`.
        TypeError: likewise.
        ValueError: likewise.

    Warns:
        RuntimeWarning: if there was no event within a time of 1e6, or the solve failed before.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.torchdiffeq import odeint_event
        >>> t, _ = odeint_event(lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5)
        >>> round(t.item(), 4)  # log 2
        0.6931
    """
    given = dict(kwargs)
    inner = odeint_interface
    while isinstance(inner, partial) and not inner.args:
        given = inner.keywords | given
        inner = inner.func
    inner = getattr(inner, ORIGINAL, inner)
    ours = {odeint: odeint, odeint_adjoint: odeint_adjoint}
    for name, function in (("odeint", odeint), ("odeint_adjoint", odeint_adjoint)):
        if (own := _original(name)) is not None:
            ours[own] = function
    method, back = given.get("method"), given.get("adjoint_method")
    serves = _serves(method, given.get("options"), None)
    serves = serves and _serves(back or method, given.get("adjoint_options"), None)
    if inner not in ours or not serves:
        theirs = _theirs("odeint_event", given)
        return theirs(  # type: ignore[no-any-return]
            func, y0, t0, event_fn=event_fn, reverse_time=reverse_time,
            odeint_interface=odeint_interface, **kwargs,
        )  # fmt: skip
    return ode.odeint_event(
        func, y0, t0, event_fn=event_fn, reverse_time=reverse_time, odeint_interface=ours[inner],
        **given,
    )  # fmt: skip


def _serves(method: str | None, options: _Options, t: Any) -> bool:
    """Whether :mod:`pyflowkern.ode` has what is asked for; where torchdiffeq is missing, it also runs under tracers."""
    method = method or "dopri5"
    if (observed() or is_off() or method in _REUSING) and _original("odeint") is not None:
        return False
    if method not in _ADAPTIVE | _FIXED:
        return False
    given = options or {}
    if not given.keys() <= _OPTIONS[method in _ADAPTIVE]:
        return False
    if any(key in given and given[key] != value for key, value in _CONSTANTS.items()):
        return False
    return "max_num_steps" not in given or t is None or len(t) == 2


def _moves(method: str | None, t: Any) -> bool:
    """Whether gradients are wanted of the ends of fixed steps; torchdiffeq has those of its steps, not of the flow."""
    return method in _FIXED and isinstance(t, Tensor) and t.requires_grad


def _states(solution: Solution, method: str | None, again: partial[Any]) -> Any:
    """Return the states of a solve that came to its end; else do what torchdiffeq does.

    Args:
        solution: of the solve.
        method: the name that the user gave.
        again: what was called.
    """
    status = solution.status
    if isinstance(status, Tensor) or status == Status.ok:
        return solution.ys
    if method not in _FIXED:
        raise AssertionError(_FAILURES[status])
    # torchdiffeq checks no step of these methods: NaN and inf go on to the end
    if (own := _original(again.func.__name__)) is not None:
        return own(*again.args, **again.keywords)
    return _not_a_number(solution.ys)


def _not_a_number(ys: Any) -> Any:
    if isinstance(ys, Tensor):
        return torch.full_like(ys, float("nan"))
    return tuple(torch.full_like(entry, float("nan")) for entry in ys)


def _original(name: str) -> Callable[..., Any] | None:
    """Return torchdiffeq's own function, also where it is patched; None without torchdiffeq."""
    try:
        function: Callable[..., Any] = getattr(import_module("torchdiffeq"), name)
    except ImportError:
        return None
    return getattr(function, ORIGINAL, function)


def _theirs(name: str, asked: Mapping[str, Any]) -> Callable[..., Any]:
    """Return torchdiffeq's own function for what only it can do."""
    if (own := _original(name)) is not None:
        return own
    known = ", ".join(sorted(_ADAPTIVE | _FIXED))
    raise ImportError(
        f"{name} with {dict(asked)} needs torchdiffeq, which is not installed; without it, method is one of {known}, "
        "options hold the usual constants of the step control and times in float64, and max_num_steps comes with two "
        "times"
    )
