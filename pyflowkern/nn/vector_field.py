r"""Vector fields :math:`f(t, x)` that know their divergence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.checks import (
    check_context,
    check_count,
    check_floating,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import accumulation_dtype, autocasts, cast
from pyflowkern.nn._fields import (
    DivergenceField,
    FieldLinear,
    Wanted,
    add_context,
    as_time,
    call_layers,
    check_field,
    check_states,
    each_sample,
    of_samples,
    parameters_of,
    work_dtype,
)
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.ops.field import evaluate_field, evaluate_velocity
from pyflowkern.ops.field_loss import field_loss, serves_field_loss
from pyflowkern.ops.field_time import at_time
from pyflowkern.ops.probe import probe_of

__all__ = ["VectorField", "VectorFieldMLP"]


class VectorField(DivergenceField):
    r"""Any network :math:`f(t, x)` as a field with a divergence, by reverse-mode products.

    The estimate of the divergence is FFJORD's :math:`(e^T J) e`; "exact" takes one product for each
    dimension.  Works for every module that autograd differentiates, and to the same order.

    Args:
        net: module called as ``net(t, x) -> [N, ...]``, shaped like ``x``; as ``net(t, x, context)``
            where there is a context.  The time is a scalar tensor, or ``[N, 1, ...]`` with the axes of
            ``x`` where each sample has its own.
        context_features: size ``K`` of the context ``[N, K]``; 0 for none.

    Raises:
        TypeError: for a net that is not a module, or a context size that is not an int.
        ValueError: when called, for a net that changes the shape, and a context of another shape.

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
        self.net = net
        self.context_features = check_count("context_features", context_features, 0)

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


