r"""Steps of stochastic differential equations :math:`dX = u\,dt + \sigma\,dW`.

Euler's and Maruyama's step, and that of Heun, whose second half takes the mean of the drifts at both ends, are

.. math::
    x + h\,u + \sigma \sqrt{|h|}\,z, \qquad x + \tfrac{h}{2} (u + u_1) + \sigma \sqrt{|h|}\,z,

with standard normal numbers :math:`z`, in one pass.  These are functions of a seed, of the number of the step and of
their place alone (:mod:`pyflowkern.ops.philox`): not of the number of threads, the device or, up to rounding, the
dtype.  So nobody keeps them: :func:`add_noise` makes them again.

The step is linear, :math:`\bar x = g`, :math:`\bar u = h\,g`, or half of that for each of two drifts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_count,
    check_floating,
    check_number,
    check_same_device,
)
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.core.register import register
from pyflowkern.ops.philox import draw_seed, philox_normals

__all__ = ["add_noise", "add_noise_reference", "euler_maruyama", "euler_maruyama_reference"]

STATES = (torch.float32, torch.float64)


# --- public functions ----------------------------------------------------------------------------


def euler_maruyama(
    x: Tensor,
    drift: Tensor,
    step: float,
    sigma: float,
    *,
    other: Tensor | None = None,
    index: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return :math:`x + h\,u + \sigma \sqrt{|h|}\,z`, or with the mean of two drifts.

    Args:
        x: points, of any shape.
        drift: :math:`u` at ``x``, shaped like it.
        step: signed length :math:`h` in time; negative ones run a process backward.
        sigma: volatility, in units of ``x`` per square root of time, at least 0.
        other: the drift at the end of the step, for Heun's method: first a step without it, then, with the same index
            and seed, the step with it.
        index: number of the step: other steps have other noise.
        seed: of the noise, an int or an int64 tensor without axes; None draws one from ``generator``.
        generator: where the seed comes from; None is torch's default generator for the device of ``x``.

    Returns:
        Shaped and typed like ``x``.

    Raises:
        TypeError: for tensors that are not floating-point, drifts of another dtype, a seed that is no integer.
        ValueError: for other shapes or devices, a step or sigma that is not finite, a sigma or index below 0, or both
            a seed and a generator.

    Source: Maruyama (1955); Kloeden and Platen (1992), 15.1, for Heun's method; Salmon, Moraes, Dror and Shaw (2011)
    for the generator, Box and Muller (1958) for its normal numbers.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import euler_maruyama
        >>> x = torch.ones(100_000)
        >>> for k in range(10):
        ...     x = euler_maruyama(x, -x, 0.1, 0.5, index=k, seed=1)
        >>> round(float(x.mean()), 2), round(float(x.std()), 2)  # 0.9^10 and 0.5^2 (1 - 0.81^10) / 1.9
        (0.35, 0.34)
    """
    check_floating("x", x)
    _check_like("drift", drift, x)
    if other is not None:
        _check_like("other", other, x)
    step, sigma = _finite("step", step), _finite("sigma", sigma)
    if sigma < 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    scale = sigma * abs(step) ** 0.5
    return _step(x, drift, other, _seed(x, index, seed, generator), index, step, scale)


def add_noise(
    x: Tensor,
    scale: float,
    *,
    index: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return :math:`x + s\,z`, with the noise :math:`z` of :func:`euler_maruyama` for the same index and seed.

    Args:
        x: of any shape.
        scale: a finite number.
        index: as there, as are the others.
        seed: of the noise.
        generator: where the seed comes from.

    Returns:
        Shaped and typed like ``x``.

    Raises:
        TypeError: for a tensor that is not floating-point, or a seed that is no integer.
        ValueError: for a scale that is not finite, an index below 0, or both a seed and a generator.

    Source: as :func:`euler_maruyama`.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import add_noise, euler_maruyama
        >>> x = torch.zeros(3, 2)
        >>> noise = add_noise(x, 1.0, seed=1)
        >>> bool((euler_maruyama(x, x + 1, 0.25, 2.0, seed=1) == 0.25 + 1.0 * noise).all())
        True
    """
    check_floating("x", x)
    scale = _finite("scale", scale)
    return _step(x, None, None, _seed(x, index, seed, generator), index, 0.0, scale)


# --- references ----------------------------------------------------------------------------------


def euler_maruyama_reference(
    x: Tensor,
    drift: Tensor,
    step: float,
    sigma: float,
    *,
    other: Tensor | None = None,
    index: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute :func:`euler_maruyama` in plain PyTorch, with the same noise up to rounding."""
    key, scale = draw_seed(seed, generator, x.device), sigma * abs(step) ** 0.5
    return _step_reference(x, drift, other, key, index, step, scale)


def add_noise_reference(
    x: Tensor,
    scale: float,
    *,
    index: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute :func:`add_noise` in plain PyTorch, with the same noise up to rounding."""
    key = draw_seed(seed, generator, x.device)
    return _step_reference(x, None, None, key, index, 0.0, scale)


def _step_reference(
    x: Tensor,
    drift: Tensor | None,
    other: Tensor | None,
    seed: Tensor,
    index: int,
    step: float,
    scale: float,
) -> Tensor:
    work = accumulation_dtype(x.dtype)
    moved = x.to(work)
    if drift is not None:
        slope = drift.to(work)
        moved = moved + step * (slope if other is None else (slope + other.to(work)) / 2)
    noise = philox_normals(seed, index, x.numel(), work).view(x.shape)
    return (moved + scale * noise).to(x.dtype)


# --- argument checks -----------------------------------------------------------------------------


def _finite(name: str, value: float) -> float:
    if type(value) is not float:
        value = check_number(name, value)
    if not abs(value) < math.inf:  # torch.compile has no isfinite of numbers
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _check_like(name: str, u: Tensor, x: Tensor) -> None:
    if (  # nearly always; small steps are mostly checks
        isinstance(u, Tensor)
        and (u.layout, u.dtype, u.device) == (torch.strided, x.dtype, x.device)
        and u.shape == x.shape
    ):
        return
    check_floating(name, u)
    check_same_device(**{"x": x, name: u})
    if u.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {u.dtype}")
    if u.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(u.shape)}"
        )


def _seed(
    x: Tensor, index: int, seed: int | Tensor | None, generator: torch.Generator | None
) -> Tensor:
    if check_count("index", index, 0) >= 2**63:
        raise ValueError(f"index must fit into int64, got {index}")
    return draw_seed(seed, generator, x.device)


# --- the op --------------------------------------------------------------------------------------


def _step(x: Tensor, *rest: Any) -> Tensor:
    if not kernel_serves("diffusion_step", x, dtypes=STATES):
        return _step_reference(x, *rest)
    out: Tensor = _op(x, *rest)
    return out


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, drift, other, _, _, step, _ = inputs
    ctx.steps = (step, None) if other is None else (0.5 * step, 0.5 * step)
    if drift is None:
        ctx.steps = None, None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_drifts = [
        step * grad if step is not None and wanted else None
        for step, wanted in zip(ctx.steps, ctx.needs_input_grad[1:3], strict=True)
    ]
    return grad, *of_drifts, None, None, None, None


_op = register(
    "diffusion_step(Tensor x, Tensor? drift, Tensor? other, Tensor seed, int index, float step,"
    " float scale) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
