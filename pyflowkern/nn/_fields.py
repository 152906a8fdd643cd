r"""What all vector fields share: checks, time and context, products with the Jacobian, layers that are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core import activations
from pyflowkern.core.checks import check_choice, check_flag, check_floating, is_integer
from pyflowkern.core.dtypes import accumulation_dtype, full_precision
from pyflowkern.ops.field import ACTIVATIONS, hutchinson_trace
from pyflowkern.ops.field_layer import spread
from pyflowkern.ops.field_time import TIMES
from pyflowkern.ops.probe import expand_probe, probe_of

__all__ = [
    "DivergenceField",
    "FieldLinear",
    "Wanted",
    "add_context",
    "as_time",
    "call_layers",
    "check_field",
    "check_states",
    "each_sample",
    "of_samples",
    "parameters_of",
    "probes_of",
    "work_dtype",
]


class FieldLinear(torch.nn.Linear):
    """A linear layer that ``quantize_dynamic`` keeps: a quantized layer has no derivative, hence no trace."""


def check_states(x: Tensor, size: int | None = None, rank: int = 2) -> None:
    """Raise unless ``x`` is ``[N, ...]``, with ``size`` ``[N, size]`` or, of rank 4, ``[N, size, H, W]``."""
    check_floating("x", x)
    if x.dim() < 2 or (size is not None and (x.dim() != rank or x.shape[1] != size)):
        want = "[N, ...]" if size is None else f"[N, {size}{', H, W' if rank == 4 else ''}]"
        raise ValueError(f"x must have shape {want}, got {tuple(x.shape)}")


def check_field(
    name: str, size: int, hidden: Sequence[int], activation: str, time: str
) -> list[int]:
    """Return the sizes of a field's layers, input and output included; raise unless the arguments fit."""
    if not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a sequence of ints, got {hidden!r}")
    sizes = [size, *hidden, size]
    if not all(is_integer(n) and n >= 1 for n in sizes):
        raise ValueError(f"{name} and hidden must be ints of at least 1, got {size} and {hidden}")
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("time", time, TIMES)
    return [int(n) for n in sizes]


def parameters_of(
    layers: Iterable[torch.nn.Module], size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and biases of a field's layers, which must still fit each other."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    width = size
    for i, layer in enumerate(layers):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if bias is None or weight.shape[1] != width or weight.shape[:1] != bias.shape:
            got = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"layers[{i}] must take {width} and have a bias, got a weight of shape "
                f"{tuple(weight.shape)} and a bias of shape {got}"
            )
        width = weight.shape[0]
        weights.append(weight)
        biases.append(bias)
    if width != size:
        raise ValueError(f"the last layer must give {size}, got {width}")
    return weights, biases


