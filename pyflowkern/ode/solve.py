"""The public functions: solve an initial value problem, with gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.outside_graphs import outside_graphs
from pyflowkern.ode.adjoints.continuous import Continuous
from pyflowkern.ode.adjoints.direct import Direct, run
from pyflowkern.ode.adjoints.problem import Problem, autocast_like_now
from pyflowkern.ode.adjoints.reversible import Reversible
from pyflowkern.ode.callbacks import callbacks_of
from pyflowkern.ode.fields import packed_field
from pyflowkern.ode.jumps import jump_times, stretches
from pyflowkern.ode.loops import reversible
from pyflowkern.ode.options import Options, options_for
from pyflowkern.ode.packing import Field, Packing
from pyflowkern.ode.parameters import check_params, parameters_of, tensors_in
from pyflowkern.ode.solution import DenseOutput, Inside, Solution, Stats, Status, Trajectory
from pyflowkern.ode.steppers import Graph
from pyflowkern.ode.tableaus import Tableau
from pyflowkern.ode.times import joined, number, output_times
from pyflowkern.ode.unrolled import integrate as integrate_unrolled
from pyflowkern.ode.unrolled import one_graph, unrolls

__all__ = ["solve", "warn_unless_ok"]

_ADJOINTS: dict[str, Any] = {
    "direct": Direct,
    "continuous": Continuous,
    "reversible": Reversible,
}


def solve(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Tableau = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    adjoint: str = "direct",
    checkpoint: bool = True,
    seminorm: bool = True,
    coupling: float = 0.99,
    params: Iterable[Tensor] | None = None,
    step_size: float | None = None,
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float = math.inf,
    max_steps: int | None = None,
    control: str = "batch",
    check_every: int | None = None,
    norm: str | Callable[[Any], Tensor] = "rms",
    dense: bool = False,
    jump_t: Tensor | Sequence[float] | None = None,
    grid: Callable[[Sequence[float]], Sequence[float]] | None = None,
    interp: str = "linear",
    perturb: bool = False,
    backward: Mapping[str, Any] | None = None,
    compat: str | None = None,
) -> Solution:
    r"""Integrate ``dy/dt = func(t, y)`` from ``y(t[0]) = y0``.

    Numerical failure never raises.  A solve that cannot go on ends with a status, and fills the rest of its output with
    the last finite state; gradients are then those of the accepted steps.

    Gradients reach ``y0``, ``t`` and whatever the field depends on:

    * ``adjoint="direct"`` gives those of the discrete solution (step sizes count as constants), and can be
      differentiated again.  It keeps the state at each step and repeats the steps in the backward pass; with
      ``checkpoint=False`` it keeps the graphs of all stages instead, which is faster and takes more memory.
    * ``"continuous"`` solves the adjoint ODE backwards (Chen et al., 2018): constant memory, gradients of any order up
      to the tolerance; ``seminorm`` leaves the gradients of parameters out of the error norm (Kidger, Chen and Lyons,
      2021).  Where that solve cannot go on, for example at a pole, the gradients are NaN, with a warning.
    * ``"reversible"`` takes the reversible form of the method (McCallum and Foster, 2024): constant memory, gradients
      of its discrete solution up to rounding, twice the evaluations.  Steps towards a pole cannot be reversed: where a
      solve ends with ``non_finite`` or ``dt_underflow``, the backward pass repeats the accepted steps and keeps them.

    Second derivatives with respect to ``t`` exist with ``"continuous"`` only; elsewhere asking for them is an error.

    A field may have functions ``callback_step``, ``callback_accept_step`` and ``callback_reject_step`` as attributes:
    they are called with ``(t, y, dt)`` of each step, and those whose names end with ``_adjoint`` in the backward solve
    of ``"continuous"``, where ``y`` is the tuple that its ``norm`` is given.

    The field must be deterministic: a backward pass calls it again.  It may call ``torch.autograd.grad`` itself, with
    ``create_graph=True`` where its parameters need gradients.  The tensors that the field depends on are found in the
    graph of one evaluation at the start, and by inspecting the field: parameters of modules, closures, bound methods,
    ``functools.partial``, attributes, containers and globals.  Where a backward pass meets a tensor that was not found,
    it raises RuntimeError; name such tensors in ``params``, and tensors that are not leaves, too.

    Args:
        func: ``(t, y) -> dy/dt``; ``t`` is a 0-d tensor of the state's dtype, ``[N]`` with ``control="sample"``.
        y0: tensor or tuple of tensors; half precision is integrated in float32, a complex number as two real ones.
        t: output times, monotone; the first is the time of ``y0``.  Plain numbers save a copy from the device.  With
            ``control="sample"`` also ``[T, N]``.
        method: "euler", "midpoint", "heun" (or "heun2"), "heun3", "rk4" (classical), "rk4_38", or with step control
            "adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8"; or a :class:`Tableau`.
        rtol: allowed error relative to the state: a number, a tensor that broadcasts to the state, or one of these for
            each entry of a tuple.
        atol: allowed absolute error, likewise; with step control not 0 where ``rtol`` is.
        adjoint: see above.
        checkpoint: see above.
        seminorm: see above.
        coupling: :math:`\lambda` of the reversible solver, in (0, 1].
        params: the tensors whose gradients are wanted, in place of those that are found.
        step_size: largest fixed step; without it, a method without step control takes one step per output.  Where it
            is given, a method with step control takes fixed steps, too.
        first_step: size of the first adaptive step; by default from the algorithm of Hairer, Norsett and Wanner
            (1993), II.4.
        min_step: steps of this size are accepted whatever their error.
        max_step: largest step.
        max_steps: largest number of steps of the whole solve, rejected ones included; default 10,000, with ``compat``
            ten million.
        control: how steps are chosen.  "batch": one step size for the whole state.  "device": the same, but decided by
            tensors on the state's device, without waiting for the host; each output between the first and the last
            costs one interpolation per step.  "sample": a time and a step size for each sample.
        check_every: with ``control="sample"`` or ``"device"``, the number of steps between two questions of the host
            to the device whether the solve has ended; default 1 on a CPU, else 8.
        norm: of the scaled error.  "rms" is the root mean square (of a tuple, the largest over its entries);
            "max_sample" the largest root mean square over samples, so that a mean over the batch hides no sample;
            "max" the largest absolute value; or a function, called with the error in the structure of the state.
        dense: also return the state as a function of time.
        jump_t: times at which the field is discontinuous: a step ends there, and the field is evaluated at the
            floating-point numbers just before and just after.
        grid: function from the output times to the times of the fixed steps, with the same first and last time.
        interp: "linear" or "cubic": how outputs between the times of ``grid`` are interpolated, and, with ``compat``,
            outputs between fixed steps of ``step_size``.
        perturb: evaluate the field just after the start and just before the end of each fixed step.
        backward: settings of the backward solve of ``adjoint="continuous"`` that differ from the forward solve's:
            ``method``, ``rtol``, ``atol``, ``seminorm``, ``step_size``, ``first_step``, ``min_step``, ``max_step``,
            ``max_steps``, ``grid``, ``interp``, ``perturb`` and ``norm``.  The norm is a name, or a function of one
            tuple: a zero in place of the time, the state's entries, their adjoints, and the gradient of each parameter.
        compat: "torchdiffeq" takes the same steps and evaluations as that package: the last step passes the end and is
            interpolated, the field at the end of a step is evaluated just before it, and "rk4" is the 3/8 rule.  Only
            "adaptive_heun" and "fehlberg2" differ: there it takes the last slope of a step for the first of the next.

    Returns:
        A :class:`Solution`: ``ys [T, *shape]``, ``ts``, ``status``, ``stats``.

    Raises:
        TypeError: for a state that is not floating-point or complex, or a wrong result of ``func``.
        ValueError: for times that are not monotone and finite, unknown names, settings out of range, and tolerances
            that are both 0.
        RuntimeError: inside transforms of torch.func for other than fixed steps with ``adjoint="direct"``, and in a
            backward pass for a tensor that was not found.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> solution = ode.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
        >>> round(solution.ys[-1].item(), 4), solution.status.name
        (0.3679, 'ok')
    """
    if not callable(func):
        raise TypeError(f"func must be callable, got {type(func).__name__}")
    packing = Packing(y0, control == "sample")
    start = packing.pack(y0).contiguous()
    options = options_for(
        packing, start.device, method=method, rtol=rtol, atol=atol, adjoint=adjoint,
        checkpoint=checkpoint, seminorm=seminorm, coupling=coupling, step_size=step_size,
        first_step=first_step, min_step=min_step, max_step=max_step, max_steps=max_steps,
        control=control, check_every=check_every, norm=norm, dense=dense, compat=compat,
        grid=grid, interp=interp, perturb=perturb, backward=backward,
    )  # fmt: skip
    options = _with_callbacks(func, options, packing)
    t = joined(t)
    times, ts = output_times(t, start, options.per_sample)
    field = packed_field(func, packing)
    if options.callbacks is None and unrolls(
        times, method=method, adjoint=adjoint, step_size=step_size, grid=grid, control=control,
        dense=dense, jump_t=jump_t, compat=compat,
    ):  # fmt: skip
        steps = integrate_unrolled(field, start, times, options)
        ys = steps.ys
    else:
        solver = _solve if jump_t is None else _by_stretches(jump_t)
        ys, steps = solver(func, field, start, times, t, options, params)
    interpolation = None
    if dense:
        begin = times[0], start.detach()
        interpolation = DenseOutput(
            options.method, steps.t, steps.dt, steps.states, steps.slopes, packing, begin,
            steps.inside,
        )  # fmt: skip
    states = packing.unpack(ys, (ts.shape[0],))
    return Solution(states, ts, steps.status, steps.stats, interpolation)


def warn_unless_ok(status: Status | Tensor) -> None:
    """Warn if a solve ended early; a status on another device than the CPU is not read, which would wait for it."""
    if isinstance(status, Tensor):
        if status.device.type != "cpu" or not bool((status != Status.ok).any()):
            return
        names = [
            f"{int((status == s).sum())} {s.name}" for s in Status if bool((status == s).any())
        ]
        text = ", ".join(names)
    elif status == Status.ok:
        return
    else:
        text = status.name
    advice = ""
    if Status.dt_underflow.name in text or Status.max_steps.name in text:
        advice = (
            "a larger rtol may help, and naming in jump_t the times at which the field jumps; "
        )
    warnings.warn(
        f"the ODE solve ended early ({text}): its result is the last finite state; {advice}"
        "ode.solve returns the status instead of this warning",
        RuntimeWarning,
        stacklevel=3,
    )


def _with_callbacks(func: Any, options: Options, packing: Packing) -> Options:
    """Return the settings with the callbacks that the field defines."""
    allowed = 3 if options.adaptive else 1
    if options.per_sample or options.on_device or options.adjoint == "reversible":
        allowed = 0
    callbacks = callbacks_of(func, packing.unpack, allowed)
    back = None
    if options.adjoint == "continuous":
        solver = options.backward or options
        back = callbacks_of(func, packing.unpack, 3 if solver.adaptive else 1, backward=True)
    if callbacks is None and back is None:
        return options
    options = replace(options, callbacks=callbacks, backward_callbacks=back)
    if options.backward is not None:
        options = replace(options, backward=replace(options.backward, backward_callbacks=back))
    return options


def _by_stretches(jump_t: Tensor | Sequence[float]) -> Callable[..., tuple[Tensor, Trajectory]]:
    """Return a function like :func:`_solve` for a field that is discontinuous at given times."""
    jumps = jump_times(jump_t)

    def solver(
        func: Any, field: Field, y0: Tensor, times: Any, t: Any, options: Options, params: Any
    ) -> tuple[Tensor, Trajectory]:
        if options.per_sample:
            raise ValueError("jump_t goes with control='batch' or 'device': one time for all")
        params = None if params is None else check_params(params)
        out = Trajectory(y0.new_empty(0), stats=Stats(0, 0, 0))
        states, y, left = [y0], y0, options.max_steps
        for part in stretches(times, jumps, y0):
            # with compat="torchdiffeq" the last step passes the end; it must not pass a jump
            may_pass_end = options.torchdiffeq and part.times[-1] == times[-1]
            limited = replace(options, max_steps=max(left, 1), torchdiffeq=may_pass_end)
            if isinstance(t, Tensor) and t.requires_grad:
                moments: Any = part.tensor(t)
            else:
                moments = part.times
            ys, steps = _solve(func, part.field(field), y, part.times, moments, limited, params)
            states += list(ys[1 : 1 + len(part.outputs)].unbind())
            y = ys[-1]
            out.extend(steps)
            left = options.max_steps - out.stats.accepted - out.stats.rejected
            if out.status == Status.ok and left < 1 and part.times[-1] != times[-1]:
                out.status = Status.max_steps
            if out.status != Status.ok:
                break
        states += [y] * (len(times) - len(states))
        return torch.stack(states), out

    return solver


@outside_graphs(  # a graph for every step
    "the steps of an ODE (pyflowkern.ode.solve) are compiled where they are fixed, 128 evaluations of the field "
    "at most, with adjoint='direct': take such ones, compile without fullgraph=True, or compile the field alone"
)
def _solve(
    func: Any,
    field: Field,
    y0: Tensor,
    times: Any,
    t: Tensor | Sequence[float],
    options: Options,
    params: Iterable[Tensor] | None,
) -> tuple[Tensor, Trajectory]:
    time = t if isinstance(t, Tensor) and t.requires_grad else None
    context, given = autocast_like_now(y0.device), params is not None
    problem = Problem(field, times, options, None, context, given, 0)
    wanted: list[Tensor] = []
    if torch.is_grad_enabled():
        if time is None and not given:
            whole = one_graph(field, y0, times, options)
            if whole is not None:
                return whole.ys, whole
        problem.first, wanted, problem.read = _first_slope(func, field, y0, times, options, params)
        problem.held = tensors_in(field) if given else ()
    if not (torch.is_grad_enabled() and (y0.requires_grad or time is not None or wanted)):
        with torch.no_grad():
            trajectory = (
                reversible.integrate(field, y0, times, options)[0]
                if options.adjoint == "reversible"
                else run(problem, y0, False)
            )
        if options.dense:
            problem = replace(problem, first=None, complete=True)
            trajectory.inside = [(0, _inside(problem, trajectory, y0.detach(), []))]
        return trajectory.ys, trajectory
    if options.per_sample and time is not None:
        raise ValueError("control='sample' gives no gradient of t: detach it")
    ys = _ADJOINTS[options.adjoint].apply(problem, y0, time, *wanted)
    assert problem.result is not None
    trajectory, problem.result = problem.result, None
    if options.dense:
        problem = replace(problem, recorded=None)
        trajectory.inside = [(0, _inside(problem, trajectory, y0, wanted))]
    return ys, trajectory


def _inside(problem: Problem, steps: Trajectory, y0: Tensor, wanted: Sequence[Tensor]) -> Inside:
    """Return a function that gives interpolated states their gradients: those of a solve that ends at their time."""

    def give(i: int, t: float | Tensor, state: Tensor) -> Tensor:
        begin, end = problem.times[0], number(t)
        theta = (end - steps.t[i]) / steps.dt[i]
        until = Trajectory(
            torch.stack([y0.detach(), state]), t=steps.t[: i + 1], dt=steps.dt[: i + 1],
            states=steps.states[: i + 1], outputs=[(-1, None), (i, theta)],
        )  # fmt: skip
        times = None
        if isinstance(t, Tensor) and t.requires_grad:
            times = torch.stack([t.detach().new_tensor(begin), t.reshape(())])
        options = replace(problem.options, dense=False, interp="cubic", checkpoint=True)
        one = replace(problem, times=[begin, end], options=options, recorded=until)
        ys: Tensor = Direct.apply(one, y0, times, *wanted)  # type: ignore[no-untyped-call]
        return ys[-1]

    return give


def _first_slope(
    func: Any,
    field: Field,
    y0: Tensor,
    times: Any,
    options: Options,
    params: Iterable[Tensor] | None,
) -> tuple[Graph | None, list[Tensor], int]:
    """Evaluate the field at the start under autograd, and find the tensors that it depends on.

    Returns:
        The first state and its slope, None where the loop has to evaluate that itself; the tensors; and how many of
        them, the first ones, are known to be read.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "ode.solve runs inside transforms of torch.func with fixed steps and adjoint='direct' alone: use these, or "
            "torch.autograd.grad, and a batch axis with control='sample' in place of vmap"
        )
    if params is not None:
        params = check_params(params)
        if options.per_sample or not y0.requires_grad:
            return None, *parameters_of(func, y0, params)
    leaf = y0.detach().requires_grad_()
    start = times[0].to(y0.dtype) if options.per_sample else None
    if start is None:
        start = torch.full((), times[0], dtype=y0.dtype, device=y0.device)
        if options.perturb:
            start = torch.nextafter(start, torch.full_like(start, times[-1]))
    slope = field(start, leaf)
    wanted, read = parameters_of(func, slope, params, leaf)
    if options.per_sample or options.adjoint == "reversible":
        return None, wanted, read
    return (leaf, slope if not options.checkpoint else slope.detach()), wanted, read
