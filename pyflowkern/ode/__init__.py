"""Ordinary differential equations: explicit Runge-Kutta solvers, their adjoints and events."""

from pyflowkern.ode.graphs import CapturedSolve, capture
from pyflowkern.ode.solution import DenseOutput, Solution, Stats, Status
from pyflowkern.ode.solve import solve
from pyflowkern.ode.tableaus import TABLEAUS, Tableau
from pyflowkern.ode.torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event

__all__ = [
    "TABLEAUS",
    "CapturedSolve",
    "DenseOutput",
    "Solution",
    "Stats",
    "Status",
    "Tableau",
    "capture",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
]
