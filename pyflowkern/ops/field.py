r"""Vector fields of dense layers with the divergence of their flow, and traces by Hutchinson.

A field has layers :math:`a_l = g_l \odot (W_l h_{l-1}) + b_l,\; h_l = \sigma(a_l)`, the last without
:math:`\sigma`; the gates ``g`` are optional.  Tangents go along with the primal,
:math:`\dot a_l = g_l \odot (W_l \dot h_{l-1}),\; \dot h_l = \sigma'(a_l) \odot \dot a_l`, so that one
stacked matrix product a layer serves both, and with the probe :math:`\dot h_0 = e`

.. math:: \operatorname{div} f = \operatorname{tr} J \approx e^T J e, \qquad E\,|J e|^2 = \|J\|_F^2,

the same number as the usual :math:`(e^T J) e`.  With cotangents :math:`\bar h, \bar{\dot h}` a layer's
VJP is :math:`\bar{\dot a} = \sigma' \bar{\dot h}`,
:math:`\bar a = \sigma' \bar h + \sigma'' \dot a\, \bar{\dot h}`, and again one stacked product each for
the weight and for the layer below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern._library import FLOATS, kernel_serves
from pyflowkern.core.checks import (
    check_choice,
    check_flag,
    check_floating,
    check_list,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import accumulation_dtype, cast, full_precision
from pyflowkern.ops._field_autograd import FLAT, IN_CACHE, KEEP, NORM, exact_op, field_op, trace_op
from pyflowkern.ops._field_reference import (
    ACTIVATIONS,
    exact_reference,
    hutchinson_trace_reference,
    stacked_reference,
)
from pyflowkern.ops.probe import probe_of

__all__ = [
    "ACTIVATIONS",
    "field_divergence",
    "field_divergence_reference",
    "hutchinson_trace",
    "hutchinson_trace_reference",
]

#: Layers up to this size go through the CPU's caches in one op; wider ones are left to BLAS.
_MOST_IN_CACHE = 1024

Field = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


# --- public functions ----------------------------------------------------------------------------


def field_divergence(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor] | None = None,
    *,
    probe: Tensor | None = None,
    probes: int = 1,
    activation: str = "tanh",
    method: str = "hutchinson",
    per_probe: bool = False,
    regularizers: bool = False,
) -> tuple[Tensor, ...]:
    r"""Evaluate a field :math:`f: R^D \to R^D` of dense layers and its divergence in one pass.

    Args:
        x: states ``[N, D]``.
        weights: of each layer, ``[out, in]``; the first takes ``D`` and the last gives ``D``.
        biases: of each layer, ``[out]``, or ``[N, out]`` where they differ between samples.
        gates: factors on the products, shaped like biases; None for none.  Derivatives take products of the gates of
            two layers, and of a gate with a weight: beyond 1e19 each they overflow in float32.
        probe: ``[N, D]``, ``[K, N, D]``, or the seed of signs (see
            :func:`~pyflowkern.ops.draw_probe`); not for ``method="exact"``.
        probes: ``K`` for a seed.
        activation: "tanh", "softplus", "silu" or "gelu".
        method: "hutchinson" (the mean of ``K`` estimates) or "exact": with one or two hidden
            layers in closed form, :math:`s_2^T M s_1` with the slopes :math:`s_l = g_l \sigma'(a_l)`
            and :math:`M = W_2 \odot (W_1 W_3)^T`, which costs one matrix product; from ``D``
            tangents for other fields, for gates of each sample on the output, and for the norm.
        per_probe: return the ``K`` estimates ``[K, N]`` in place of their mean.
        regularizers: also return :math:`|f|^2` and :math:`|J e|^2`, which RNODE penalizes.

    Returns:
        ``(velocity, divergence)``: ``[N, D]`` in the dtype of ``x`` and ``[N]`` in float32 or
        float64; with ``regularizers`` also ``kinetic`` and ``frobenius`` ``[N]``, the latter the
        mean of :math:`|J e|^2` over the probes, for "exact" :math:`\|J\|_F^2`.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit, an unknown method or activation, or a probe that
            is missing or too many.

    Source: Grathwohl et al. 2019, *FFJORD*; Finlay et al. 2020, *How to train your neural ODE*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import field_divergence
        >>> x, w = torch.zeros(3, 2), torch.tensor([[1.0, 5.0], [0.0, 2.0]])
        >>> velocity, divergence = field_divergence(x, [w], [torch.ones(2)], method="exact")
        >>> velocity[0].tolist(), divergence.tolist()
        ([1.0, 1.0], [3.0, 3.0, 3.0])
    """
    per_probe = check_flag("per_probe", per_probe)
    regularizers = check_flag("regularizers", regularizers)
    e, probes, layers = _checked(x, weights, biases, gates, activation, method, probe, probes)
    return evaluate_field(
        x, e, probes, layers, activation, method, per_probe=per_probe, regularizers=regularizers
    )


def evaluate_field(
    x: Tensor,
    e: Tensor | None,
    probes: int,
    layers: Field,
    activation: str,
    method: str,
    *,
    per_probe: bool = False,
    regularizers: bool = False,
) -> tuple[Tensor, ...]:
    """Do what :func:`field_divergence` does, with arguments that have been checked; "exact" takes no probe."""
    work = layers[0][0].dtype
    if method == "exact" and not regularizers and _is_shallow(layers):
        y, divergence = _exact(cast(x, work), layers, activation)
        return cast(y, x.dtype), divergence
    if e is None:
        e = _unit_probes(x, work)
    inputs = (cast(x, work), e, probes, *layers)
    if _use_reference(inputs[0], e, layers):
        with full_precision(x):
            y, trace, norm = stacked_reference(*inputs, activation, regularizers)
    else:
        flags = _flags(inputs[0], layers, regularizers) + FLAT * (probes == 1 and not per_probe)
        kind = ACTIVATIONS.index(activation)
        y, trace, norm, _ = field_op(*inputs[:3], *map(list, layers), kind, flags)
    return _results(x, y, trace, norm, method, per_probe, regularizers)


def evaluate_velocity(x: Tensor, layers: Field, activation: str) -> Tensor:
    """Return the velocity alone, of arguments that have been checked."""
    x = cast(x, layers[0][0].dtype)
    none = x.new_empty(0, 1, x.shape[1])  # probes
    if _use_reference(x, none, layers):
        return stacked_reference(x, none, 0, *layers, activation, False)[0]
    kind = ACTIVATIONS.index(activation)
    outputs: tuple[Tensor, ...] = field_op(
        x, none, 0, *map(list, layers), kind, _flags(x, layers, False)
    )
    return outputs[0]


def hutchinson_trace(
    e: Tensor, je: Tensor, *, with_norm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Reduce a probe and its product with a Jacobian: :math:`e^T (J e)` of every sample.

    :math:`e^T J e` has the expectation :math:`\operatorname{tr} J` where :math:`E\,e e^T = I`, and
    :math:`|J e|^2` that of :math:`\|J\|_F^2`.  For fields of any kind: ``je`` comes from a forward-mode product, or as
    :math:`e^T J` from a reverse-mode one, which gives the same number.

    Args:
        e: probe ``[N, ...]``.
        je: the product, of the same shape.
        with_norm: also return :math:`|J e|^2`.

    Returns:
        ``[N]``, in float32 or float64; or two of them.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for different shapes.

    Source: Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import hutchinson_trace
        >>> e = torch.tensor([[1.0, -1.0]])
        >>> hutchinson_trace(e, e @ torch.tensor([[2.0, 5.0], [5.0, 3.0]])).tolist()
        [-5.0]
    """
    with_norm = check_flag("with_norm", with_norm)
    check_floating("e", e)
    check_floating("je", je)
    check_shape("je", je, e.shape)
    check_same_device(e=e, je=je)
    if e.dim() < 1:
        raise ValueError("e must have a batch axis, got a scalar")
    work = accumulation_dtype(torch.promote_types(e.dtype, je.dtype))
    if not kernel_serves("hutchinson_trace", e, je):
        trace, norm = hutchinson_trace_reference(e, je)
    else:
        rows = (e.shape[0], math.prod(e.shape[1:]))
        trace, norm = trace_op(cast(e, work).reshape(rows), cast(je, work).reshape(rows))
    return (trace, norm) if with_norm else trace


