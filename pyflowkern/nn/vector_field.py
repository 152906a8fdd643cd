r"""Vector fields :math:`f(t, x)` that know their divergence."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern.core.checks import check_floating
from pyflowkern.core.dtypes import accumulation_dtype, autocasts, cast, full_precision
from pyflowkern.nn._base import check_count
from pyflowkern.ops._probe import as_probe, expand_probe
from pyflowkern.ops.field import (
    ACTIVATIONS,
    activation_and_slope,
    evaluate_field,
    evaluate_velocity,
    hutchinson_trace,
)
from pyflowkern.ops.field_time import at_time

__all__ = ["VectorField", "VectorFieldMLP"]

TIMES = ("none", "concat", "concatsquash")
METHODS = ("hutchinson", "exact")


def check_states(x: Tensor, size: int | None = None, rank: int = 2) -> None:
    """Raise unless ``x`` is ``[N, ...]``, with ``size`` ``[N, size]`` or, of rank 4, ``[N, size, H, W]``."""
    check_floating("x", x)
    if x.dim() < 2 or (size is not None and (x.dim() != rank or x.shape[1] != size)):
        want = "[N, ...]" if size is None else f"[N, {size}{', H, W' if rank == 4 else ''}]"
        raise ValueError(f"x must have shape {want}, got {tuple(x.shape)}")


def check_field(
    name: str, size: int, hidden: Sequence[int], activation: str, time: str
) -> list[int]:
    """Raise unless the arguments make a field; return the sizes of all its layers."""
    if not isinstance(hidden, Iterable):
        raise TypeError(f"hidden must be a sequence of ints, got {hidden!r}")
    sizes = [size, *hidden, size]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"{name} and hidden must be ints of at least 1, got {size} and {hidden}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if time not in TIMES:
        raise ValueError(f"time must be one of {', '.join(TIMES)}, got {time!r}")
    return sizes


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
        if layer._forward_pre_hooks:
            warnings.warn(
                "the layers of a field are not called and their hooks do not run; "
                "torch.nn.utils.parametrizations work",
                stacklevel=4,
            )
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


def check_context(context: Tensor | None, features: int, x: Tensor) -> None:
    """Raise unless the context is ``[N, features]``, or None for a field that takes none."""
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
    if context is None and not features:
        return
    if context is None or not features or tuple(context.shape) != (x.shape[0], features):
        want = f"have shape ({x.shape[0]}, {features})" if features else "be None"
        got = None if context is None else tuple(context.shape)
        raise ValueError(f"context must {want}, got {got}")


def add_context(
    biases: Sequence[Tensor], context: Tensor, matrices: Iterable[Tensor]
) -> list[Tensor]:
    """Return ``bias + context C^T`` of each layer, ``[N, out]``."""
    with full_precision(context):
        c = context.to(biases[0].dtype)
        pairs = zip(biases, matrices, strict=True)
        return [torch.addmm(b, c, m.to(b.dtype).t()) for b, m in pairs]


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return a time as a scalar or ``[N]``, in the dtype that fields compute in; ``[N, 1, ...]`` is one, too."""
    dtype = accumulation_dtype(x.dtype)
    if not isinstance(t, Tensor):
        return torch.full((), float(t), dtype=dtype, device=x.device)
    if t.dim() > 1 and t.shape[0] == t.numel():
        t = t.flatten()
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(f"t must be a scalar or have shape ({x.shape[0]},), got {tuple(t.shape)}")
    return t.to(dtype)


