"""zuko's unconditional transforms of vectors as steps of a chain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_steps import ActNormStep, LinearStep, PermuteStep

__all__ = ["UNCONDITIONAL"]


def _permutation(module: torch.nn.Module, names: list[str], features: int, link: Link) -> bool:
    order = module._buffers.get(names[0]) if len(names) == 1 else None
    if order is None or order.dim() != 1:
        return False
    link.holds.append(Holds(module, names[0]))
    link.steps.append(PermuteStep(order.tolist()))
    return True


def _matrix(
    made: Callable[[torch.nn.Module, str, bool], Sequence[Tensor]],
    module: torch.nn.Module,
    names: list[str],
    features: int,
    link: Link,
) -> bool:
    """Note a matrix that is made of another one at each call."""
    if len(names) != 1 or _tensor(module, names[0]).shape != (features, features):
        return False
    link.steps.append(LinearStep())
    link.make(module, [*names, *names], functools.partial(made, module, names[0]))
    return True


def _rotated(module: torch.nn.Module, name: str, inverse: bool) -> Sequence[Tensor]:
    matrix = _tensor(module, name)
    rotation = torch.linalg.matrix_exp(matrix - matrix.mT)
    return [rotation.mT if inverse else rotation, rotation.new_zeros(())]


def _multiplied(module: torch.nn.Module, name: str, inverse: bool) -> Sequence[Tensor]:
    both = _tensor(module, name)
    one = torch.eye(both.shape[-1], dtype=both.dtype, device=both.device)
    lower, upper = both.tril(), both.triu(1) + one
    log_det = both.diagonal().abs().log().sum()
    if not inverse:
        return [lower @ upper, log_det]
    solve = torch.linalg.solve_triangular
    left = solve(lower, one, upper=False)
    return [solve(upper, left, upper=True, unitriangular=True), log_det]


def _affine(module: torch.nn.Module, names: list[str], features: int, link: Link) -> bool:
    if sorted(names) not in (["loc", "scale"], ["_0", "_1"]):
        return False
    if not {*module._keys} <= {"loc", "scale"}:  # type: ignore[misc]
        return False
    if any(_tensor(module, name).dim() > 1 for name in names):
        return False
    link.steps.append(ActNormStep())
    made = functools.partial(_standardized, module, sorted(names), features)
    link.make(module, names, made)
    return True


def _standardized(
    module: torch.nn.Module, names: list[str], features: int, inverse: bool
) -> Sequence[Any]:
    """Return the logarithm of a scale, and what is added before it; None, so that zuko is asked, for others."""
    loc, scale = (_tensor(module, name) for name in names)
    if not bool((scale > 0).all()):
        return [None, None]
    return [scale.log().expand(features), (loc / scale).expand(features)]


def _tensor(module: torch.nn.Module, name: str) -> Tensor:
    found = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert found is not None
    return found


_Step = Callable[[torch.nn.Module, list[str], int, Link], bool]
UNCONDITIONAL: dict[str, _Step] = {
    "zuko.transforms.PermutationTransform": _permutation,
    "zuko.transforms.RotationTransform": functools.partial(_matrix, _rotated),
    "zuko.transforms.LULinearTransform": functools.partial(_matrix, _multiplied),
    "torch.distributions.transforms.AffineTransform": _affine,
}