# --- references ----------------------------------------------------------------------------------


def field_divergence_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor] | None = None,
    *,
    probe: Tensor | None = None,
    probes: int = 1,
    activation: str = "tanh",
    method: str = "hutchinson",
    per_probe: bool = False,
    regularizers: bool = False,
) -> tuple[Tensor, ...]:
    """Compute :func:`field_divergence` in plain PyTorch, differentiable to any order."""
    per_probe = check_flag("per_probe", per_probe)
    regularizers = check_flag("regularizers", regularizers)
    e, probes, layers = _checked(x, weights, biases, gates, activation, method, probe, probes)
    work = layers[0][0].dtype
    if e is None:
        e = _unit_probes(x, work)
    y, trace, norm = stacked_reference(cast(x, work), e, probes, *layers, activation, regularizers)
    return _results(x, y, trace, norm, method, per_probe, regularizers)


# --- argument checks -----------------------------------------------------------------------------


def _checked(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor] | None,
    activation: str,
    method: str,
    probe: Tensor | None,
    probes: int,
) -> tuple[Tensor | None, int, Field]:
    """Return the probe, None for "exact", the number of probes, and the layers in the dtype to compute in."""
    work, gates = _check_field(x, weights, biases, gates, activation)
    e, probes = probe_of(method, probe, probes, x, work)  # which says what a probe must be
    check_same_device(x=x, probe=probe)
    return e, probes, (_cast_all(weights, work), _cast_all(biases, work), _cast_all(gates, work))