class VectorFieldMLP(DivergenceField):
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

    Where a layer was replaced or has hooks (also those of pruning and of the old ``weight_norm``), the layers are
    called one by one, and the divergence comes from reverse-mode products as in :class:`VectorField`.  That is slower,
    and the estimates of ``frobenius`` are then :math:`|e^T J|^2`, which has the same mean.

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
        context_features = check_count("context_features", context_features, 0)
        self.dims, self.hidden = sizes[0], tuple(sizes[1:-1])
        self.activation, self.time, self.context_features = activation, time, context_features
        pairs = list(itertools.pairwise(sizes))
        self.layers = torch.nn.ModuleList(FieldLinear(a, b) for a, b in pairs)
        # rows for each layer: "concat" has w, "concatsquash" has u, c and v
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
        self._check(x)
        if not self._may_be_read:
            zeros = [
                x.new_zeros(n, dtype=work_dtype(x, self.layers)) for n in (*self.hidden, self.dims)
            ]
            biases, gates = self._at_time(t, x, context, zeros)
            return call_layers(x, list(self.layers), biases, gates, self.activation)
        layers = self._at(t, x, context)
        if not autocasts(x):
            return cast(evaluate_velocity(x, layers, self.activation), x.dtype)
        h = cast(x, layers[0][0].dtype)  # autocast does not change float64
        for i, (weight, bias) in enumerate(zip(*layers[:2], strict=True)):
            h = F.linear(h, weight)
            h = (layers[2][i] * h if layers[2] else h) + bias
            if i < len(self.hidden):
                h = ACTIVATIONS[self.activation](h)
        return h.to(x.dtype)

    def squared_error(
        self,
        t: Tensor | float,
        x: Tensor,
        target: Tensor,
        context: Tensor | None = None,
        *,
        scale: Tensor | float = 1.0,
        weight: Tensor | float = 1.0,
    ) -> Tensor:
        r"""Return the mean of :math:`w\,(s f(t, x) - u)^2` over samples and elements: the loss of flow matching.

        Where a kernel serves it, this one pass computes the gradients, too.

        Args:
            t: a float, a scalar tensor or ``[N]``.
            x: states ``[N, D]``.
            target: ``u``, ``[N, D]``.
            context: ``[N, context_features]``.
            scale: ``s``, a number or a tensor that broadcasts over the target.
            weight: ``w``, likewise.

        Returns:
            A scalar.

        Raises:
            TypeError: for a target that is not floating-point, and as calling the field.
            ValueError: for a target of another shape or device, and as calling the field.

        Source: Lipman et al. 2023, *Flow Matching for Generative Modeling*.

        Example:
            >>> import torch
            >>> from pyflowkern import nn
            >>> field, x = nn.VectorFieldMLP(2, time="concat"), torch.randn(5, 2)
            >>> field.squared_error(torch.rand(5), x, torch.zeros(5, 2)).backward()
        """
        self._check(x)
        check_floating("target", target)
        check_shape("target", target, x.shape)
        check_context(context, self.context_features, x)
        check_same_device(x=x, target=target, context=context)
        layers = self._joined(t, x, context)
        fits = target.dtype == x.dtype and of_samples(scale, x) and of_samples(weight, x)
        if layers is None or not fits:
            error: Tensor = scale * self(t, x, context) - target
            return (weight * error.square()).mean()
        weights, biases, joined, rows = layers
        return field_loss(
            x,
            target,
            weights,
            biases,
            joined=joined,
            rows=rows,
            activation=self.activation,
            scale=each_sample(scale, x),
            weight=each_sample(weight, x),
        )

    def _joined(
        self, t: Tensor | float, x: Tensor, context: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]] | None:
        """Return weights, biases, what enters every layer and its coefficients; None where layers must be called."""
        if self.time == "concatsquash" or autocasts(x):
            return None
        if not (self._may_be_read and may_be_read((self,), VectorFieldMLP)):
            return None
        weights, biases = parameters_of(self.layers, self.dims)
        # what nn.Module's own look-up and iteration would find takes most of a small step's time
        times: list[Tensor] = list(self.times._parameters.values())  # type: ignore[arg-type]
        contexts: list[Tensor] = list(self.contexts._parameters.values())  # type: ignore[arg-type]
        if not serves_field_loss(x, weights):
            return None  # calling the field runs its own op, where there is one
        for p in (*weights, *biases, *times, *contexts):
            if p.dtype != x.dtype:
                return None
        column = None
        if times:
            time = as_time(t, x)
            column = (time if time.dim() else time.expand(x.shape[0])).unsqueeze(1)
        if context is None:
            return weights, biases, column, times
        joined, rows = context.to(x.dtype), [m.t() for m in contexts]
        if column is not None:
            joined = torch.cat((column, joined), 1)
            rows = [torch.cat(pair) for pair in zip(times, rows, strict=True)]
        return weights, biases, joined, rows

    def _fused(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        probe, probes, method, per_probe, regularizers = wanted
        layers = self._at(t, x, context)
        e, count = probe_of(method, probe, probes, x, layers[0][0].dtype)
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

    def _check(self, x: Tensor) -> None:
        check_states(x, self.dims)

    def _at(
        self, t: Tensor | float, x: Tensor, context: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return weights, biases and gates at a time, for a context."""
        weights, biases = parameters_of(self.layers, self.dims)
        work = accumulation_dtype(torch.promote_types(x.dtype, weights[0].dtype))
        return [cast(w, work) for w in weights], *self._at_time(
            t, x, context, [cast(b, work) for b in biases]
        )

    def _at_time(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, biases: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the biases at a time, with the context added, and the gates."""
        work = biases[0].dtype
        gates: list[Tensor] = []
        time = as_time(t, x).to(work)
        if self.time != "none":
            biases, gates = at_time(time, biases, [cast(p, work) for p in self.times])
        check_context(context, self.context_features, x)
        if context is not None:
            biases = add_context(biases, context, self.contexts)
        return biases, gates

    @property
    def _may_be_read(self) -> bool:
        return may_be_read(self.layers, FieldLinear, torch.nn.Linear)

    def extra_repr(self) -> str:
        """Return the arguments."""
        given = f"{self.dims}, hidden={self.hidden}, activation={self.activation!r}"
        return f"{given}, time={self.time!r}, context_features={self.context_features}"
