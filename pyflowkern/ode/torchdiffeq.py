"""The functions of torchdiffeq (Chen, 2018), with its arguments: code that was written for it runs unchanged.

``options`` and what begins with ``adjoint_`` become settings of :func:`pyflowkern.ode.solve`, which may also be given
by name.  Steps and numbers are those of torchdiffeq with ``compat="torchdiffeq"``; without it a solve ends on the last
time, takes fixed steps from output to output, and "rk4" is the classical method.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.events import solve_until
from pyflowkern.ode.solution import DenseOutput
from pyflowkern.ode.solve import solve, warn_unless_ok
from pyflowkern.ode.tableaus import Tableau, tableau
from pyflowkern.ode.times import joined, number

__all__ = [
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "settings_of_adjoint",
    "settings_of_options",
]

#: Options of methods with step control, of fixed steps, and of both; an option of the other kind gives a warning.
_ADAPTIVE = ("first_step", "min_step", "max_step", "max_num_steps", "dtype")
_FIXED = ("grid_constructor", "interp", "perturb")
_BOTH = ("norm", "step_size", "step_t", "jump_t", "grid_points")
#: Constants of the step control: the same as torchdiffeq's defaults, and fixed.
_CONSTANTS = {"safety": 0.9, "ifactor": 10.0, "dfactor": 0.2}
_SAME_NAME = ("first_step", "min_step", "max_step", "step_size", "interp", "perturb", "norm")


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Tableau | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    **settings: Any,
) -> Any:
    r"""Integrate ``dy/dt = func(t, y)``; :func:`solve` with arguments and result of torchdiffeq's ``odeint``.

    Args:
        func: ``(t, y) -> dy/dt``.
        y0: tensor or tuple of tensors.
        t: times of the output; with ``event_fn`` the start and any time after or before it, for the direction.
        method: as in :func:`solve`; None for "dopri5".
        options: with step control ``first_step``, ``min_step``, ``max_step``, ``max_num_steps`` (of the whole solve)
            and ``dtype`` (of times, which are always float64 here); for fixed steps ``step_size``,
            ``grid_constructor``, ``interp``, ``perturb``; for both ``norm``, ``step_t``, ``jump_t`` and
            ``grid_points`` (times at which a step ends).
        event_fn: end the solve where this function changes its sign, as :func:`odeint_event` does.
        **settings: of :func:`solve`: ``rtol``, ``atol``, ``adjoint``, ...

    Returns:
        States at the times, ``[T, *shape]`` for each entry; with ``event_fn`` the time of the event and the states at
        the start and at the event.

    Raises:
        TypeError: see :func:`solve`.
        ValueError: see :func:`solve`; for methods that are not here, naming the nearest, and constants of the step
            control other than those here.

    Warns:
        RuntimeWarning: if the solve could not go on; the rest of the result is the last finite state.
        UserWarning: for options that no method has, or not this one.

    Source: Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> rate = torch.tensor(2.0, requires_grad=True)
        >>> y = ode.odeint(lambda t, y: -rate * y, torch.ones(3), [0.0, 1.0], rtol=1e-6, atol=1e-6)
        >>> y[-1].sum().backward()
        >>> round(rate.grad.item(), 4)  # d/da 3 exp(-a) at a = 2
        -0.406
    """
    if method is not None:
        settings["method"] = method
    if options is not None:
        _add(settings, settings_of_options("options", options, method or "dopri5", func, y0))
    if event_fn is not None:
        return _until(func, y0, t, event_fn, settings)
    solution = solve(func, y0, t, **settings)
    warn_unless_ok(solution.status)
    return solution.ys


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Tableau | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | Tableau | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    **settings: Any,
) -> Any:
    r"""Integrate with gradients by the adjoint ODE, solved backwards (Chen et al., 2018): constant memory.

    It is :func:`odeint` with ``adjoint="continuous"``, and with the parameters in the norm of the backward solve unless
    ``adjoint_options`` has ``norm="seminorm"`` (Kidger, Chen and Lyons, 2021).

    Args:
        func: ``(t, y) -> dy/dt``; need not be a module, its parameters are found.
        y0: as in :func:`odeint`.
        t: as in :func:`odeint`.
        method: as in :func:`odeint`.
        options: as in :func:`odeint`.
        event_fn: as in :func:`odeint`.
        adjoint_rtol: of the backward solve; None for that of the forward solve, as with what follows.
        adjoint_atol: likewise.
        adjoint_method: likewise.
        adjoint_options: likewise; None for ``options`` without ``norm``.  Its ``norm`` may be "seminorm", or a function
            of a tuple: a zero for the time, the state's entries, their adjoints, and the gradient of each parameter.
        adjoint_params: tensors to differentiate by; None for all that the field depends on.
        **settings: of :func:`solve`.

    Returns:
        As :func:`odeint`.

    Raises:
        TypeError: as :func:`odeint`.
        ValueError: as :func:`odeint`, and for ``options`` with another ``adjoint_method`` and no ``adjoint_options``.

    Example:
        >>> import torch
        >>> from pyflowkern.ode import odeint_adjoint
        >>> field = torch.nn.Linear(2, 2)
        >>> y = odeint_adjoint(lambda t, y: field(y), torch.ones(4, 2), torch.tensor([0.0, 1.0]))
        >>> y[-1].sum().backward()
        >>> tuple(field.weight.grad.shape)
        (2, 2)
    """
    made = settings_of_adjoint(
        func, y0, method, options, adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options,
        adjoint_params,
    )  # fmt: skip
    settings = {"adjoint": "continuous", "seminorm": made.pop("seminorm")} | settings | made
    return odeint(func, y0, t, method=method, options=options, event_fn=event_fn, **settings)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
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
        odeint_interface: :func:`odeint` or :func:`odeint_adjoint`, which is called with ``event_fn``.
        **settings: of ``odeint_interface``: ``rtol``, ``atol``, ``options``, ...; a ``method`` without step control
            needs a ``step_size``.  And ``max_time``, how far from ``t0`` to go (default 1e6): without an event there, a
            warning is given.

    Returns:
        ``(event_t, ys)``: a 0-d tensor of the dtype of ``t0``, float64 if it is a number, and the states at the start
        and at the event, ``[2, *shape]``.  Where the solve failed before an event, they are the last time that it came
        to and the state there.

    Raises:
        TypeError: as :func:`odeint`.
        ValueError: as :func:`odeint`; for a method without step control and without ``step_size``.

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
    start = torch.as_tensor(t0, dtype=None if isinstance(t0, Tensor) else torch.float64)
    start = start.reshape(())
    towards = start.detach() - 1.0 if reverse_time else start.detach() + 1.0
    t = torch.stack([start, towards])
    result: tuple[Tensor, Any] = odeint_interface(func, y0, t, event_fn=event_fn, **settings)
    return result


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    method: str | Tableau | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> DenseOutput:
    """Integrate from ``t0`` to ``t1`` and return the state as a function of time.

    Args:
        func: ``(t, y) -> dy/dt``.
        y0: tensor or tuple of tensors.
        t0: start.
        t1: end.
        method: as in :func:`odeint`.
        options: as in :func:`odeint`.
        **settings: of :func:`solve`.

    Returns:
        A :class:`DenseOutput`.

    Raises:
        TypeError: as :func:`odeint`.
        ValueError: as :func:`odeint`.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> y = ode.odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 1.0)
        >>> round(y(0.5).item(), 4)  # exp(-0.5)
        0.6065
    """
    if method is not None:
        settings["method"] = method
    if options is not None:
        _add(settings, settings_of_options("options", options, method or "dopri5", func, y0))
    ends: Any = [t0, t1]  # tensors may carry gradients
    solution = solve(func, y0, ends, dense=True, **settings)
    warn_unless_ok(solution.status)
    assert solution.dense is not None
    return solution.dense


def _until(
    func: Any, y0: Any, t: Any, event_fn: Callable[..., Tensor], settings: Mapping[str, Any]
) -> tuple[Tensor, Any]:
    """Return the time of the event, of the dtype of ``t``, and the states."""
    if len(t) != 2:
        raise ValueError(
            f"t must hold two times with event_fn, the start and one for the direction, got {len(t)}"
        )
    given = joined(t)
    if not isinstance(given, Tensor):
        given = torch.tensor([number(v) for v in given], dtype=torch.float64)
    reverse = bool(given[1] < given[0])
    event_t, ys = solve_until(func, y0, given[0], event_fn, reverse_time=reverse, **settings)
    return event_t.to(given.dtype), ys


def _add(settings: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add what came as options to settings; raise for what is there already."""
    twice = sorted(settings.keys() & more.keys())
    if twice:
        raise ValueError(f"{', '.join(twice)} must be given once, by name or in options")
    settings.update(more)


