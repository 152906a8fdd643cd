r"""A whole flow on vectors as one op: a chain of transforms, and the density of its base.

"Chain" is the field's word for bijections one after another, :math:`f = f_T \circ \dots \circ f_1` with
:math:`\log|\det J_f| = \sum_t \log|\det J_{f_t}|`.  Run layer by layer, flows of the usual size spend their time on
calls, lists and autograd nodes, not on arithmetic.  Here a tile of samples goes through all transforms while it is in
cache, and of each transform only its input is kept for the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_context,
    check_dense,
    check_flag,
    check_floating,
    check_list,
    check_same_device,
    check_shape,
)
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference
from pyflowkern.ops._chain_reference import run_steps
from pyflowkern.ops.chain_program import ChainProgram

__all__ = ["CHAIN_DTYPES", "chain", "chain_reference", "computes", "run_chain"]

CHAIN_DTYPES = (torch.float32, torch.float64)
#: Devices whose kernels run all programs: others have no inverse of autoregressive steps, and nothing that is special
#: (``ChainProgram.special``).
WHOLE = ("cpu",)
#: Samples of a tile: the kept inputs of steps are rounded up to whole tiles.
_TILE = 16


# --- public functions ----------------------------------------------------------------------------


def chain(
    x: Tensor,
    program: ChainProgram,
    tensors: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Run a chain of transforms from data to latent: :math:`z = f_T(\dots f_1(x))`, or back.

    The log-determinant is the sum of those of the steps,

    .. math:: \log|\det J_f(x)| = \sum_t \log|\det J_{f_t}(x_t)|, \qquad x_1 = x,\; x_{t+1} = f_t(x_t),

    and, with ``base="normal"``, :math:`-\tfrac12(|z|^2 + D \log 2\pi)` is added: it is then the log-density of ``x``.

    Gradients reach ``x``, ``context`` and all tensors but the permutations and signs of PLU steps.  Kept for the
    backward pass are the inputs of all steps but permutations, and ``z``: ``N D`` numbers each.

    With ``inverse``, ``x`` is latent and the result is data with the log-determinant of this direction; a LinearStep
    then takes the inverse of its matrix, and the log-determinant of the matrix itself.  An autoregressive step, whose
    network reads what it moves, finds one feature after the other, and computes each unit of its network once.

    Args:
        x: data ``[N, D]``, float32 or float64.
        program: the steps.
        tensors: their tensors, in the order and of the shapes that ``program.tensors`` says; of the dtype of ``x``,
            the permutation of a PLU step int64.
        context: ``[N, K]`` for a program with ``context_features``, else None.
        inverse: from latent to data.

    Returns:
        ``(z, log_det)``: ``[N, D]`` and ``[N]`` in nats, in the dtype of ``x``.

    Raises:
        TypeError: for a program that is none, other dtypes, and tensors that are no list of tensors.
        ValueError: for shapes that do not fit the program, a context that is missing or not wanted, tensors on
            different devices, and the inverse of a program with a base.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017); Papamakarios, Pavlakou and
    Murray, "Masked Autoregressive Flow for Density Estimation" (2017); Durkan, Bekasov, Murray and Papamakarios,
    "Neural Spline Flows" (2019).

    Example:
        >>> import torch
        >>> from pyflowkern import ops
        >>> net = ops.ChainNetwork([ops.ChainLayer(8, 1), ops.ChainLayer(2, 8)])
        >>> coupling = ops.ElementsStep("tanh", moves=[1], reads=[0], network=net)
        >>> program = ops.ChainProgram(2, [coupling, ops.PermuteStep([1, 0])], base="normal")
        >>> tensors = [torch.zeros(wanted.shape) for wanted in program.tensors]  # the identity
        >>> z, log_prob = ops.chain(torch.tensor([[0.0, 1.0]]), program, tensors)
        >>> z.tolist(), [round(v, 4) for v in log_prob.tolist()]
        ([[1.0, 0.0]], [-2.3379])
    """
    _check(x, program, tensors, context, inverse)
    given = list(tensors)
    floating = [t for t in given if t.is_floating_point()]
    serves = kernel_serves("chain", x, context, *floating, dtypes=CHAIN_DTYPES)
    if not serves or not computes(program, x, inverse):
        return run_steps(x, context, program, given, inverse)
    return run_chain(x, context, program, given, inverse)


def computes(program: ChainProgram, x: Tensor, inverse: bool) -> bool:
    """Whether the kernel of a tensor's device runs a program in a direction."""
    if inverse and not program.invertible:
        return False
    special = program.special or (inverse and program.autoregressive)
    return not special or x.device.type in WHOLE


def run_chain(
    x: Tensor,
    context: Tensor | None,
    program: ChainProgram,
    tensors: list[Tensor],
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`chain` does, by the kernel, which compares every tensor with the program itself.

    Raises:
        RuntimeError: for tensors that do not fit the program.
    """
    z, log_det, _ = _op(
        x,
        context,
        program.codes,
        program.numbers,
        tensors,
        program.blocks if _differentiated(x, context, tensors) else 0,
        inverse,
    )
    return z, log_det


def chain_reference(
    x: Tensor,
    program: ChainProgram,
    tensors: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`chain` in plain PyTorch, step by step, differentiable by autograd to any order."""
    _check(x, program, tensors, context, inverse)
    return run_steps(x, context, program, tensors, inverse)


def _differentiated(x: Tensor, context: Tensor | None, tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, context, *tensors)
        )
    return torch.is_grad_enabled() and torch._C._any_requires_grad(x, context, *tensors)


# --- argument checks -----------------------------------------------------------------------------


