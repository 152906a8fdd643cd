"""Ordinary differential equations: explicit Runge-Kutta solvers, their adjoints and events."""

from pyflowkern.ode.events import odeint_event
from pyflowkern.ode.graphs import CapturedSolve, capture
from pyflowkern.ode.solution import DenseOutput, Solution, Stats, Status
from pyflowkern.ode.solve import odeint, solve
from pyflowkern.ode.tableaus import TABLEAUS, Tableau

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
    "odeint_event",
    "solve",
]
