"""Where the log-density of a flow is one op, its base among it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.flows.bases import StandardNormal
from pyflowkern.nn import Sequential

__all__ = ["log_prob_by_one_op"]


def log_prob_by_one_op(flow: torch.nn.Module, x: Tensor, context: Tensor | None) -> Tensor | None:
    """Return the log-density ``[N]`` of checked arguments; None where flow, bijection or base must be called.

    Args:
        flow: a flow that adds the log-density of its ``base`` to the log-determinant of its ``bijection``.
        x: data ``[N, D]``.
        context: ``[N, K]``, or None.
    """
    bijection, base = flow._modules["bijection"], flow._modules["base"]
    if torch.compiler.is_compiling() or type(bijection) is not Sequential:
        return None
    if type(base) is not StandardNormal or "log_prob" in base.__dict__:
        return None
    return bijection.normal_log_prob(x, context, within=flow)
