"""A chain of transforms in plain PyTorch, from the formulas that its transforms have elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.dtypes import full_precision
from pyflowkern.ops._masked_network import (
    Connection,
    elementwise,
    inverse_by_passes,
    layer_values,
)
from pyflowkern.ops.actnorm import actnorm_reference
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork
from pyflowkern.ops.chain_program import ChainProgram
from pyflowkern.ops.chain_steps import (
    ActNormStep,
    ElementsStep,
    Group,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
    Step,
)
from pyflowkern.ops.density import normal_log_prob_reference
from pyflowkern.ops.elements import wrapped
from pyflowkern.ops.matrix import plu_matrix_reference
from pyflowkern.ops.scale_map import ScaleMap
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["run_steps"]


def run_steps(
    x: Tensor,
    context: Tensor | None,
    program: ChainProgram,
    tensors: Sequence[Tensor],
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``z`` and the log-determinant, or with a base the log-density, differentiable to any order."""
    log_det = x.new_zeros(x.shape[0])
    left = iter(tensors)
    owned = [(step, [next(left) for _ in range(n)]) for step, n in program.pairs()]
    with full_precision(x):  # the kernel computes in the dtype of its arguments
        for step, own in reversed(owned) if inverse else owned:
            x, term = _run_step(step, x, context, own, inverse)
            log_det = log_det if term is None else log_det + term
        return x, log_det + normal_log_prob_reference(x) if program.base == "normal" else log_det


