r"""Entropic optimal transport between two clouds of points, without the matrix of their costs.

.. math:: \min_P \sum_{ij} P_{ij} C_{ij} + \varepsilon\, \mathrm{KL}(P \,|\, a \otimes b), \qquad
          C_{ij} = s\,|x_i - y_j|^2,

over plans with marginals ``a`` and ``b``.  The solution is
:math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`, whose potentials Sinkhorn's iteration finds:

.. math:: f_i = -\varepsilon \log \sum_j b_j e^{(g_j - C_{ij}) / \varepsilon}, \qquad
          g_j = -\varepsilon \log \sum_i a_i e^{(f_i - C_{ij}) / \varepsilon}.

A marginal may be penalized in place of held, by :math:`\rho\,\mathrm{KL}`; its potential is then damped by
:math:`\rho / (\rho + \varepsilon)`.  Kernels make the numbers of the plan tile by tile, several at a time, and use them
at once: memory grows with the points, not with their pairs.

Sources: Cuturi 2013 (the iteration); Chizat, Peyre, Schmitzer and Vialard 2018 (penalized marginals); Feydy, Sejourne,
Vialard, Amari, Trouve and Peyre 2019 (the symmetric schedule, gradients by the envelope theorem); Anderson 1965 (the
accelerated one, with a memory of one step).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import check_floating, check_same_device, check_shape
from pyflowkern.core.register import register
from pyflowkern.ops import _transport_reference as plain
from pyflowkern.ops._transport_arguments import (
    check_clouds,
    check_plan,
    check_state,
    options_of,
)
from pyflowkern.ops.plan_tensors import PlanTensors

__all__ = [
    "Sinkhorn",
    "plan_draw",
    "plan_draw_reference",
    "plan_product",
    "plan_product_reference",
    "sinkhorn",
    "sinkhorn_reference",
]


class Sinkhorn(NamedTuple):
    """What :func:`sinkhorn` returns; all tensors are float64 but ``iterations``.

    Attributes:
        cost: ``[B]``, the value of the objective, differentiable.
        f: ``[B, n]``, the potential of ``x``.
        g: ``[B, m]``, the potential of ``y``.
        error: ``[B]``, the sum of the differences between a marginal and what it should be; NaN after NaN.
        iterations: ``[B]``, how many ran, int64.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import sinkhorn
        >>> x, half = torch.tensor([[[0.0], [1.0]]]), torch.full((1, 2), 0.5)
        >>> sinkhorn(x, x, half, half, epsilon=1.0).f.shape
        torch.Size([1, 2])
    """

    cost: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    iterations: Tensor


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    epsilon: float,
    scale: float = 1.0,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    schedule: str = "alternating",
    epsilon_scaling: float | None = None,
    penalty_x: float | None = None,
    penalty_y: float | None = None,
) -> Sinkhorn:
    r"""Solve a batch of entropic transport problems with costs :math:`s\,|x_i - y_j|^2`.

    .. math:: \min_P \sum_{ij} P_{ij}\, s\,|x_i - y_j|^2 + \varepsilon\, \mathrm{KL}(P \,|\, a \otimes b), \qquad
              P_{ij} = a_i\, b_j\, e^{(f_i + g_j - s\,|x_i - y_j|^2) / \varepsilon},

    over plans with marginals ``a`` and ``b``.  A marginal with a penalty is not held: it costs
    :math:`\rho\,\mathrm{KL}` of what it is from what it should be.

    The gradients of ``cost`` follow from the envelope theorem, :math:`\bar x_i = \sum_j P_{ij}\, 2 s (x_i - y_j)` and
    :math:`\bar a_i = f_i` (plus a constant): right where the iteration has converged.  Potentials have none.

    Args:
        x: ``[B, n, d]``, float32 or float64.
        y: ``[B, m, d]``, of the same dtype.
        a: ``[B, n]``, the masses of the points of ``x``.  Points of no mass are allowed.
        b: ``[B, m]``, those of ``y``.
        epsilon: the weight of the entropy, in units of the cost.
        scale: ``s``.
        max_iterations: most iterations, those of larger epsilons among them.
        tolerance: the error of the marginals, in units of mass, at which a problem is solved; 0 runs all iterations.
        schedule: "alternating" (``g``, then ``f``), "accelerated" (the same, with each step of ``g`` prolonged along
            the line through the last two to where their lengths would vanish, and taken back if the error grows by
            that; several times fewer iterations), or
            "symmetric" (both half way; then both once more, wholly).
        epsilon_scaling: begin with an epsilon of the squared diameter, and multiply it by this until it is ``epsilon``.
        penalty_x: the weight :math:`\rho` of the penalty on the marginal of ``x``; None holds it.
        penalty_y: likewise for ``y``.

    Raises:
        TypeError: for tensors that are not float32 or float64.
        ValueError: for shapes that do not fit, no points, and numbers that are out of range; and under ``vmap`` unless
            the tolerance is 0, without larger epsilons and prolonged steps.

    Sources: Cuturi (2013); Chizat, Peyre, Schmitzer and Vialard (2018) for penalties; Anderson (1965) for prolonged
    steps.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import sinkhorn
        >>> x, half = torch.tensor([[[0.0], [1.0]]]), torch.full((1, 2), 0.5)
        >>> out = sinkhorn(x, x + 2, half, half, epsilon=0.5)
        >>> round(float(out.cost), 3), float(out.error) < 1e-6
        (4.283, True)
    """
    check_clouds(x, y, a, b)
    options = options_of(
        epsilon, scale, max_iterations, tolerance, schedule, epsilon_scaling, penalty_x, penalty_y
    )
    a, b = a.double(), b.double()
    if kernel_serves("sinkhorn", x, y, a, b):
        out = _sinkhorn(x, y, a, b, *options)
    else:
        out = plain.sinkhorn(x, y, a, b, *options)
    return Sinkhorn(out[0], *(t.detach() for t in out[1:]))


def plan_product(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    matrix: Tensor,
    *,
    epsilon: float,
    scale: float = 1.0,
) -> Tensor:
    r"""Return :math:`P M` for the plan of given potentials, ``[B, n, k]``, with :math:`P` as in :func:`sinkhorn`.

    Swap ``x`` and ``y``, ``a`` and ``b``, ``f`` and ``g`` for the transposed plan.  The result is differentiable in
    ``matrix``; the plan counts as a constant.

    Args:
        x: as in :func:`sinkhorn`, as the next three.
        y: the other cloud.
        a: the masses of ``x``.
        b: the masses of ``y``.
        f: ``[B, n]``, float64, as :func:`sinkhorn` returns it.
        g: ``[B, m]``, likewise.
        matrix: ``[B, m, k]``, of the dtype of ``x``.
        epsilon: as in :func:`sinkhorn`.
        scale: as in :func:`sinkhorn`.

    Raises:
        TypeError: for tensors that are not float32 or float64, or of other dtypes than ``x``.
        ValueError: for shapes that do not fit, and numbers that are out of range.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import plan_product, sinkhorn
        >>> x, half = torch.tensor([[[0.0], [1.0]]]), torch.full((1, 2), 0.5)
        >>> out = sinkhorn(x, x + 2, half, half, epsilon=0.01)
        >>> rows = plan_product(x, x + 2, half, half, out.f, out.g, torch.ones(1, 2, 1), epsilon=0.01)
        >>> [round(v, 4) for v in rows.flatten().tolist()]
        [0.5, 0.5]
    """
    check_state("matrix", matrix)
    given = PlanTensors(x, y, a, b, f, g)
    epsilon, scale = check_plan(given, epsilon, scale)
    check_same_device(x=x, matrix=matrix)
    if matrix.dtype != x.dtype:
        raise TypeError(f"matrix must have the dtype of x, {x.dtype}, got {matrix.dtype}")
    if matrix.dim() != 3 or matrix.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"matrix must have shape ({y.shape[0]}, {y.shape[1]}, k), got {tuple(matrix.shape)}"
        )
    plan = given.constants()
    if not kernel_serves("plan_product", *plan, matrix):
        return plain.plan_product(*plan, matrix, epsilon, scale)
    out: Tensor = _plan_product(*plan, matrix, epsilon, scale)
    return out


def plan_draw(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    uniforms: Tensor,
    *,
    epsilon: float,
    scale: float = 1.0,
) -> Tensor:
    r"""Draw a column ``j`` for each row ``i`` with probability :math:`P_{ij} / \sum_j P_{ij}`.

    By the inverse of the row's distribution function: the column is the first whose sum over columns up to it exceeds
    ``uniforms`` times the row's sum.

    Args:
        x: as in :func:`plan_product`, as the next five.  Rows may repeat points of ``x``.
        y: the other cloud.
        a: the masses of ``x``.
        b: the masses of ``y``.
        f: the potential of ``x``.
        g: the potential of ``y``.
        uniforms: ``[B, n]``, float64, numbers in ``[0, 1)``.
        epsilon: as in :func:`sinkhorn`.
        scale: as in :func:`sinkhorn`.

    Returns:
        ``[B, n]``, int64.

    Raises:
        TypeError, ValueError: as :func:`plan_product`.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import plan_draw, sinkhorn
        >>> x, half = torch.tensor([[[0.0], [1.0]]]), torch.full((1, 2), 0.5)
        >>> out = sinkhorn(x, x + 2, half, half, epsilon=0.01)
        >>> u = torch.full((1, 2), 0.5, dtype=torch.float64)
        >>> plan_draw(x, x + 2, half, half, out.f, out.g, u, epsilon=0.01).tolist()
        [[0, 1]]
    """
    given = PlanTensors(x, y, a, b, f, g)
    epsilon, scale = check_plan(given, epsilon, scale)
    check_floating("uniforms", uniforms)
    check_same_device(x=x, uniforms=uniforms)
    check_shape("uniforms", uniforms, x.shape[:2])
    if uniforms.dtype != torch.float64:
        raise TypeError(f"uniforms must be float64, got {uniforms.dtype}")
    plan = given.constants()
    if not kernel_serves("plan_draw", *plan, uniforms):
        return plain.plan_draw(*plan, uniforms, epsilon, scale)
    out: Tensor = _plan_draw(*plan, uniforms, epsilon, scale)
    return out


def sinkhorn_reference(x: Tensor, y: Tensor, a: Tensor, b: Tensor, **options: Any) -> Sinkhorn:
    """Compute :func:`sinkhorn` in plain PyTorch with dense matrices, differentiable through every iteration."""
    defaults: dict[str, Any] = {
        "scale": 1.0,
        "max_iterations": 1000,
        "tolerance": 1e-6,
        "schedule": "alternating",
        "epsilon_scaling": None,
        "penalty_x": None,
        "penalty_y": None,
    }
    out = plain.sinkhorn(x, y, a.double(), b.double(), *options_of(**defaults | options))
    return Sinkhorn(out[0], *(t.detach() for t in out[1:]))


def plan_product_reference(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    matrix: Tensor,
    *,
    epsilon: float,
    scale: float = 1.0,
) -> Tensor:
    """Compute :func:`plan_product` in plain PyTorch, with a dense plan."""
    plan = PlanTensors(x, y, a, b, f, g).constants()
    return plain.plan_product(*plan, matrix, epsilon, scale)


def plan_draw_reference(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    uniforms: Tensor,
    *,
    epsilon: float,
    scale: float = 1.0,
) -> Tensor:
    """Compute :func:`plan_draw` in plain PyTorch, with a dense plan."""
    return plain.plan_draw(x, y, a, b, f, g, uniforms, epsilon, scale)


# --- schema, fake, autograd -----------------------------------------------------------------------


def _fake(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *options: Any) -> tuple[Tensor, ...]:
    problems = a.new_empty(a.shape[0])
    count = a.new_empty(a.shape[0], dtype=torch.int64)
    f, g = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
    return problems, f, g, torch.empty_like(problems), count


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:3])
    ctx.options = inputs[4:]


def _backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Any, ...]:
    plan, (epsilon, scale), penalties = ctx.saved_tensors, ctx.options[:2], ctx.options[6:8]
    sides, wanted = (PlanTensors(*plan), PlanTensors(*plan).transposed()), ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 4
    for i, p in enumerate(sides):
        if wanted[i]:  # a pass over all pairs
            of_points = plain.gradient_of_points(_product, p, epsilon, scale)
            grads[i] = of_points * grad[:, None, None].to(p.x.dtype)
        if wanted[2 + i]:
            of_mass = plain.gradient_of_mass(p.f, p.b, epsilon, penalties[i])
            grads[2 + i] = of_mass * grad[:, None]
    return (*grads, *[None] * 8)


def _product(*inputs: Any) -> Tensor:
    out: Tensor = torch.ops.pyflowkern.plan_product.default(*inputs)
    return out


_sinkhorn = register(
    "sinkhorn(Tensor x, Tensor y, Tensor a, Tensor b, float epsilon, float scale, int iterations, float tolerance,"
    " int schedule, float scaling, float penalty_x, float penalty_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_keep,
    backward=_backward,
    reference=lambda *inputs: plain.sinkhorn(*inputs)[:1],
    inputs=lambda ctx: (*ctx.saved_tensors[:4], *ctx.options),
)


def _keep_plan(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.numbers = inputs[7:]


def _backward_of_product(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    plan = PlanTensors(*ctx.saved_tensors[:6]).transposed()
    return (*[None] * 6, _product(*plan, grad.contiguous(), *ctx.numbers), None, None)


_plan_product = register(
    "plan_product(Tensor x, Tensor y, Tensor a, Tensor b, Tensor f, Tensor g, Tensor matrix, float epsilon,"
    " float scale) -> Tensor",
    fake=lambda x, y, a, b, f, g, matrix, *_: x.new_empty(*x.shape[:2], matrix.shape[2]),
    setup_context=_keep_plan,
    backward=_backward_of_product,
    reference=plain.plan_product,
    inputs=lambda ctx: (*ctx.saved_tensors, *ctx.numbers),
    flops=lambda x, y, a, b, f, g, matrix, *_: 2 * x[0] * x[1] * y[1] * matrix[2],
)
_plan_draw = register(
    "plan_draw(Tensor x, Tensor y, Tensor a, Tensor b, Tensor f, Tensor g, Tensor uniforms, float epsilon,"
    " float scale) -> Tensor",
    fake=lambda x, *_: x.new_empty(*x.shape[:2], dtype=torch.int64),
)
