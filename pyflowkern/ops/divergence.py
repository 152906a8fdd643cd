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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern._library import kernel_serves
from pyflowkern.ops._probe import as_probe, expand_probe
from pyflowkern.ops._registry import (
    accumulation_dtype,
    cast,
    check_floating,
    check_same_device,
    check_shape,
    full_precision,
    gradient_of_reference,
    register,
)

__all__ = [
    "ACTIVATIONS",
    "activation_and_slope",
    "field_divergence",
    "field_divergence_reference",
    "hutchinson_trace",
    "hutchinson_trace_reference",
]

ACTIVATIONS = ("tanh", "softplus", "silu", "gelu")
_KEEP, _IN_CACHE, _NORM = 1, 2, 4
#: Layers up to this size go through the CPU's caches in one op; wider ones are left to BLAS.
_MOST_IN_CACHE = 128

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
        gates: factors on the products, shaped like biases; None for none.
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
    work, gates = _check_field(x, weights, biases, gates, activation)
    e, probes = _probe_of(method, probe, probes, x, work)
    layers = _cast_all(weights, work), _cast_all(biases, work), _cast_all(gates, work)
    return evaluate_field(
        x, e, probes, layers, activation, method, per_probe=per_probe, regularizers=regularizers
    )


def evaluate_field(
    x: Tensor,
    e: Tensor,
    probes: int,
    layers: Field,
    activation: str,
    method: str,
    *,
    per_probe: bool = False,
    regularizers: bool = False,
) -> tuple[Tensor, ...]:
    """Do what :func:`field_divergence` does, with arguments that have been checked."""
    work = layers[0][0].dtype
    inputs = (cast(x, work), e, probes, *layers)
    if method == "exact" and not regularizers and _is_shallow(layers):
        y, divergence = _exact(inputs[0], layers, activation)
        return cast(y, x.dtype), divergence
    if _use_reference(inputs[0], e, layers):
        with full_precision(x):
            y, trace, norm = _stacked_reference(*inputs, activation, regularizers)
    else:
        flags = _flags(inputs[0], layers, regularizers)
        kind = ACTIVATIONS.index(activation)
        y, trace, norm, _ = _field_op(*inputs[:3], *map(list, layers), kind, flags)
    return _results(x, y, trace, norm, method, per_probe, regularizers)