def settings_of_adjoint(
    func: Any,
    y0: Any,
    method: str | Tableau | None,
    options: Mapping[str, Any] | None,
    adjoint_rtol: Any,
    adjoint_atol: Any,
    adjoint_method: str | Tableau | None,
    adjoint_options: Mapping[str, Any] | None,
    adjoint_params: Iterable[Tensor] | None,
) -> dict[str, Any]:
    """Return what :func:`odeint_adjoint` is given as settings of :func:`solve`."""
    settings: dict[str, Any] = {"seminorm": False}
    other = adjoint_method is not None and adjoint_method != method
    if other and options is not None and adjoint_options is None:
        raise ValueError(
            "adjoint_options must be given with options and another adjoint_method: those of "
            f"{method!r} need not fit {adjoint_method!r}"
        )
    back: dict[str, Any] = {}
    if adjoint_options is not None or options is not None:
        if adjoint_options is None:
            chosen = {k: v for k, v in (options or {}).items() if k != "norm"}
        else:
            chosen = dict(adjoint_options)
        if chosen.get("norm") == "seminorm":
            del chosen["norm"]
            settings["seminorm"] = True
        name = adjoint_method or method or "dopri5"
        back = settings_of_options("adjoint_options", chosen, name, func, y0)
        back.pop("jump_t", None)  # each stretch between two jumps has a backward solve of its own
    given = {"rtol": adjoint_rtol, "atol": adjoint_atol, "method": adjoint_method}
    back |= {k: v for k, v in given.items() if v is not None}
    if back:
        settings["backward"] = back
    if adjoint_params is not None:
        settings["params"] = tuple(adjoint_params)
    return settings


