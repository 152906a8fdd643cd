r"""Inverse of an autoregressive flow whose conditioner is a masked network, in about the work of one pass.

The density direction :math:`z_i = \tau(x_i; \theta_i(x_{<i}))` is one pass of the network (Germain et al. 2015,
Papamakarios et al. 2017).  Its inverse needs :math:`\theta_i` of features found before: ``D`` passes, where every pass
computes everything again.  Here each unit is computed once, when the last of the inputs that it sees has become known.

With :math:`J = \partial z / \partial x`, triangular in the order of the features, and upstream gradients
:math:`\bar x, \bar\ell` of ``x`` and of the inverse's log-determinant,

.. math:: \bar z = J^{-T} (\bar x - \bar\ell\, \partial_x \log|\det J|), \qquad
    \bar\theta = -\bar z^T \partial_\theta z - \bar\ell\, \partial_\theta \log|\det J| .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import LIBRARY, kernel_serves
from pyflowkern.core.checks import check_floating, check_list, check_same_device, check_shape
from pyflowkern.core.codes import MOST_MASKED_LAYERS, StructureHead, StructureLayer
from pyflowkern.core.dtypes import accumulation_dtype, cast, full_precision
from pyflowkern.core.register import register
from pyflowkern.ops._masked_network import elementwise, inverse_by_passes
from pyflowkern.ops._sorted_network import SortedNetwork, solve
from pyflowkern.ops.elements import (
    ElementCode,
    ElementMap,
    element_code,
    element_map,
    element_of_code,
    element_parameters,
)
from pyflowkern.ops.masked_plan import MaskedPlan

__all__ = ["autoregressive_inverse", "autoregressive_inverse_reference"]


# --- public functions ---------------------------------------------------------------------------------------


def autoregressive_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: MaskedPlan,
    *,
    transform: str | ElementMap = "affine",
    gates: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    r"""Return ``x`` with :math:`z_i = \tau(x_i; \theta_i(x))`, and the log-determinant of that direction.

    Args:
        z: latent ``[N, D]``.
        weights: weight ``[units, inputs]`` of each layer of the masked network; masked entries are not read.
        biases: bias of each layer, ``[units]``, or ``[N, units]`` where a context is part of it, or None.
        plan: the network's masks and activations.
        transform: :math:`\tau` in the density direction: ``"affine"``, the name of a scale map, a
            :class:`~pyflowkern.ops.ScaleMap` or a :class:`~pyflowkern.ops.SplineMap`.
        gates: factors of the layers that the plan says are gated, ``[units]`` or ``[N, units]``, such as the sigmoid
            of a context's linear map.

    Returns:
        ``(x, log_det)``: ``x`` like ``z``; ``log_det`` ``[N]`` in nats, float32 or float64.

    Gradients go by the scales themselves, so that those of ``"exp"`` and other unbounded maps need log-scales below 88
    in float32 (709 in float64); values do not.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit the plan, and an unknown transform.

    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern.ops import MaskedLayer, MaskedPlan, autoregressive_inverse
        >>> mask = torch.ones(3, 3).tril(-1).repeat_interleave(2, 0)  # shift and raw scale of 3 features
        >>> plan = MaskedPlan([MaskedLayer(mask)], features=3)
        >>> x, log_det = autoregressive_inverse(torch.randn(5, 3), [torch.randn(6, 3)], [None], plan)
        >>> tuple(x.shape), tuple(log_det.shape)
        ((5, 3), (5,))
    """
    tau = element_map(transform)
    _check(z, weights, biases, plan, tau, gates)
    given = [*(b for b in biases if b is not None), *gates]
    if len(weights) > MOST_MASKED_LAYERS or not kernel_serves(
        "autoregressive_inverse", z, *weights, *given
    ):
        return autoregressive_inverse_reference(
            z, weights, biases, plan, transform=tau, gates=gates
        )
    v, weights, biases, gates = _promoted(z, weights, biases, gates)
    packed, offsets = plan.pack(weights, biases, gates)
    at = plan.indices(z.device)
    x, log_det = torch.ops.pyflowkern.autoregressive_inverse.default(
        v, at.table, plan.table, packed, offsets, plan.structure(), *element_code(tau)
    )
    return cast(x, z.dtype), log_det


# --- references ---------------------------------------------------------------------------------------------


def autoregressive_inverse_reference(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: MaskedPlan,
    *,
    transform: str | ElementMap = "affine",
    gates: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Compute :func:`autoregressive_inverse` in plain PyTorch: a pass of the network for each level."""
    tau = element_map(transform)
    _check(z, weights, biases, plan, tau, gates)
    level = plan.indices(z.device).level
    v, weights, biases, gates = _promoted(z, weights, biases, gates)
    with full_precision(z):
        x, log_det = inverse_by_passes(
            lambda x: plan.parameters(x, weights, biases, gates),
            *(v, level, plan.levels, elementwise(tau)),
        )
        return cast(x, z.dtype), log_det


def _promoted(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gates: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[Tensor]]:
    """Return everything in the dtype of the work: the widest that was given, float32 at least."""
    dtype = z.dtype
    for t in (*weights, *biases, *gates):
        if t is not None and t.dtype != dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    work = accumulation_dtype(dtype)
    return (
        cast(z, work),
        [cast(w, work) for w in weights],
        [None if b is None else cast(b, work) for b in biases],
        [cast(g, work) for g in gates],
    )