def _check_field(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor] | None,
    activation: str,
) -> tuple[torch.dtype, Sequence[Tensor]]:
    """Raise unless the layers fit; return the dtype to compute in, and the gates as a list."""
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, D], got {tuple(x.shape)}")
    check_choice("activation", activation, ACTIVATIONS)
    given: Sequence[Tensor] = gates if gates is not None else []
    for name, tensors in (("weights", weights), ("biases", biases), ("gates", given)):
        check_list(name, tensors)
    count = len(weights)
    if not count or len(biases) != count or len(given) not in (0, count):
        raise ValueError(
            "weights, biases and gates must have one entry a layer, got "
            f"{count}, {len(biases)} and {len(given)}"
        )
    n, features = x.shape
    dtype, device, size = x.dtype, x.device, features
    for i, weight in enumerate(weights):
        _check_parameter("weights", i, weight, device)
        shape = weight.shape
        if len(shape) != 2 or shape[1] != size or (i == count - 1 and shape[0] != features):
            want = f"[{features if i == count - 1 else 'out'}, {size}]"
            raise ValueError(f"weights[{i}] must have shape {want}, got {tuple(shape)}")
        size = shape[0]
        _check_units("biases", i, biases[i], n, size, device)
        if given:
            _check_units("gates", i, given[i], n, size, device)
        dtype = torch.promote_types(dtype, weight.dtype)
    return accumulation_dtype(dtype), given


def _check_units(
    name: str, i: int, values: Tensor, n: int, size: int, device: torch.device
) -> None:
    _check_parameter(name, i, values, device)
    shape = values.shape
    if shape != (size,) and shape != (n, size):
        raise ValueError(
            f"{name}[{i}] must have shape ({size},) or ({n}, {size}), got {tuple(shape)}"
        )


def _check_parameter(name: str, i: int, values: Tensor, device: torch.device) -> None:
    if (
        not isinstance(values, Tensor)
        or values.dtype not in FLOATS
        or values.layout != torch.strided
    ):
        check_floating(f"{name}[{i}]", values)
    if values.device != device:
        raise ValueError(
            f"all tensors must be on the device of x, {device}, got {name}[{i}] on {values.device}"
        )


def _unit_probes(x: Tensor, work: torch.dtype) -> Tensor:
    """Return the unit vectors ``[D, 1, D]``: the probes of a trace that is exact."""
    return torch.eye(x.shape[1], dtype=work, device=x.device)[:, None]


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [cast(t, dtype) for t in tensors]


def _use_reference(x: Tensor, probe: Tensor, layers: Field) -> bool:
    if probe.requires_grad:
        return True
    e = probe if probe.is_floating_point() else None
    return not kernel_serves("field_divergence", x, e, *layers[0], *layers[1], *layers[2])


def _is_shallow(layers: Field) -> bool:
    """Whether the exact trace has a closed form: it needs one output gate for all samples."""
    weights, _, gates = layers
    return len(weights) in (2, 3) and (not gates or gates[-1].dim() == 1)


def _exact(x: Tensor, layers: Field, activation: str) -> tuple[Tensor, Tensor]:
    weights, biases, gates = layers
    if not kernel_serves("field_exact", x, *weights, *biases, *gates):
        with full_precision(x):
            return exact_reference(x, *layers, activation)
    kind, flags = ACTIVATIONS.index(activation), _flags(x, layers, False)
    outputs: tuple[Tensor, ...] = exact_op(x, *map(list, layers), kind, flags)
    return outputs[0], outputs[1]


def _flags(x: Tensor, layers: Field, with_norm: bool) -> int:
    weights, biases, gates = layers
    widest = max(max(w.shape) for w in weights)
    keep = torch.is_grad_enabled() and (
        x.requires_grad or any(t.requires_grad for t in (*weights, *biases, *gates))
    )
    in_cache = x.device.type == "cpu" and widest <= _MOST_IN_CACHE
    return KEEP * keep + IN_CACHE * in_cache + NORM * with_norm


def _results(
    x: Tensor,
    y: Tensor,
    trace: Tensor,
    norm: Tensor,
    method: str,
    per_probe: bool,
    regularizers: bool,
) -> tuple[Tensor, ...]:
    def joined(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return t
        if method == "exact":
            return t.sum(0)
        return t.squeeze(0) if t.shape[0] == 1 else t.mean(0)

    divergence = trace if per_probe and method != "exact" else joined(trace)
    if not regularizers:
        return cast(y, x.dtype), divergence
    return cast(y, x.dtype), divergence, y.square().sum(1), joined(norm)