def hutchinson_trace(
    e: Tensor, je: Tensor, *, with_norm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Reduce a probe and its product with a Jacobian: :math:`e^T (J e)` of every sample.

    For fields of any kind: ``je`` comes from a forward-mode product, or as :math:`e^T J` from a
    reverse-mode one, which gives the same number.

    Args:
        e: probe ``[N, ...]``.
        je: the product, of the same shape.
        with_norm: also return :math:`|J e|^2`.

    Returns:
        ``[N]``, in float32 or float64; or two of them.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for different shapes.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import hutchinson_trace
        >>> e = torch.tensor([[1.0, -1.0]])
        >>> hutchinson_trace(e, e @ torch.tensor([[2.0, 5.0], [5.0, 3.0]])).tolist()
        [-5.0]
    """
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
        trace, norm = _trace_op(cast(e, work).reshape(rows), cast(je, work).reshape(rows))
    return (trace, norm) if with_norm else trace


# --- references ----------------------------------------------------------------------------------


def activation_and_slope(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return an activation and its derivative, both differentiable by autograd to any order."""
    if activation == "tanh":
        h = torch.tanh(a)
        return h, 1 - h * h
    if activation == "softplus":  # torch's own is linear from 20 on
        return -F.logsigmoid(-a), torch.sigmoid(a)
    if activation == "silu":
        q = torch.sigmoid(a)
        return a * q, q * (1 + a * torch.sigmoid(-a))
    cdf = 0.5 * torch.erfc(-a * 0.5**0.5)
    return a * cdf, cdf + a * torch.exp(-0.5 * a * a) * 0.39894228040143267794


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
    work, gates = _check_field(x, weights, biases, gates, activation)
    e, probes = _probe_of(method, probe, probes, x, work)
    layers = _cast_all(weights, work), _cast_all(biases, work), _cast_all(gates, work)
    y, trace, norm = _stacked_reference(
        cast(x, work), e, probes, *layers, activation, regularizers
    )
    return _results(x, y, trace, norm, method, per_probe, regularizers)


def _stacked_reference(
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor],
    activation: str,
    with_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y``, the traces ``[K, N]`` and the norms ``[K, N]`` (``[0, N]`` if not wanted)."""
    e = expand_probe(probe, probes, x)
    h, tangent = x, e
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h, tangent = h @ weight.t(), tangent @ weight.t()
        if gates:
            h, tangent = gates[i] * h, gates[i] * tangent
        h = h + bias
        if i < len(weights) - 1:
            h, slope = activation_and_slope(h, activation)
            tangent = slope * tangent
    norm = tangent.square().sum(-1)
    return h, (e * tangent).sum(-1), norm if with_norm else norm[:0]


def _exact_reference(
    x: Tensor,
    coupling: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the trace of a field with one or two hidden layers."""
    h, slopes = x, []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = h @ weight.t()
        h = (gates[i] * h if gates else h) + bias
        if i < len(weights) - 1:
            h, slope = activation_and_slope(h, activation)
            slopes.append(gates[i] * slope if gates else slope)
    if len(slopes) == 1:
        return h, slopes[0] @ coupling
    return h, (slopes[1] * (slopes[0] @ coupling.t())).sum(1)


def hutchinson_trace_reference(e: Tensor, je: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the trace and the norm of :func:`hutchinson_trace` in plain PyTorch."""
    work = accumulation_dtype(torch.promote_types(e.dtype, je.dtype))
    rows = (e.shape[0], math.prod(e.shape[1:]))
    a, b = e.to(work).reshape(rows), je.to(work).reshape(rows)
    return (a * b).sum(1), b.square().sum(1)


# --- argument checks -----------------------------------------------------------------------------


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
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    n, size = x.shape
    own = gates if gates is not None else []
    if not len(weights) == len(biases) or len(own) not in (0, len(weights)) or not len(weights):
        raise ValueError(
            "weights, biases and gates must have one entry a layer, got "
            f"{len(weights)}, {len(biases)} and {len(own)}"
        )
    dtype = x.dtype
    for i, weight in enumerate(weights):
        check_floating(f"weights[{i}]", weight)
        last = i == len(weights) - 1
        if (
            weight.dim() != 2
            or weight.shape[1] != size
            or (last and weight.shape[0] != x.shape[1])
        ):
            want = f"[{x.shape[1] if last else 'out'}, {size}]"
            raise ValueError(f"weights[{i}] must have shape {want}, got {tuple(weight.shape)}")
        size = weight.shape[0]
        for name, values in (("biases", biases), ("gates", own)):
            if not values:
                continue
            check_floating(f"{name}[{i}]", values[i])
            if tuple(values[i].shape) not in ((size,), (n, size)):
                raise ValueError(
                    f"{name}[{i}] must have shape ({size},) or ({n}, {size}), "
                    f"got {tuple(values[i].shape)}"
                )
            check_same_device(x=x, **{f"{name}[{i}]": values[i]})
        check_same_device(x=x, **{f"weights[{i}]": weight})
        dtype = torch.promote_types(dtype, weight.dtype)
    return accumulation_dtype(dtype), own


def _probe_of(
    method: str, probe: Tensor | None, probes: int, x: Tensor, work: torch.dtype
) -> tuple[Tensor, int]:
    if method == "exact":
        if probe is not None:
            raise ValueError("method='exact' takes no probe")
        size = x.shape[1]
        return torch.eye(size, dtype=work, device=x.device).view(size, 1, size), size
    if method != "hutchinson":
        raise ValueError(f"method must be 'hutchinson' or 'exact', got {method!r}")
    if probe is None:
        raise ValueError("method='hutchinson' needs a probe; draw_probe(x) draws one")
    check_same_device(x=x, probe=probe)
    return as_probe(probe, probes, x, work)


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
    last = weights[-1]
    with full_precision(x):
        if gates:
            last = gates[-1].unsqueeze(1) * last
        if len(weights) == 2:
            coupling = (last.t() * weights[0]).sum(1)
        else:
            coupling = weights[1] * (last.t() @ weights[0].t())
        if not kernel_serves("field_exact", x, coupling, *weights, *biases, *gates):
            return _exact_reference(x, coupling, *layers, activation)
    ones = x.new_ones(max(w.shape[0] for w in weights))
    kind = ACTIVATIONS.index(activation)
    found: tuple[Tensor, ...] = _exact_op(x, coupling, ones, *map(list, layers), kind)
    return found[0], found[1]


def _flags(x: Tensor, layers: Field, with_norm: bool) -> int:
    weights, biases, gates = layers
    widest = max(max(w.shape) for w in weights)
    keep = torch.is_grad_enabled() and (
        x.requires_grad or any(t.requires_grad for t in (*weights, *biases, *gates))
    )
    in_cache = x.device.type == "cpu" and widest <= _MOST_IN_CACHE
    # in cache the backward pass computes the products again: a third more, and nothing is kept
    return _KEEP * (keep and not in_cache) + _IN_CACHE * in_cache + _NORM * with_norm


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
        if method == "exact":
            return t.sum(0)
        return t.squeeze(0) if t.shape[0] == 1 else t.mean(0)

    divergence = trace if per_probe and method != "exact" else joined(trace)
    if not regularizers:
        return cast(y, x.dtype), divergence
    return cast(y, x.dtype), divergence, y.square().sum(1), joined(norm)


# --- schema, fake, autograd ----------------------------------------------------------------------


def _field_fake(
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[0]
    kept = sum((1 + probes) * n * w.shape[0] for w in weights[:-1]) if flags & _KEEP else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(probes, n),
        x.new_empty(probes if flags & _NORM else 0, n),
        x.new_empty(kept),
    )


def _field_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, probe, ctx.probes, weights, biases, gates, ctx.activation, ctx.flags = inputs
    ctx.layers = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, probe, output[3], *weights, *biases, *gates)


def _field_backward(
    ctx: Any,
    grad_y: Tensor | None,
    grad_trace: Tensor | None,
    grad_norm: Tensor | None,
    _: Tensor | None,
) -> tuple[Any, ...]:
    x, probe, kept, *parameters = ctx.saved_tensors
    n = ctx.layers
    weights, biases, gates = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
    if grad_norm is not None and not ctx.flags & _NORM:
        grad_norm = None
    if torch.is_grad_enabled():
        activation, norm = ACTIVATIONS[ctx.activation], bool(ctx.flags & _NORM)

        def forward(x: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
            layers = p[:n], p[n : 2 * n], p[2 * n :]
            return _stacked_reference(x, probe, ctx.probes, *layers, activation, norm)

        found = gradient_of_reference(
            forward,
            (x, *parameters),
            _filled(forward, x, parameters, grad_y, grad_trace, grad_norm),
        )
        grad_x, grads = found[0], found[1:]
        return grad_x, None, None, grads[:n], grads[n : 2 * n], grads[2 * n :], None, None
    grad_x, *lists = _field_backward_op(
        grad_y,
        grad_trace,
        grad_norm,
        x,
        probe,
        ctx.probes,
        weights,
        biases,
        gates,
        kept,
        ctx.activation,
        ctx.flags,
    )
    return (grad_x, None, None, *lists, None, None)


def _filled(
    forward: Any, x: Tensor, parameters: Sequence[Tensor], *grads: Tensor | None
) -> list[Tensor]:
    """Return the output gradients with zeros where there are none."""
    if all(g is not None for g in grads):
        return [g for g in grads if g is not None]
    with torch.no_grad():
        outputs = forward(x, *parameters)
    return [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True)]


def _field_backward_fake(
    grad_y: Tensor | None,
    grad_trace: Tensor | None,
    grad_norm: Tensor | None,
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    kept: Tensor,
    activation: int,
    flags: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    def like(tensors: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in tensors]

    return x.new_empty(x.shape), like(weights), like(biases), like(gates)


# probe: [probes, N or 1, D], or the seed of signs; the last result is what is kept for the backward
# pass, the products of all layers but the last
_field_op = register(
    "field_divergence(Tensor x, Tensor probe, SymInt probes, Tensor[] weights, Tensor[] biases, "
    "Tensor[] gates, int activation, int flags) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_field_fake,
    backward=_field_backward,
    setup_context=_field_setup,
)
_field_backward_op = register(
    "field_divergence_backward(Tensor? grad_y, Tensor? grad_trace, Tensor? grad_norm, Tensor x, "
    "Tensor probe, SymInt probes, Tensor[] weights, Tensor[] biases, Tensor[] gates, Tensor kept, "
    "int activation, int flags) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    fake=_field_backward_fake,
)


def _exact_fake(
    x: Tensor,
    coupling: Tensor,
    ones: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [w.shape[0] for w in weights[:-1]]
    kept = x.shape[0] * (sum(sizes) + sum(sizes[1:]))
    return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(kept)


def _exact_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, coupling, ones, weights, biases, gates, ctx.activation = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, coupling, ones, output[2], *weights, *biases, *gates)
    ctx.set_materialize_grads(False)


def _exact_backward(
    ctx: Any, grad_y: Tensor | None, grad_trace: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    x, coupling, ones, kept, *parameters = ctx.saved_tensors
    n = ctx.layers
    lists = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_trace = x.new_zeros(x.shape[0]) if grad_trace is None else grad_trace
    if torch.is_grad_enabled():

        def forward(x: Tensor, m: Tensor, *p: Tensor) -> tuple[Tensor, Tensor]:
            layers = p[:n], p[n : 2 * n], p[2 * n :]
            return _exact_reference(x, m, *layers, ACTIVATIONS[ctx.activation])

        found = gradient_of_reference(forward, (x, coupling, *parameters), (grad_y, grad_trace))
        grads = found[2:]
        return *found[:2], None, grads[:n], grads[n : 2 * n], grads[2 * n :], None
    grad_x, grad_m, *grad_lists = _exact_backward_op(
        grad_y, grad_trace, x, coupling, ones, *lists, kept, ctx.activation
    )
    return grad_x, grad_m, None, *grad_lists, None


def _exact_backward_fake(
    grad_y: Tensor,
    grad_trace: Tensor,
    x: Tensor,
    coupling: Tensor,
    ones: Tensor,
    *lists: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    weights, biases, gates = ([t.new_empty(t.shape) for t in part] for part in lists[:3])
    return x.new_empty(x.shape), coupling.new_empty(coupling.shape), weights, biases, gates


# ones: as many as the widest layer has outputs
_exact_op = register(
    "field_exact(Tensor x, Tensor coupling, Tensor ones, Tensor[] weights, Tensor[] biases, "
    "Tensor[] gates, int activation) -> (Tensor, Tensor, Tensor)",
    fake=_exact_fake,
    backward=_exact_backward,
    setup_context=_exact_setup,
)
_exact_backward_op = register(
    "field_exact_backward(Tensor grad_y, Tensor grad_trace, Tensor x, Tensor coupling, "
    "Tensor ones, Tensor[] weights, Tensor[] biases, Tensor[] gates, Tensor kept, int activation)"
    " -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    fake=_exact_backward_fake,
)


def _trace_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _trace_backward(
    ctx: Any, grad_trace: Tensor | None, grad_norm: Tensor | None
) -> tuple[Tensor | None, ...]:
    e, je = ctx.saved_tensors
    if torch.is_grad_enabled():
        zero = e.new_zeros(e.shape[0])
        grads = [zero if g is None else g for g in (grad_trace, grad_norm)]
        return tuple(gradient_of_reference(hutchinson_trace_reference, (e, je), grads))
    found: tuple[Tensor, Tensor] = _trace_backward_op(grad_trace, grad_norm, e, je)
    return found


_trace_op = register(
    "hutchinson_trace(Tensor e, Tensor je) -> (Tensor, Tensor)",
    fake=lambda e, je: (e.new_empty(e.shape[0]), e.new_empty(e.shape[0])),
    backward=_trace_backward,
    setup_context=_trace_setup,
)
_trace_backward_op = register(
    "hutchinson_trace_backward(Tensor? grad_trace, Tensor? grad_norm, Tensor e, Tensor je)"
    " -> (Tensor, Tensor)",
    fake=lambda t, n, e, je: (torch.empty_like(e), torch.empty_like(je)),
)
