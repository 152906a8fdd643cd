"""Inverse of an autoregressive map by fixed-point iteration, for networks that are not masked MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.checks import check_floating
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.core.first_derivative import first_derivative_only
from pyflowkern.core.outside_graphs import outside_graphs
from pyflowkern.ops.elements import ElementMap, apply_elements, element_map

__all__ = ["jacobi_inverse"]

_FIRST_DERIVATIVES = (
    "jacobi_inverse has only first derivatives: "
    "differentiate the forward direction twice, or use a MaskedMLP"
)

_NO_TRANSFORMS = (
    "jacobi_inverse has no gradients inside transforms of torch.func: use torch.autograd.grad, a MaskedMLP, or "
    "torch.no_grad() inside of the transform"
)

Network = Callable[[Tensor], Tensor]


@overload
def jacobi_inverse(
    network: Network,
    z: Tensor,
    *,
    transform: str | ElementMap = "affine",
    tolerance: float = 0.0,
    max_steps: int | None = None,
    return_residual: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def jacobi_inverse(
    network: Network,
    z: Tensor,
    *,
    transform: str | ElementMap = "affine",
    tolerance: float = 0.0,
    max_steps: int | None = None,
    return_residual: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def jacobi_inverse(
    network: Network,
    z: Tensor,
    *,
    transform: str | ElementMap = "affine",
    tolerance: float = 0.0,
    max_steps: int | None = None,
    return_residual: bool = False,
) -> tuple[Tensor, ...]:
    r"""Invert :math:`z_i = \tau(x_i; \theta_i(x_{<i}))`, all features at once, by iteration.

    .. math:: x^{(k+1)} = \tau^{-1}(z; \theta(x^{(k)})),

    After ``k`` steps the first ``k`` features, in their order, are exact; so ``D`` steps always suffice, and often far
    fewer reach rounding accuracy.  A sample stops at the first step that moves it by ``tolerance`` at most.  Gradients
    are implicit, by the same iteration for :math:`v J = g`; no step is kept in memory.  There are only first
    derivatives: a second one raises RuntimeError.

    The residual, which costs nothing, tells whether the steps were enough:

    .. math:: r = \max_i \frac{|z_i - \tau(x_i; \theta_i(x))|}{1 + |z_i|},

    a few roundings where ``x`` is the inverse, more where ``z`` changes fast with ``x``, and NaN where ``z`` or ``x``
    is not finite.

    Args:
        network: returns the parameters ``[N, D, P]`` of ``x`` ``[N, D]``; must be autoregressive in some order.
        z: latent ``[N, D]``.
        transform: :math:`\tau`, as for :class:`MaskedAutoregressive`.
        tolerance: largest change of a feature in the last step, in units of ``1 + |x|``.
        max_steps: most steps; None for ``D``.
        return_residual: also return ``r``, without gradient.

    Returns:
        ``(x, log_det)`` as :func:`pyflowkern.ops.autoregressive_inverse`, or ``(x, log_det, r)``, ``r`` of shape
        ``[N]``, float32 or float64.

    Raises:
        TypeError: for a ``z`` that is no floating-point tensor.
        RuntimeError: for gradients inside a transform of ``torch.func``, which only works under ``no_grad``.
        ValueError: for one of another shape, a negative tolerance, or ``max_steps`` below 1.

    Source: Song, Meng, Liao and Ermon, "Accelerating feedforward computation via parallel nonlinear
    equation solving" (2021).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> net = nn.MaskedMLP(4, 2)
        >>> x, log_det = nn.jacobi_inverse(net, torch.randn(3, 4))
        >>> tuple(x.shape), tuple(log_det.shape)
        ((3, 4), (3,))
        >>> *_, residual = nn.jacobi_inverse(net, torch.randn(3, 4), return_residual=True)
        >>> bool((residual < 1e-6).all())
        True
    """
    check_floating("z", z)
    if z.dim() != 2:
        raise ValueError(f"z must have shape [N, D], got {tuple(z.shape)}")
    steps = z.shape[1] if max_steps is None else max_steps
    if tolerance < 0 or steps < 1:
        raise ValueError(
            f"tolerance must be at least 0 and max_steps at least 1, got {tolerance} and {steps}"
        )
    tau = element_map(transform)

    def step(x: Tensor) -> Tensor:
        return apply_elements(z, network(x), tau, inverse=True)[0]

    with torch.no_grad():
        x = _iterate(step, z, tolerance, steps)
    if torch.is_grad_enabled():
        if transformed():
            raise RuntimeError(_NO_TRANSFORMS)
        # its value is zero up to rounding; it carries the gradients to z and to the parameters
        residual = z - apply_elements(x, network(x), tau)[0]
        x = _with_gradients(residual, x, network, tau, tolerance, steps)
    back, log_det = apply_elements(x, network(x), tau)
    if return_residual:
        return x, -log_det, _residual(z.detach(), back.detach())
    return x, -log_det


def _residual(z: Tensor, back: Tensor) -> Tensor:
    """Return the largest relative difference of each sample; two equal infinities give NaN, not 0."""
    work = accumulation_dtype(z.dtype)
    z, back = z.to(work), back.to(work)
    return ((z - back).abs() / (1 + z.abs())).amax(1)


@outside_graphs(
    "gradients of jacobi_inverse come from a further iteration, which no graph holds: compile without "
    "fullgraph=True or under torch.no_grad(), or use a MaskedMLP"
)
def _with_gradients(residual: Tensor, x: Tensor, *plan: Any) -> Tensor:
    return _Implicit.apply(residual, x, *plan)  # type: ignore[no-any-return, no-untyped-call]


class _Implicit(torch.autograd.Function):
    """``x`` as a function of the residual: ``dx = J^-1 d residual``."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, *plan: Any) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(residual, x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        residual, x = ctx.saved_tensors
        v = _Implicit.solve(grad.detach(), x, *ctx.plan)
        if torch.is_grad_enabled():
            v = first_derivative_only(v, (grad, residual), _FIRST_DERIVATIVES)
        return v, None, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def solve(
        grad: Tensor, x: Tensor, network: Network, tau: ElementMap, tolerance: float, steps: int
    ) -> Tensor:
        """Return ``v`` of ``v J = grad``."""
        with torch.enable_grad():
            inner, outer = (x.detach().requires_grad_() for _ in range(2))
            params = network(inner)
            z = apply_elements(inner, params, tau)[0]
            elementwise = apply_elements(outer, params.detach(), tau)[0].sum()
        (diagonal,) = torch.autograd.grad(elementwise, outer)

        def step(v: Tensor) -> Tensor:
            product: Tensor = torch.autograd.grad(z, inner, v, retain_graph=True)[0]
            improved: Tensor = v + (grad - product) / diagonal
            return improved

        return _iterate(step, grad / diagonal, tolerance, steps)


def _iterate(step: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, steps: int) -> Tensor:
    """Iterate each sample until a step changes it by no more than the tolerance."""
    moving = torch.ones_like(x[:, :1], dtype=torch.bool)
    for k in range(steps):
        new = step(x)
        # becoming NaN or infinite is a move; what has become so compares as unchanged
        moves = (new - x).abs() > tolerance * (1 + x.abs())
        moves |= torch.isfinite(x) & ~torch.isfinite(new)
        x = torch.where(moving, new, x)
        moving = moving & moves.any(1, keepdim=True)
        # not each step: it waits for the GPU; and a graph or a transform of torch.func holds no number to look at
        if k % 4 == 3 and not (torch.compiler.is_compiling() or transformed() or moving.any()):
            break
    return x
