"""The laws of a bijection: each yields what breaks it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern.testing._directions import Map, directions

__all__ = ["CHECKS", "Case"]

#: Derivatives are compared with central differences of this step, as in :func:`torch.autograd.gradcheck`...
_STEP = 1e-6
#: ...and by its tolerances.
_GRADIENT_ATOL, _GRADIENT_RTOL = 1e-5, 1e-3
#: Of float32 beside float64, as a share of the largest value: some hundred roundings, grown a hundredfold by the layer.
_SINGLE = 1e-3


@dataclass(frozen=True)
class Case:
    """What the laws are about: two directions, where they start, and what counts as equal."""

    bijection: Any
    maps: tuple[Map, Map]
    x: Tensor
    context: Tensor | None
    atol: float
    rtol: float

    def directions(self) -> Iterator[tuple[str, Map, Tensor]]:
        """Yield both directions: how messages call them, what computes them, and where they start."""
        forward, inverse = self.maps
        yield "forward", forward, self.x
        with torch.no_grad():
            z, _ = forward(self.x, self.context)
        yield "inverse", inverse, z

    def rows(self, which: slice) -> Tensor | None:
        return None if self.context is None else self.context[which]

    def parameters(self) -> dict[str, Tensor]:
        if not isinstance(self.bijection, torch.nn.Module):
            return {}
        found = self.bijection.named_parameters()
        return {name: p for name, p in found if p.requires_grad and p.numel()}

    def differs(self, found: Tensor, expected: Tensor) -> str:
        """Return where and by how much two tensors differ, or nothing."""
        return _difference(found, expected, self.atol, self.rtol)


def _shapes(case: Case) -> Iterator[str]:
    n = len(case.x)
    for name, call, start in case.directions():
        kept = start.clone()
        value, log_det = call(start, case.context)
        if not bool(((start == kept) | kept.isnan()).all()):
            start.copy_(kept)  # it is the caller's
            yield f"{name}: writes into its argument"
        wanted, found = start[0].numel(), value[0].numel() if len(value) else 0
        if len(value) != n or found != wanted:
            yield f"{name}: {tuple(start.shape)} becomes {tuple(value.shape)}: no bijection"
        if not isinstance(log_det, Tensor) or log_det.shape != (n,):
            shape = tuple(log_det.shape) if isinstance(log_det, Tensor) else type(log_det).__name__
            yield f"{name}: log_det must have shape {(n,)}, got {shape}"
        elif value.dtype != start.dtype or log_det.dtype != start.dtype:
            yield f"{name}: of {start.dtype} the results are {value.dtype}, and log_det {log_det.dtype}"
        if name == "inverse" and value.shape != case.x.shape:
            yield f"inverse: returns {tuple(value.shape)} for x of {tuple(case.x.shape)}"


def _inverse(case: Case) -> Iterator[str]:
    forward, inverse = case.maps
    with torch.no_grad():
        z, log_det = forward(case.x, case.context)
        x, minus = inverse(z, case.context)
        again, _ = forward(x, case.context)
    if differs := case.differs(x, case.x):
        yield f"f^-1(f(x)) is not x: {differs}"
    if differs := case.differs(again, z):
        yield f"f(f^-1(z)) is not z: {differs}"
    # A log-determinant adds up the errors of all features.
    size = case.x[0].numel()
    if differs := _difference(-minus, log_det, case.atol * size, case.rtol):
        yield f"the inverse's log_det is not minus that of forward: {differs}"


def _log_det(case: Case) -> Iterator[str]:
    for name, call, start in case.directions():
        _, log_det = call(start, case.context)
        expected = torch.stack(
            [_jacobian_log_det(case, call, start, i) for i in range(len(start))]
        )
        size = start[0].numel()
        found = log_det.detach().expand(len(start))
        if differs := _difference(found, expected, case.atol * size, case.rtol):
            yield f"{name}: not that of the Jacobian: {differs}"


def _jacobian_log_det(case: Case, call: Map, start: Tensor, i: int) -> Tensor:
    row = case.rows(slice(i, i + 1))
    sample = start[i]
    matrix = torch.autograd.functional.jacobian(
        lambda v: call(v[None], row)[0].reshape(-1), sample
    )
    log_det: Tensor = torch.linalg.slogdet(matrix.reshape(-1, sample.numel())).logabsdet
    return log_det


def _gradients(case: Case) -> Iterator[str]:
    for name, call, start in case.directions():
        given: dict[str, Tensor] = {"x" if name == "forward" else "z": start.clone()}
        if case.context is not None:
            given["context"] = case.context.clone()
        leaves = [t.detach().requires_grad_() for t in given.values()]
        context = leaves[1] if len(leaves) > 1 else None
        tensors = {**dict(zip(given, leaves, strict=True)), **case.parameters()}
        loss = _weighted(call(leaves[0], context))
        if not loss.requires_grad:
            yield f"{name}: the results have no gradient"
            return
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        for i, ((what, tensor), gradient) in enumerate(zip(tensors.items(), found, strict=True)):
            along = _normal(tensor, 10 + i)
            slope = 0.0 if gradient is None else float((gradient * along).sum())
            run = partial(call, leaves[0], context)
            expected = _central_difference(run, tensor, along)
            if not abs(slope - expected) <= _GRADIENT_ATOL + _GRADIENT_RTOL * abs(expected):
                got = (
                    "no gradient" if gradient is None else f"{slope:.4g} along a random direction"
                )
                yield f"{name}: {what} has {got}, central differences say {expected:.4g}"


def _central_difference(
    call: Callable[[], tuple[Tensor, Tensor]], tensor: Tensor, along: Tensor
) -> float:
    kept = tensor.detach().clone()
    values = []
    with torch.no_grad():
        try:
            for sign in (1, -1):
                tensor.copy_(kept + sign * _STEP * along)
                values.append(float(_weighted(call())))
        finally:
            tensor.copy_(kept)
    return (values[0] - values[1]) / (2 * _STEP)


def _single(case: Case) -> Iterator[str]:
    return _of_some(case, slice(1, 2), "one sample")


def _empty(case: Case) -> Iterator[str]:
    return _of_some(case, slice(0, 0), "no sample")


def _of_some(case: Case, which: slice, size: str) -> Iterator[str]:
    for name, call, start in case.directions():
        whole = call(start, case.context)
        few = call(start[which], case.rows(which))
        for what, a, b in zip(("value", "log_det"), few, whole, strict=True):
            expected = b.expand(len(start))[which] if what == "log_det" else b[which]
            if a.shape != expected.shape:
                yield f"{name}: {what} of {size} has shape {tuple(a.shape)}, not {tuple(expected.shape)}"
            elif differs := case.differs(a, expected):
                yield f"{name}: {what} of a sample alone: {differs}"


def _isolation(case: Case) -> Iterator[str]:
    bad = len(case.x) // 2
    others = torch.arange(len(case.x)) != bad
    for name, call, start in case.directions():
        good = _with_gradient(call, start, case.context)
        for poison in (math.nan, math.inf):
            spoilt = start.clone()
            spoilt[bad] = poison
            found = _with_gradient(call, spoilt, case.context)
            for what, a, b in zip(("value", "log_det", "gradient"), found, good, strict=True):
                if not torch.equal(a[others], b[others]):
                    yield f"{name}: {poison} in sample {bad} changes the {what} of others"
            if math.isnan(poison) and found[0][bad].isfinite().all() and found[1][bad].isfinite():
                yield f"{name}: a sample of NaN has finite results"


def _determinism(case: Case) -> Iterator[str]:
    for name, call, start in case.directions():
        first, second = (_with_gradient(call, start, case.context) for _ in range(2))
        for what, a, b in zip(("value", "log_det", "gradient"), first, second, strict=True):
            if not torch.equal(a, b):
                yield f"{name}: the {what} is another in a second call"


def _dtypes(case: Case) -> Iterator[str]:
    if not isinstance(case.bijection, torch.nn.Module):
        return
    single = directions(copy.deepcopy(case.bijection).float())
    context = None if case.context is None else case.context.float()
    for (name, call, start), other in zip(case.directions(), single, strict=True):
        with torch.no_grad():
            expected = call(start, case.context)
            found = other(start.float(), context)
        for what, a, b in zip(("value", "log_det"), found, expected, strict=True):
            if a.dtype != torch.float32:
                yield f"{name}: the {what} of float32 is {a.dtype}"
            elif differs := _difference(a.double(), b, _SINGLE * (1 + float(b.abs().max())), 0.0):
                yield f"{name}: the {what} of float32 beside float64: {differs}"


CHECKS: dict[str, Callable[[Case], Iterator[str]]] = {
    "shapes": _shapes,
    "inverse": _inverse,
    "log_det": _log_det,
    "gradients": _gradients,
    "single": _single,
    "empty": _empty,
    "isolation": _isolation,
    "determinism": _determinism,
    "dtypes": _dtypes,
}


def _normal(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, generator=generator, device="cpu").to(like)


def _weighted(results: tuple[Tensor, Tensor]) -> Tensor:
    """Return a number that every result changes, each in its own way."""
    first, second = (torch.sum(_normal(t, seed) * t) for seed, t in enumerate(results))
    return first + second


def _with_gradient(call: Map, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """Return value, log-determinant of each sample and the gradient of the input."""
    leaf = x.detach().requires_grad_()
    value, log_det = call(leaf, context)
    loss = _weighted((value, log_det))
    gradient = torch.zeros_like(x)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return [value.detach(), log_det.detach().expand(len(x)), gradient]


def _difference(found: Tensor, expected: Tensor, atol: float, rtol: float) -> str:
    found, expected = found.detach(), expected.detach()
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    excess = (found - expected).abs() - (atol + rtol * expected.abs())
    wrong = ~(excess <= 0)  # NaN is wrong, too
    if not wrong.any():
        return ""
    worst = int(excess.nan_to_num(math.inf).argmax())
    sample = worst // max(found[0].numel(), 1)
    a, b = float(found.reshape(-1)[worst]), float(expected.reshape(-1)[worst])
    return f"{a:.4g} in place of {b:.4g} (sample {sample})"
