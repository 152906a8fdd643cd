"""The laws that ops, bijections and flows obey, as functions; the files ``test_laws.py`` say who obeys them."""

from laws.bijections import (
    EPS64,
    check_copies,
    check_gradients,
    check_inverse,
    check_log_det,
    jacobian_log_det,
)
from laws.draws import EMPTY, Calls, check_batched_gradients, few_elements, normal, unit
from laws.modules import ADAPTIVE, ModuleCase, randomize
from laws.ops import OpCase, Sample, hold, law, run

__all__ = [
    "ADAPTIVE",
    "EMPTY",
    "EPS64",
    "Calls",
    "ModuleCase",
    "OpCase",
    "Sample",
    "check_batched_gradients",
    "check_copies",
    "check_gradients",
    "check_inverse",
    "check_log_det",
    "few_elements",
    "hold",
    "jacobian_log_det",
    "law",
    "normal",
    "randomize",
    "run",
    "unit",
]