def _run_step(
    step: Step, x: Tensor, context: Tensor | None, own: list[Tensor], inverse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the result of a step, and its log-determinant unless that is zero."""
    sign = -1 if inverse else 1
    if isinstance(step, PermuteStep):
        order = _index(step.order, x)
        return x.index_select(1, torch.argsort(order) if inverse else order), None
    if isinstance(step, ActNormStep):
        return actnorm_reference(x, *own, inverse=inverse)
    if isinstance(step, LinearStep):
        return functional.linear(x, own[0]), sign * own[1]
    if isinstance(step, PLUStep):
        order, lower, upper, log_diag, signs = own
        if order.is_floating_point():
            order = order.round().long()
        weight = plu_matrix_reference(order, lower, upper, log_diag, signs, inverse=inverse)
        return functional.linear(x, weight), sign * log_diag.sum()
    if isinstance(step, LUStep):
        return _run_lu(step, x, own, inverse)
    if isinstance(step, ShiftStep):
        return wrapped(x + sign * own[0], step.bound), None
    return _run_elements(step, x, context, own, inverse)


def _run_lu(step: LUStep, x: Tensor, own: list[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
    lower, upper, raw, bias = own
    d, size = functional.softplus(raw, threshold=40.0) + step.eps, x.shape[1]
    below, above = (
        f(size, size, o).to(x.device)
        for f, o in ((torch.tril_indices, -1), (torch.triu_indices, 1))
    )
    left = torch.eye(size, dtype=x.dtype, device=x.device).index_put(tuple(below), lower)
    right = torch.diag(d).index_put(tuple(above), upper)
    log_det = d.log().sum()
    if not inverse:
        return functional.linear(functional.linear(x, right), left, bias), log_det
    y = torch.linalg.solve_triangular(left, (x - bias).mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(right, y, upper=True).mT, -log_det


def _run_elements(
    step: ElementsStep, x: Tensor, context: Tensor | None, own: list[Tensor], inverse: bool
) -> tuple[Tensor, Tensor]:
    before, apply = x.index_select(1, _index(step.moves, x)), partial(_apply, step)
    if inverse and {*step.moves} & {*step.reads}:
        count = len(step.moves)
        moved, log_det = inverse_by_passes(
            lambda moved: _parameters(step, _replaced(step, x, moved), context, own),
            before,
            torch.arange(count, device=x.device),
            count,
            apply,
        )
    else:
        moved, log_det = apply(before, _parameters(step, x, context, own), inverse)
    return _replaced(step, x, moved), log_det


def _apply(step: ElementsStep, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Transform the moved features ``[N, M]`` by their parameters, all of them in a row."""
    if step.centred:
        return _apply_centred(step, x, params, inverse)
    if step.turned:
        return _apply_turned(step, x, params, inverse)
    return _apply_groups(step, x, params, inverse)


def _apply_groups(
    step: ElementsStep, x: Tensor, params: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    moved, total = [], x.new_zeros(x.shape[0])
    for group in step.groups:
        size = group.features * group.parameters
        own = _of_elements(step, params.narrow(1, group.row, size), group)
        y, log_det = elementwise(group.transform)(
            x.narrow(1, group.begin, group.features), own, inverse
        )
        moved.append(y)
        total = total + log_det
    return torch.cat(moved, 1), total


def _apply_centred(
    step: ElementsStep, x: Tensor, params: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    (group,) = step.groups
    given = group.transform
    assert isinstance(given, ScaleMap)  # as the step has checked
    shift, raw = _of_elements(step, params, group).unbind(2)
    log_scale = given.log_scale(raw)
    exp = ScaleMap(
        "exp", shift_first=given.shift_first, divide=given.divide, shift_gain=given.shift_gain
    )
    own = torch.stack([shift, log_scale - log_scale.mean(1, keepdim=True)], 2)
    return elementwise(exp)(x, own, inverse)[0], x.new_zeros(x.shape[0])


def _apply_turned(
    step: ElementsStep, x: Tensor, params: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    bounds = x.new_tensor([m.bound for m in step.maps if isinstance(m, SplineMap)])

    def turned(v: Tensor) -> Tensor:
        return torch.remainder(v, 2 * bounds) - bounds

    if not inverse:
        return _apply_groups(step, turned(x), params, False)
    y = turned(_apply_groups(step, x, params, True)[0])
    # beyond the interval, where z may be but y is not, this is not the log-determinant of the inverse spline
    return y, -_apply_groups(step, turned(y), params, False)[1]


def _of_elements(step: ElementsStep, params: Tensor, group: Group) -> Tensor:
    """Return the parameters ``[N, features, P]`` of a group."""
    n, size, per = params.shape[0], group.features, group.parameters
    if step.layout == "feature_major":
        return params.reshape(n, size, per)
    return params.reshape(n, per, size).transpose(1, 2)


def _replaced(step: ElementsStep, x: Tensor, moved: Tensor) -> Tensor:
    """Return ``x`` with other values of the features that a step moves."""
    place = list(range(x.shape[1]))
    for j, feature in enumerate(step.moves):
        place[feature] = x.shape[1] + j
    return torch.cat([x, moved], 1).index_select(1, _index(place, x))


def _parameters(
    step: ElementsStep, x: Tensor, context: Tensor | None, own: list[Tensor]
) -> Tensor:
    """Return the parameters of the moved features, all of them in a row."""
    net = step.network
    if net is None:
        return own[0].unsqueeze(0).expand(x.shape[0], -1)
    reads = x.index_select(1, _index(step.reads, x))
    return _network(net, _inputs(net, reads), context, own)


def _inputs(net: ChainNetwork, x: Tensor) -> Tensor:
    """Return what the first layer reads: cosines and sines in the place of angles."""
    if net.frequencies is None:
        return x
    columns = []
    for w, column in zip(net.frequencies, x.unbind(1), strict=True):
        columns += [column] if w == 0 else [(column * w).cos(), (column * w).sin()]
    return torch.stack(columns, 1)


def _network(net: ChainNetwork, x: Tensor, context: Tensor | None, own: list[Tensor]) -> Tensor:
    """Return the network's outputs, in the order of the moved features."""
    last, left = len(net.layers) - 1, iter(own)
    tensors, added, gates = [], {}, []
    for i, layer in enumerate(net.layers):
        weight = next(left)
        if i == 0 and net.context == "joined":
            added[0] = _of_context(layer, context, weight[:, layer.inputs :], None)
            weight = weight[:, : layer.inputs]
        tensors.append(_ordered(layer, weight, next(left) if layer.bias else None))
        if layer.context == "none":
            continue
        with_bias = layer.context == "gate" or layer.context_bias
        value = _of_context(layer, context, next(left), next(left) if with_bias else None)
        if layer.context == "add":
            added[i] = value
        else:
            gates.append(torch.sigmoid(value))
    if net.context in ("add", "activated"):
        active = net.context == "activated"
        value = _of_context(net.layers[0], context, next(left), next(left) if active else None)
        added[0] = ACTIVATIONS[net.activation](value) if active else value
    inactive = {0} if net.activate_last else {0, last}
    if not net.activate_blocks:
        inactive.update(range(1, last, 2))
    connections = [
        Connection(
            i - 1,
            ACTIVATIONS["identity" if i in inactive else net.activation],
            i - 2 if net.residual and i and i % 2 == 0 else None,
            layer.context == "gate",
        )
        for i, layer in enumerate(net.layers)
    ]

    def linear(i: int, h: Tensor) -> Tensor:
        out = functional.linear(h, *tensors[i])
        return out + added[i] if i in added else out

    return layer_values(x, connections, linear, gates)[-1]


def _of_context(
    layer: ChainLayer, context: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return a product with the context, in the order of a layer's units."""
    assert context is not None  # checked by every caller
    own = None if bias is None else _rows(layer, bias)
    return functional.linear(context, _rows(layer, weight), own)


def _rows(layer: ChainLayer, t: Tensor) -> Tensor:
    """Return the rows of a tensor in the order of a layer's units."""
    return t if layer.rows is None else t.index_select(0, _index(layer.rows, t))


def _ordered(
    layer: ChainLayer, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias in the order of inputs and units, masked entries zero."""
    if layer.columns is not None:
        weight = weight.index_select(1, _index(layer.columns, weight))
    weight = _rows(layer, weight)
    bias = None if bias is None else _rows(layer, bias)
    if layer.prefixes is not None:
        columns = torch.arange(layer.inputs, device=weight.device)
        weight = torch.where(columns < _index(layer.prefixes, weight)[:, None], weight, 0.0)
    return weight, bias


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)