def _check(
    x: Tensor,
    program: ChainProgram,
    tensors: Sequence[Tensor],
    context: Tensor | None,
    inverse: bool,
) -> None:
    if not isinstance(program, ChainProgram):
        raise TypeError(f"program must be a ChainProgram, got {type(program).__name__}")
    if check_flag("inverse", inverse) and not program.invertible:
        raise ValueError(
            f"inverse needs a program without a base, got one that has base={program.base!r}"
        )
    check_floating("x", x)
    if x.dtype not in CHAIN_DTYPES:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != program.features:
        raise ValueError(f"x must have shape [N, {program.features}], got {tuple(x.shape)}")
    check_context(context, program.context_features, x)
    if context is not None and context.dtype != x.dtype:
        raise TypeError(f"context must have the dtype of x, {x.dtype}, got {context.dtype}")
    check_same_device(x=x, context=context)
    check_list("tensors", tensors)
    if len(tensors) != len(program.tensors):
        raise ValueError(f"tensors must be {len(program.tensors)} tensors, got {len(tensors)}")
    for i, (t, wanted) in enumerate(zip(tensors, program.tensors, strict=True)):
        name = f"tensors[{i}], the {wanted.name},"
        if wanted.integers:
            if not isinstance(t, Tensor) or t.dtype != torch.int64:
                given = getattr(t, "dtype", type(t).__name__)
                raise TypeError(f"{name} must be an int64 tensor, got {given}")
            check_dense(name, t)
        else:
            check_floating(name, t)
            if t.dtype != x.dtype:
                raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        check_shape(name, t, wanted.shape)
        check_same_device(x=x, **{f"tensors[{i}]": t})


# --- ops -----------------------------------------------------------------------------------------


def _fake(
    x: Tensor,
    context: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    tensors: list[Tensor],
    blocks: int,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, features = x.shape
    kept = blocks * features * ((n + _TILE - 1) // _TILE * _TILE)
    return x.new_empty(n, features), x.new_empty(n), x.new_empty(kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, context, program, numbers, tensors, ctx.blocks, ctx.inverse = inputs
    ctx.save_for_backward(x, context, output[2], program, numbers, *tensors)
    ctx.set_materialize_grads(False)


def _inputs(ctx: Any) -> tuple[Any, ...]:
    x, context, _, program, numbers, *tensors = ctx.saved_tensors
    return x, context, program, numbers, tensors, ctx.blocks, ctx.inverse


def _op_reference(
    x: Tensor,
    context: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    tensors: list[Tensor],
    blocks: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Do what the op does, but for what it keeps."""
    return run_steps(x, context, ChainProgram.of(program, numbers), tensors, inverse)


def _backward(
    ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if not ctx.blocks:  # a graph exported without gradients kept nothing, and may meet them later
        return tuple(gradient_of_reference(_op_reference, _inputs(ctx), (grad_z, grad_log_det)))
    x, context, kept, program, numbers, *tensors = ctx.saved_tensors
    with_context = context is not None and context.requires_grad
    with_tensors = any(t.requires_grad for t in tensors)
    grad_x, grad_context, grads = _backward_op(
        grad_z,
        grad_log_det,
        *(x, kept, context, program, numbers, tensors),
        *(ctx.inverse, x.requires_grad, with_context, with_tensors),
    )
    return (
        grad_x if x.requires_grad else None,
        grad_context if with_context else None,
        *(None, None),
        grads
        if with_tensors
        else [None] * len(tensors),  # of tensors that require none autograd drops them
        *(None, None),
    )


def _backward_fake(
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    kept: Tensor,
    context: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    tensors: list[Tensor],
    inverse: bool,
    with_x: bool,
    with_context: bool,
    with_tensors: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    n, size = x.shape[0], 0 if context is None else context.shape[1]
    return (
        x.new_empty(n if with_x else 0, x.shape[1]),
        x.new_empty(n if with_context and context is not None else 0, size),
        [x.new_empty(t.shape if with_tensors else 0) for t in tensors],
    )


def _flops(
    x: torch.Size,
    context: torch.Size | None,
    program: torch.Size,
    numbers: torch.Size,
    tensors: list[torch.Size],
    *_: Any,
) -> int:
    """Count a product with each matrix, the masked weights with the others, as torch does for layers with masks."""
    square = torch.Size((x[1], x[1]))
    factors = 0  # of PLU steps, whose two triangles lie side by side and are one matrix
    for a, b in itertools.pairwise(tensors):
        factors += a == square and b == square
    entries = sum(shape.numel() for shape in tensors if len(shape) == 2)
    return 2 * x[0] * (entries - factors * square.numel()) + 2 * factors * x[1] ** 3


def _backward_flops(
    grad_z: torch.Size | None,
    grad_log_det: torch.Size | None,
    x: torch.Size,
    kept: torch.Size,
    context: torch.Size | None,
    program: torch.Size,
    numbers: torch.Size,
    tensors: list[torch.Size],
    inverse: bool,
    with_x: bool,
    with_context: bool,
    with_tensors: bool,
) -> int:
    return (1 + with_tensors) * _flops(x, context, program, numbers, tensors)


# the third result is what is kept for the backward pass: the inputs of steps, and z, by tiles
_op = register(
    "chain(Tensor x, Tensor? context, Tensor program, Tensor numbers, Tensor[] tensors, int blocks,"
    " bool inverse)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    reference=_op_reference,
    inputs=_inputs,
    flops=_flops,
)
_backward_op = register(
    "chain_backward(Tensor? grad_z, Tensor? grad_log_det, Tensor x, Tensor kept, Tensor? context,"
    " Tensor program, Tensor numbers, Tensor[] tensors, bool inverse, bool with_x,"
    " bool with_context, bool with_tensors) -> (Tensor, Tensor, Tensor[])",
    fake=_backward_fake,
    flops=_backward_flops,
)
