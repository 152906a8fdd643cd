"""A masked network as kernels see it, units sorted by degree: its values, gradients and triangular system."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.codes import LayerFlag, MaskedActivation, StructureHead, StructureLayer
from pyflowkern.ops._masked_network import (
    Connection,
    elementwise,
    inverse_by_passes,
    layer_values,
)
from pyflowkern.ops.elements import ElementMap, apply_elements

__all__ = ["SortedNetwork", "solve"]

_HEAD, _EACH = len(StructureHead), len(StructureLayer)


class SortedNetwork:
    """The tensors of ``pyflowkern::autoregressive_inverse``, taken apart.

    Args:
        table: the plan's table, on the device of the weights.
        weights: packed weights ``[units, padded inputs]``.
        biases: ``[units]`` or ``[N, units]``, then the gates.
        structure: what :meth:`MaskedPlan.structure` returns.
    """

    def __init__(
        self,
        table: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        structure: Sequence[int],
    ) -> None:
        self.structure = structure
        self.features = structure[StructureHead.FEATURES]
        self.outputs = structure[StructureHead.OUTPUTS]
        self.levels = structure[StructureHead.LEVELS]
        each = [structure[i : i + _EACH] for i in range(_HEAD, len(structure), _EACH)]
        self.sources = [s[StructureLayer.SOURCE] for s in each]
        self.residuals = [s[StructureLayer.RESIDUAL] for s in each]
        gated = [i for i, s in enumerate(each) if s[StructureLayer.FLAGS] & LayerFlag.GATED]
        #: Where behind the biases the gate of a layer is.
        self.gate_at = {i: len(each) + k for k, i in enumerate(gated)}
        self.reads_activated = [bool(s[StructureLayer.READS_ACTIVATED]) for s in each]
        self.activations = [
            ACTIVATIONS[MaskedActivation(s[StructureLayer.SEEN_THROUGH]).name.lower()]
            for s in each
        ]
        self.connections = [
            Connection(
                source,
                self.activations[source] if activated else ACTIVATIONS["identity"],
                None if residual < 0 else residual,
                i in self.gate_at,
            )
            for i, (source, activated, residual) in enumerate(
                zip(self.sources, self.reads_activated, self.residuals, strict=True)
            )
        ]
        self.order = table[: self.features].long()
        at = self.features + (len(each) + 1) * (self.levels + 1)
        self.feature_counts = table[self.features : self.features + self.levels + 1]
        self.residual_at: list[Tensor] = []
        for weight, residual in zip(weights, self.residuals, strict=True):
            size = 0 if residual < 0 else weight.shape[0]
            self.residual_at.append(table[at : at + size].long())
            at += size
        self.packed, self.biases = list(weights), list(biases)

    def values(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the values of every layer for sorted features; the last are the parameters."""

        def linear(i: int, h: Tensor) -> Tensor:
            return functional.linear(h, weights[i][:, : h.shape[1]]) + biases[i]

        def residual(i: int, values: Tensor) -> Tensor:
            return values.index_select(1, self.residual_at[i])

        return layer_values(x, self.connections, linear, biases[len(weights) :], residual)

    def by_passes(self, z: Tensor, transform: ElementMap) -> tuple[Tensor, Tensor]:
        """Return ``x`` and the log-determinant by a pass of the network for each level."""
        rank = torch.arange(self.features, device=z.device)
        level = (self.feature_counts[:, None] <= rank).sum(0) - 1

        def network(x: Tensor) -> Tensor:
            theta = self.values(x, self.packed, self.biases)[-1]
            return theta.view(-1, self.features, self.outputs)

        z = z.index_select(1, self.order)
        x, log_det = inverse_by_passes(network, z, level, self.levels, elementwise(transform))
        return x.index_select(1, torch.argsort(self.order)), log_det

    def gradients(
        self,
        x: Tensor,
        grad_x: Tensor,
        grad_log_det: Tensor,
        transform: ElementMap,
        counts: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the gradients of ``z``, the packed weights, and biases and gates; ``counts`` lies on the host."""
        layers, grad = len(self.packed), torch.autograd.grad
        x, grad_x = (t.detach().index_select(1, self.order) for t in (x, grad_x))
        inner, *tensors = (t.detach().requires_grad_() for t in (x, *self.packed, *self.biases))
        with torch.enable_grad():
            values = self.values(inner, tensors[:layers], tensors[layers:])
            theta = values[-1].detach().view(-1, self.features, self.outputs).requires_grad_()
            outer = x.detach().requires_grad_()
            z, log_det = apply_elements(outer, theta, transform)
            total = z.sum()
            slopes: list[Tensor] = []
            for value, activation in zip(values[:-1], self.activations, strict=False):
                leaf = value.detach().requires_grad_()
                slopes += grad(activation(leaf).sum(), leaf)
        by_x, by_theta = grad(total, (outer, theta), retain_graph=True)
        log_by_x, log_by_theta = grad(
            log_det, (outer, theta), grad_log_det, allow_unused=True, materialize_grads=True
        )
        (through,) = grad(values[-1], inner, log_by_theta.flatten(1), retain_graph=True)
        v = torch.ops.pyflowkern.autoregressive_solve.default(
            grad_x - log_by_x - through,
            by_x,
            by_theta,
            counts,
            self.packed,
            slopes + [t.detach() for t in self.biases[layers:]],
            self.structure,
        )
        upstream = -(v[:, :, None] * by_theta) - log_by_theta
        grads = grad(
            values[-1], tensors, upstream.flatten(1), allow_unused=True, materialize_grads=True
        )
        grad_z = v.index_select(1, torch.argsort(self.order))
        return grad_z, list(grads[:layers]), list(grads[layers:])


def solve(
    grad: Tensor,
    by_x: Tensor,
    by_theta: Tensor,
    counts: Tensor,
    weights: list[Tensor],
    slopes: list[Tensor],
    structure: list[int],
) -> Tensor:
    """Return ``v`` with ``v J = grad``, feature by feature from the last, the adjoint of each unit once.

    Matrix products alone, and so the same on every device.

    Args:
        grad: ``[N, D]``, features sorted.
        by_x: derivative of the transform by its feature ``[N, D]``.
        by_theta: by its parameters ``[N, D, P]``.
        counts: the plan's table, on the host.
        weights: packed weights.
        slopes: of each hidden layer, the derivative of its activation at its values ``[N, units]``; then the gates.
        structure: what :meth:`MaskedPlan.structure` returns.
    """
    net = SortedNetwork(counts, weights, weights, structure)
    gates = dict(zip(net.gate_at, slopes[len(weights) - 1 :], strict=True))
    width, outputs = net.levels + 1, net.outputs
    rows: list[int] = counts[net.features : net.features + width * (len(weights) + 1)].tolist()
    known = [rows[i : i + width] for i in range(0, len(rows), width)]
    grad, v = grad.clone(), torch.empty_like(grad)
    adjoint = [torch.zeros_like(s) for s in slopes[: len(weights) - 1]]

    def push(j: int, begin: int, end: int, upstream: Tensor, step: int) -> None:
        source = net.sources[j]
        depth = known[source + 1][step]
        gated = upstream * gates[j][..., begin:end] if j in gates else upstream
        reads = gated @ weights[j][begin:end, :depth]
        if source < 0:
            grad[:, :depth] -= reads
        elif net.reads_activated[j]:
            adjoint[source][:, :depth] += reads * slopes[source][:, :depth]
        else:
            adjoint[source][:, :depth] += reads
        if net.residuals[j] >= 0:
            at = net.residual_at[j][begin:end].to(grad.device)
            adjoint[net.residuals[j]].index_add_(1, at, upstream)

    for t in reversed(range(net.levels)):
        begin, end = known[0][t], known[0][t + 1]
        v[:, begin:end] = grad[:, begin:end] / by_x[:, begin:end]
        theta = (v[:, begin:end, None] * by_theta[:, begin:end]).flatten(1)
        push(len(weights) - 1, begin * outputs, end * outputs, theta, t)
        for j in reversed(range(len(adjoint))):
            begin, end = known[j + 1][t - 1] if t > 0 else 0, known[j + 1][t]
            if begin < end:
                push(j, begin, end, adjoint[j][:, begin:end], t)
    return v
