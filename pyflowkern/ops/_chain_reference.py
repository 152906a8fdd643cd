"""A chain of transforms in plain PyTorch, from the formulas that its transforms have elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.dtypes import full_precision
from pyflowkern.ops._masked_network import Connection, inverse_by_passes, layer_values
from pyflowkern.ops.actnorm import actnorm_reference
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork
from pyflowkern.ops.chain_program import ChainProgram
from pyflowkern.ops.chain_steps import (
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
    Step,
)
from pyflowkern.ops.density import normal_log_prob_reference
from pyflowkern.ops.elements import apply_elements, wrapped
from pyflowkern.ops.matrix import plu_matrix_reference

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
    before = x.index_select(1, _index(step.moves, x))
    if inverse and {*step.moves} & {*step.reads}:
        count = len(step.moves)
        moved, log_det = inverse_by_passes(
            lambda moved: _parameters(step, _replaced(step, x, moved), context, own),
            before,
            torch.arange(count, device=x.device),
            count,
            step.element_map,
        )
    else:
        params = _parameters(step, x, context, own)
        moved, log_det = apply_elements(
            before, params, step.element_map, inverse=inverse, reference=True
        )
    return _replaced(step, x, moved), log_det


def _replaced(step: ElementsStep, x: Tensor, moved: Tensor) -> Tensor:
    """Return ``x`` with other values of the features that a step moves."""
    place = list(range(x.shape[1]))
    for j, feature in enumerate(step.moves):
        place[feature] = x.shape[1] + j
    return torch.cat([x, moved], 1).index_select(1, _index(place, x))


def _parameters(
    step: ElementsStep, x: Tensor, context: Tensor | None, own: list[Tensor]
) -> Tensor:
    """Return the parameters ``[N, moved features, P]``."""
    net, count = step.network, len(step.moves)
    if net is None:
        flat = own[0].unsqueeze(0).expand(x.shape[0], -1)
    else:
        reads = x.index_select(1, _index(step.reads, x))
        flat = _network(net, reads, context, own)
    if step.layout == "feature_major":
        return flat.reshape(x.shape[0], count, step.parameters)
    return flat.reshape(x.shape[0], step.parameters, count).transpose(1, 2)


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