# --- argument checks ----------------------------------------------------------------------------------------


def _check(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: MaskedPlan,
    transform: ElementMap,
    gates: Sequence[Tensor],
) -> None:
    check_floating("z", z)
    if not isinstance(plan, MaskedPlan):
        raise TypeError(f"plan must be a MaskedPlan, got {type(plan).__name__}")
    for name, tensors in (("weights", weights), ("biases", biases), ("gates", gates)):
        check_list(name, tensors)
    if z.dim() != 2 or z.shape[1] != plan.features:
        raise ValueError(f"z must have shape [N, {plan.features}], got {tuple(z.shape)}")
    if len(weights) != len(plan.layers) or len(biases) != len(plan.layers):
        raise ValueError(
            f"the plan has {len(plan.layers)} layers, got {len(weights)} weights and {len(biases)} biases"
        )
    if plan.outputs != element_parameters(transform):
        raise ValueError(
            f"the network returns {plan.outputs} numbers a feature, "
            f"the transform takes {element_parameters(transform)}"
        )
    for i, (layer, weight, bias) in enumerate(zip(plan.layers, weights, biases, strict=True)):
        check_floating(f"weights[{i}]", weight)
        check_shape(f"weights[{i}]", weight, layer.mask.shape)
        if bias is not None:
            _check_units(f"biases[{i}]", bias, z, layer.mask.shape[0])
        check_same_device(z=z, weight=weight, bias=bias)
    if len(gates) != len(plan.gated):
        raise ValueError(f"the plan has {len(plan.gated)} gated layers, got {len(gates)} gates")
    for k, (i, gate) in enumerate(zip(plan.gated, gates, strict=True)):
        _check_units(f"gates[{k}]", gate, z, plan.layers[i].mask.shape[0])
        check_same_device(z=z, gate=gate)


def _check_units(name: str, t: Tensor, z: Tensor, units: int) -> None:
    check_floating(name, t)
    check_shape(name, t, (z.shape[0], units) if t.dim() == 2 else (units,))


# --- schema, fake, autograd ---------------------------------------------------------------------------------


def _fake_inverse(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_det = z.new_empty(z.shape[0], dtype=accumulation_dtype(z.dtype))
    return torch.empty_like(z, memory_format=torch.contiguous_format), log_det


def _fake_solve(grad: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, table, counts, weights, biases_and_gates, ctx.structure, *code = inputs
    ctx.layers, ctx.code = len(weights), ElementCode(*code)
    ctx.save_for_backward(z, output[0], table, counts, *weights, *biases_and_gates)


def _inputs(ctx: Any) -> tuple[Any, ...]:
    z, _, table, counts, *tensors = ctx.saved_tensors
    lists = tensors[: ctx.layers], tensors[ctx.layers :]
    return z, table, counts, *lists, ctx.structure, *ctx.code


def _by_passes(
    z: Tensor,
    table: Tensor,
    counts: Tensor,
    weights: list[Tensor],
    biases_and_gates: list[Tensor],
    structure: list[int],
    *code: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, from what the op is given."""
    net = SortedNetwork(table, weights, biases_and_gates, structure)
    return net.by_passes(z, element_of_code(ElementCode(*code)))


def _backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
    _, x, table, counts, *tensors = ctx.saved_tensors
    net = SortedNetwork(table, tensors[: ctx.layers], tensors[ctx.layers :], ctx.structure)
    tau = element_of_code(ctx.code)
    grad_z, *lists = net.gradients(x, grad_x, grad_log_det, tau, counts)
    return (grad_z, None, None, *lists, None, *[None] * len(ctx.code))


def _inverse_flops(
    z: torch.Size,
    table: torch.Size,
    counts: torch.Size,
    weights: list[torch.Size],
    biases_and_gates: list[torch.Size],
    structure: list[int],
    *_: Any,
) -> int:
    """Count one pass of the network, the masked weights with the others, as torch does for layers with masks."""
    sources = structure[len(StructureHead) + StructureLayer.SOURCE :: len(StructureLayer)]
    inputs = [z[1] if source < 0 else weights[source][0] for source in sources]
    return 2 * z[0] * sum(w[0] * n for w, n in zip(weights, inputs, strict=True))


def _solve_flops(
    grad: torch.Size,
    by_x: torch.Size,
    by_theta: torch.Size,
    counts: torch.Size,
    weights: list[torch.Size],
    slopes_and_gates: list[torch.Size],
    structure: list[int],
) -> int:
    return _inverse_flops(grad, counts, counts, weights, slopes_and_gates, structure)


register(
    "autoregressive_inverse(Tensor z, Tensor table, Tensor counts, Tensor[] weights,"
    " Tensor[] biases_and_gates, int[] structure, int family, int kind, int tails, int parameterization,"
    " int bins, float[] numbers, int flags) -> (Tensor, Tensor)",
    fake=_fake_inverse,
    setup_context=_keep,
    backward=_backward,
    reference=_by_passes,
    inputs=_inputs,
    flops=_inverse_flops,
)
register(
    "autoregressive_solve(Tensor grad, Tensor by_x, Tensor by_theta, Tensor counts, Tensor[] weights,"
    " Tensor[] slopes_and_gates, int[] structure) -> Tensor",
    fake=_fake_solve,
    flops=_solve_flops,
)
LIBRARY.impl("autoregressive_solve", solve, "CompositeExplicitAutograd")