def add_context(
    biases: Sequence[Tensor], context: Tensor, matrices: Iterable[Tensor]
) -> list[Tensor]:
    """Return ``bias + context C^T`` of each layer, ``[N, out]``."""
    with full_precision(context):
        c = context.to(biases[0].dtype)
        pairs = zip(biases, matrices, strict=True)
        return [torch.addmm(b, c, m.to(b.dtype).t()) for b, m in pairs]


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return a time as a scalar or ``[N]``, in the dtype that fields compute in; ``[N, 1, ...]`` is also accepted."""
    dtype = accumulation_dtype(x.dtype)
    if not isinstance(t, Tensor):
        return torch.full((), float(t), dtype=dtype, device=x.device)
    if t.dim() > 1 and t.shape[0] == t.numel():
        t = t.flatten()
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(f"t must be a scalar or have shape ({x.shape[0]},), got {tuple(t.shape)}")
    return t.to(dtype)


class Wanted(NamedTuple):
    """What is wanted of a divergence: see :meth:`DivergenceField.velocity_and_divergence`."""

    probe: Tensor | None
    probes: int
    method: str
    per_probe: bool
    regularizers: bool


class DivergenceField(torch.nn.Module):
    """A field that knows its divergence: from reverse-mode products, unless a subclass has a fused pass."""

    def velocity_and_divergence(
        self,
        t: Tensor | float,
        x: Tensor,
        *,
        probe: Tensor | None = None,
        probes: int = 1,
        method: str = "hutchinson",
        per_probe: bool = False,
        regularizers: bool = False,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        r"""Return the velocity and :math:`\operatorname{div} f` in one pass.

        Args:
            t: a float, a scalar tensor or ``[N]``.
            x: states ``[N, ...]``.
            probe: ``[N, ...]``, ``[K, N, ...]`` or the seed of signs (:func:`~pyflowkern.ops.draw_probe`);
                the same over a solve.
            probes: ``K`` for a seed.
            method: "hutchinson" or "exact".
            per_probe: return the estimates ``[K, N]`` in place of their mean.
            regularizers: also return :math:`|f|^2` and :math:`|J e|^2`.
            context: ``[N, context_features]``.

        Returns:
            ``(velocity[N, ...], divergence[N])``, and with ``regularizers`` ``kinetic`` and
            ``frobenius`` ``[N]``.

        Raises:
            TypeError: for states that are not floating-point, and flags that are no bools.
            ValueError: for shapes that do not fit, an unknown method, or a probe that is missing
                or too many.
        """
        self._check(x)
        check_flag("per_probe", per_probe)
        check_flag("regularizers", regularizers)
        run = self._fused if self._may_be_read else self._by_products
        wanted = Wanted(probe, probes, method, per_probe, regularizers)
        return run(t, x, context, wanted)

    @property
    def _may_be_read(self) -> bool:
        """Whether :meth:`_fused` gives what calling the layers would."""
        return False

    def _check(self, x: Tensor) -> None:
        check_states(x)

    def _fused(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _by_products(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        probe, probes, method, per_probe, regularizers = wanted
        e = probes_of(x, probe, probes, method)
        recorded = torch.is_grad_enabled()
        if transformed() or torch.compiler.is_dynamo_compiling():  # which know this way alone
            velocity, pull = torch.func.vjp(lambda start: self(t, start, context), x)  # type: ignore[misc]
            products = [pull(v)[0] for v in e]
        else:
            with torch.enable_grad():
                start = x if x.requires_grad else x.detach().requires_grad_()
                velocity = self(t, start, context)
                products = [_product(velocity, start, v, recorded) for v in e]
        pairs = [hutchinson_trace(v, p, with_norm=True) for v, p in zip(e, products, strict=True)]
        traces, norms = (torch.stack(list(part)) for part in zip(*pairs, strict=True))
        if not recorded:
            velocity = velocity.detach()
        exact = method == "exact"
        divergence = traces.sum(0) if exact else traces if per_probe else traces.mean(0)
        if not regularizers:
            return velocity, divergence
        kinetic = velocity.flatten(1).square().sum(1)
        return velocity, divergence, kinetic, norms.sum(0) if exact else norms.mean(0)


def of_samples(factor: Tensor | float, x: Tensor) -> bool:
    """Whether a factor is a number, or one for each sample, ``[N, 1]``."""
    if not isinstance(factor, Tensor):
        return True
    return factor.dtype == x.dtype and factor.shape == (len(x), 1)


def each_sample(factor: Tensor | float, x: Tensor) -> Tensor | None:
    """Return such a factor as ``[N]``, None for 1."""
    if isinstance(factor, Tensor):
        return factor.squeeze(1)
    return None if factor == 1 else x.new_full((len(x),), factor)


def _product(velocity: Tensor, x: Tensor, e: Tensor, recorded: bool) -> Tensor:
    """Return ``e^T J``, zero where the velocity does not depend on ``x``."""
    if not velocity.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(
        velocity, x, e, create_graph=recorded, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(x) if product is None else product


def probes_of(x: Tensor, probe: Tensor | None, probes: int, method: str) -> Tensor:
    """Return probes ``[K, N, ...]`` for states ``[N, ...]``; those of "exact" are the unit vectors."""
    flat = x.flatten(1)
    if isinstance(probe, Tensor) and x.dim() > 2 and probe.shape[1 - x.dim() :] == x.shape[1:]:
        probe = probe.flatten(1 - x.dim())
    e, count = probe_of(method, probe, probes, flat, flat.dtype)
    if e is None:
        unit = torch.eye(count, dtype=x.dtype, device=x.device)
        return unit.view(count, 1, *x.shape[1:]).expand(count, *x.shape)
    return expand_probe(e, count, flat).view(count, *x.shape)


def call_layers(
    x: Tensor,
    layers: Sequence[torch.nn.Module],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    activation: str,
) -> Tensor:
    """Return the velocity by calling each layer, so that its hooks run; ``biases`` is what time and context add."""
    own = next((p.dtype for m in layers for p in m.parameters() if p.is_floating_point()), x.dtype)
    h = x
    for i, layer in enumerate(layers):
        h = layer(h.to(own))
        if gates and (gate := gates[i]) is not None:
            h = h * spread(gate, h)
        h = h + spread(biases[i], h)
        if i < len(layers) - 1:
            h = activations.ACTIVATIONS[activation](h)
    return h.to(x.dtype)


def work_dtype(x: Tensor, layers: Iterable[torch.nn.Module]) -> torch.dtype:
    """Return the dtype that a field computes in: float32 or float64."""
    first = next((p for m in layers for p in m.parameters() if p.is_floating_point()), x)
    return accumulation_dtype(torch.promote_types(x.dtype, first.dtype))
