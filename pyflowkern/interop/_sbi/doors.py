"""What sbi makes to solve a field's ordinary differential equation, with the trace of the Jacobian in closed form."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._sbi.fields import Field, estimator_of, read_field
from pyflowkern.interop._sbi.networks import Network
from pyflowkern.interop._zuko.continuous import may_solve, spreads
from pyflowkern.nn.links import Link, Watched, obstructed

__all__ = ["OdeDoor", "why_left"]


class _Form(NamedTuple):
    """What a field is, and whether it still is that."""

    watched: Watched
    estimator: Any
    network: Network


class OdeDoor(MethodDoor):
    """``get_distribution`` of a ZukoNeuralODE: zuko's transform and solver, of a field that knows its trace."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, "get_distribution")
        self._form: _Form | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_form": None}  # copies look at their own modules

    def run(self, condition: Any, **kwargs: Any) -> Any:
        """Return the distribution under a condition."""
        from pyflowkern.interop._zuko.objects import continuous

        made = self.own(condition, **kwargs)
        continuous(made.transform, self, condition)
        return made

    def field(self, x: Any, c: Any) -> Field | None:
        """Return the field at the present parameters; None where sbi should run its own."""
        if not may_solve(x, c) or x.dim() < 2:
            return None
        form = self._form
        if form is None or not form.watched.unchanged():
            self._form = form = self._find()
        if form is None or {"ode_fn", "score"} & vars(form.estimator).keys():
            return None
        estimator = form.estimator
        if x.shape[-1:] != estimator.input_shape:
            return None
        if not spreads(x, c, len(estimator.condition_shape)):
            return None
        parameters = estimator.net.parameters()
        if not all(_fits(p, x) for p in parameters):
            return None
        return Field(estimator, form.network, c)

    def _find(self) -> _Form | None:
        link = Link()
        found = read_field(self.module, link)
        return None if found is None or obstructed(link) else _Form(Watched(link), *found)


def _fits(p: Tensor, x: Tensor) -> bool:
    return type(p) in PLAIN_TENSORS and p.dtype == x.dtype and p.device == x.device


def why_left(module: Any) -> str:
    """Return why a ZukoNeuralODE is left alone, found by comparing its field on a few numbers; empty if it is not."""
    estimator = estimator_of(module)
    if estimator is None:
        return "what it integrates is not the field of one of sbi's estimators"
    link = Link()
    if read_field(module, link) is None:
        return f"its network is not known: {type(estimator.net).__name__}"
    if obstructed(link):
        return "hooks or methods of its own hang on it"
    try:
        twin = copy.deepcopy(module)
        estimator = comparable(twin.f.__self__)
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    why = ""
    for dtype in (torch.float64, torch.float32):  # embeddings of time may be float32 throughout
        why = _differs(OdeDoor(twin), estimator.to(dtype), dtype)
        if not why.startswith(_FAILS):
            break
    return why


_FAILS = "the library itself fails"


def _differs(door: OdeDoor, estimator: Any, dtype: torch.dtype) -> str:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, *estimator.input_shape, generator=draw, dtype=dtype)
    condition = torch.randn(3, *estimator.condition_shape, generator=draw, dtype=dtype)
    probe = torch.randn(x.shape, generator=draw, dtype=dtype)
    for part in (0.3, 0.8):
        t = torch.tensor(estimator.t_min + part * (estimator.t_max - estimator.t_min), dtype=dtype)
        try:
            velocity, jacobian = _by_autograd(estimator, x, condition, t)
        except Exception as error:
            return f"{_FAILS} on a few numbers: {type(error).__name__}: {error}"
        with torch.no_grad():
            if (field := door.field(x, condition)) is None:
                return "its form or a part of it is not known"
            trace, estimate = field.with_trace(t, x), field.with_estimate(t, x, probe)
            got = (field.velocity(t, x), *trace, *estimate)
        product = torch.einsum("ni,nij,nj->n", probe, jacobian, probe)
        traces = jacobian.diagonal(dim1=1, dim2=2).sum(-1)
        if not same_values(got, (velocity, velocity, traces, velocity, product)):
            return "its values are not those of the form that its name says"
    return ""


def _by_autograd(estimator: Any, x: Tensor, condition: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sbi's field ``[N, D]`` and the Jacobian of each sample ``[N, D, D]``."""
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        velocity = estimator.ode_fn(given, condition, t)
        rows = [
            torch.autograd.grad(velocity[:, i].sum(), given, retain_graph=True)[0]
            for i in range(x.shape[1])
        ]
    return velocity.detach(), torch.stack(rows, 1)