class VectorField(torch.nn.Module):
    r"""Any network :math:`f(t, x)` as a field with a divergence, by reverse-mode products.

    The estimate is FFJORD's :math:`(e^T J) e`; "exact" takes one product a dimension.  Works for
    every module that autograd differentiates, to the order that it does.

    Args:
        net: module called as ``net(t, x) -> [N, ...]``, shaped like ``x``; as ``net(t, x, context)``
            where there is a context.  The time is a scalar tensor, or ``[N, 1, ...]`` with the axes of
            ``x`` where each sample has its own.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.

    Raises:
        TypeError: for a net that is not a module, or a context size that is not an int.

    Source: Grathwohl et al. 2019, *FFJORD*.

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> class Spiral(torch.nn.Module):
        ...     def forward(self, t, x):
        ...         return torch.stack((3 * x[:, 0] - x[:, 1], x[:, 0] + 4 * x[:, 1]), 1)
        >>> field = nn.VectorField(Spiral())
        >>> field.velocity_and_divergence(0.0, torch.randn(2, 2), method="exact")[1].tolist()
        [7.0, 7.0]
    """

    def __init__(self, net: torch.nn.Module, *, context_features: int = 0) -> None:
        super().__init__()
        if not isinstance(net, torch.nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        check_count("context_features", context_features, 0)
        self.net, self.context_features = net, context_features

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, shaped like ``x``."""
        check_states(x)
        check_context(context, self.context_features, x)
        given = (x,) if context is None else (x, context)
        time = as_time(t, x)
        if time.dim():
            time = time.view(-1, *[1] * (x.dim() - 1))
        velocity: Tensor = self.net(time, *given)
        if velocity.shape != x.shape:
            raise ValueError(
                f"net must return shape {tuple(x.shape)}, got {tuple(velocity.shape)}"
            )
        return velocity

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
        """Return what :meth:`VectorFieldMLP.velocity_and_divergence` does."""
        check_states(x)
        e = probes_of(x, probe, probes, method)
        recorded = torch.is_grad_enabled()
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
    if method not in METHODS:
        raise ValueError(f"method must be 'hutchinson' or 'exact', got {method!r}")
    flat = x.flatten(1)
    if method == "exact":
        if probe is not None:
            raise ValueError("method='exact' takes no probe")
        size = flat.shape[1]
        unit = torch.eye(size, dtype=x.dtype, device=x.device)
        return unit.view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    if probe is None:
        raise ValueError("method='hutchinson' needs a probe; ops.draw_probe(x) draws one")
    if isinstance(probe, Tensor) and x.dim() > 2 and probe.shape[1 - x.dim() :] == x.shape[1:]:
        probe = probe.flatten(1 - x.dim())
    e, count = as_probe(probe, probes, flat, flat.dtype)
    return expand_probe(e, count, flat).view(count, *x.shape)


class VectorFieldMLP(torch.nn.Module):
    r"""A perceptron :math:`f(t, x)` whose velocity and divergence are one fused pass.

    Layers are :math:`h = \sigma(W h + b)`, the last without :math:`\sigma`.  Time enters nowhere
    ("none"), as a further input of every layer ("concat", :math:`W h + t w + b`), or as
    "concatsquash", :math:`(W h + b) \odot \mathrm{sigmoid}(t u + c) + t v`: FFJORD's layers.
    A context is a further input of every layer: :math:`C\,\text{context}` is added to its bias.

    Args:
        dims: ``D``, the dimension of states.
        hidden: widths of the hidden layers; the exact trace costs one matrix product with at most
            two of them.
        activation: "tanh", "softplus", "silu" or "gelu".
        time: "none", "concat" or "concatsquash".
        context_features: size ``K`` of a context ``[N, K]``; 0 for none.

    Raises:
        TypeError: for a context size that is not an int.
        ValueError: for sizes below 1, an unknown activation or kind of time; when called, for layers
            that were replaced and do not fit each other.

    The layers are not called: their hooks do not run (parametrizations do), and one before the
    forward, as of the old ``spectral_norm``, is warned of.

    Source: Grathwohl et al. 2019, *FFJORD: Free-form Continuous Dynamics for Scalable Reversible
    Generative Models*.

    Example:
        >>> import torch
        >>> from pyflowkern import nn, ops
        >>> field, x = nn.VectorFieldMLP(2, time="concatsquash"), torch.randn(5, 2)
        >>> probe = ops.draw_probe(x)
        >>> velocity, divergence = field.velocity_and_divergence(0.5, x, probe=probe)
        >>> tuple(velocity.shape), tuple(divergence.shape)
        ((5, 2), (5,))
    """

    def __init__(
        self,
        dims: int,
        hidden: Sequence[int] = (64, 64, 64),
        activation: str = "tanh",
        time: str = "none",
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        sizes = check_field("dims", dims, hidden, activation, time)
        check_count("context_features", context_features, 0)
        self.dims, self.hidden, self.activation, self.time = dims, tuple(hidden), activation, time
        self.context_features = context_features
        pairs = list(itertools.pairwise(sizes))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairs)
        # of every layer: "concat" the column of t, "concatsquash" slope and offset of the gate's
        # argument, and the slope of the bias
        count = {"none": 0, "concat": 1, "concatsquash": 3}[time]
        self.times = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(count, b).uniform_(-1, 1) / a**0.5)
            for a, b in pairs
            if count
        )
        self.contexts = torch.nn.ParameterList(
            torch.nn.Parameter(
                torch.empty(b, context_features).uniform_(-1, 1) / context_features**0.5
            )
            for _, b in pairs
            if context_features
        )

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity ``[N, D]`` at ``t``, a float, a scalar tensor or ``[N]``."""
        check_states(x, self.dims)
        layers = self._at(t, x, context)
        if not autocasts(x):
            return cast(evaluate_velocity(x, layers, self.activation), x.dtype)
        h = cast(x, layers[0][0].dtype)  # float64 is what autocast leaves alone
        for i, (weight, bias) in enumerate(zip(*layers[:2], strict=True)):
            h = F.linear(h, weight)
            h = (layers[2][i] * h if layers[2] else h) + bias
            if i < len(self.hidden):
                h = activation_and_slope(h, self.activation)[0]
        return h.to(x.dtype)

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
            x: states ``[N, D]``.
            probe: ``[N, D]``, ``[K, N, D]`` or the seed of signs (:func:`~pyflowkern.ops.draw_probe`);
                the same over a solve.
            probes: ``K`` for a seed.
            method: "hutchinson" or "exact".
            per_probe: return the estimates ``[K, N]`` in place of their mean.
            regularizers: also return :math:`|f|^2` and :math:`|J e|^2`.
            context: ``[N, context_features]``.

        Returns:
            ``(velocity[N, D], divergence[N])``, and with ``regularizers`` ``kinetic`` and
            ``frobenius`` ``[N]``.

        Raises:
            TypeError: for states that are not floating-point.
            ValueError: for shapes that do not fit, an unknown method, or a probe that is missing
                or too many.
        """
        check_states(x, self.dims)
        layers = self._at(t, x, context)
        work = layers[0][0].dtype
        if method == "exact" and probe is None:
            size = self.dims
            e, count = torch.eye(size, dtype=work, device=x.device)[:, None], size
        elif method != "hutchinson" or probe is None:
            probes_of(x, probe, probes, method)  # raises
            raise AssertionError  # pragma: no cover
        else:
            e, count = as_probe(probe, probes, x, work)
        return evaluate_field(
            x,
            e,
            count,
            layers,
            self.activation,
            method,
            per_probe=per_probe,
            regularizers=regularizers,
        )

    def _at(
        self, t: Tensor | float, x: Tensor, context: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return weights, biases and gates at a time, for a context."""
        weights, biases = parameters_of(self.layers, self.dims)
        gates: list[Tensor] = []
        work = accumulation_dtype(torch.promote_types(x.dtype, weights[0].dtype))
        weights, biases = [cast(w, work) for w in weights], [cast(b, work) for b in biases]
        time = as_time(t, x).to(work)
        if self.time != "none":
            biases, gates = at_time(time, biases, [cast(p, work) for p in self.times])
        check_context(context, self.context_features, x)
        if context is not None:
            biases = add_context(biases, context, self.contexts)
        return weights, biases, gates

    def extra_repr(self) -> str:
        """Return the arguments."""
        given = f"{self.dims}, hidden={self.hidden}, activation={self.activation!r}"
        return f"{given}, time={self.time!r}, context_features={self.context_features}"