def settings_of_options(
    name: str, options: Mapping[str, Any], method: str | Tableau, func: Any, y0: Any
) -> dict[str, Any]:
    """Return options of torchdiffeq as settings of :func:`solve`; warn of those that it does not have.

    Args:
        name: of the argument, for messages.
        options: as the user gave them.
        method: the method that the options are for.
        func: the field, which a ``grid_constructor`` is called with.
        y0: the first state, for the same purpose.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a dict of options, got {type(options).__name__}")
    fixed = tableau(method).error is None
    allowed = {*(_FIXED if fixed else _ADAPTIVE), *_BOTH}
    known: dict[str, Any] = {}
    for key, value in options.items():
        if not fixed and key in _CONSTANTS:
            if number(value) != _CONSTANTS[key]:
                raise ValueError(f"{name}[{key!r}] must be {_CONSTANTS[key]}, got {value}")
        elif key not in allowed:
            _warn_of(name, key, method, allowed)
        elif key in _SAME_NAME:
            one = isinstance(value, Tensor) and value.numel() == 1
            known[key] = number(value) if one else value
        elif key == "max_num_steps":
            known["max_steps"] = int(value)
        elif key == "grid_constructor":
            known["grid"] = _grid_of(value, func, y0)
        elif key in ("step_t", "jump_t", "grid_points"):
            if value is not None:
                known["jump_t"] = [*known.get("jump_t", []), *(number(v) for v in value)]
        elif not (isinstance(value, torch.dtype) and value.is_floating_point):  # dtype
            raise TypeError(f"{name}['dtype'] must be a floating-point dtype, got {value!r}")
    if known.get("min_step", 0.0) == math.inf or known.get("norm", "") is None:
        raise ValueError(f"{name} holds a min_step that is not finite, or a norm that is None")
    return {k: v for k, v in known.items() if not (k in ("step_size", "first_step") and v is None)}


def _grid_of(constructor: Any, func: Any, y0: Any) -> Callable[[Sequence[float]], list[float]]:
    """Return torchdiffeq's grid constructor ``(func, y0, t) -> grid`` as a function of the times only."""
    if not callable(constructor):
        raise TypeError(f"grid_constructor must be callable, got {type(constructor).__name__}")

    def grid(times: Sequence[float]) -> list[float]:
        made = constructor(func, y0, torch.tensor(times, dtype=torch.float64))
        return [number(v) for v in made]

    return grid


def _warn_of(name: str, key: str, method: str | Tableau, allowed: Iterable[str]) -> None:
    kind = method if isinstance(method, str) else method.name
    near = difflib.get_close_matches(key, list(allowed), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    warnings.warn(
        f"{name}[{key!r}] is ignored{hint}: {kind!r} takes {', '.join(sorted(allowed))}",
        UserWarning,
        stacklevel=4,
    )
