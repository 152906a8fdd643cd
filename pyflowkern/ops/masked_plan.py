"""Masked networks: which unit sees which inputs, read off the masks of any library's MADE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.checks import check_choice, check_count, check_flag
from pyflowkern.core.codes import LayerFlag, MaskedActivation, numbered
from pyflowkern.core.kept import Kept
from pyflowkern.ops._masked_network import Connection, layer_values

__all__ = ["MaskedLayer", "MaskedPlan"]

ALIGN = 4  # a packed row starts at a multiple of 16 bytes
_GATED, _KEEPS_RAW = LayerFlag.GATED.value, LayerFlag.KEEPS_RAW.value


@dataclass(frozen=True)
class MaskedLayer:
    r"""One masked linear layer: :math:`v = g \circ ((M \circ W)\, a(v_{source}) + b) + v_{residual}`.

    Args:
        mask: boolean or 0/1 ``[units, inputs]``, True where the weight counts.
        source: the layer whose values are read, by its index; -1 for the network's input; None for the layer before.
        activation: ``a``, applied to the values that are read: one of identity, relu, leaky_relu, elu, tanh,
            sigmoid, silu, gelu, softplus.  All are accurate to rounding; torch.nn.Softplus and torch.nn.GELU are not
            (2e-9 at 20, 2% at -8), so that in float64 a network made of these is another function there.
        residual: index of a layer whose values, before any activation, are added; None for none.
        gated: whether there is a gate ``g``, which is given with weight and bias; else it is 1.

    Raises:
        TypeError: for a mask that is no tensor, and layers that are no ints.
        ValueError: for a mask that is not a matrix, an unknown activation, or layers before the input.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import MaskedLayer
        >>> MaskedLayer(torch.ones(3, 2).tril(-1)).activation
        'identity'
    """

    mask: Tensor
    source: int | None = None
    activation: str = "identity"
    residual: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(self.mask).__name__}")
        if self.mask.dim() != 2:
            raise ValueError(
                f"mask must be a matrix [units, inputs], got {tuple(self.mask.shape)}"
            )
        check_choice("activation", self.activation, ACTIVATIONS)
        for name, index, least in (("source", self.source, -1), ("residual", self.residual, 0)):
            if index is not None:
                check_count(name, index, least)
        object.__setattr__(self, "gated", check_flag("gated", self.gated))
        object.__setattr__(self, "mask", self.mask.detach().bool().cpu().clone())


class MaskedPlan:
    """The order in which an autoregressive masked network can be evaluated while its input is being found.

    A feature of level ``t`` depends, through the network, on features of lower levels alone; a unit of degree ``t``
    sees features of levels below ``t``, and so is known as soon as those are.  Sorted by degree, a unit reads a prefix
    of the units of the layer below.

    Args:
        layers: the layers, first to last.  The last one has ``features * outputs`` units, those of one feature
            together.
        features: number ``D`` of inputs.

    Raises:
        TypeError: for layers that are none, and features that are not an int.
        ValueError: for shapes that do not fit each other, and for masks that are not autoregressive.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import MaskedLayer, MaskedPlan
        >>> plan = MaskedPlan([MaskedLayer(torch.ones(3, 3).tril(-1))], features=3)
        >>> plan.levels, plan.outputs
        (3, 1)
    """

    def __init__(self, layers: Sequence[MaskedLayer], features: int) -> None:
        self.layers = tuple(layers)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, MaskedLayer):
                raise TypeError(f"layers[{i}] must be a MaskedLayer, got {type(layer).__name__}")
        self.features = features = check_count("features", features)
        self.sources = [i - 1 if s.source is None else s.source for i, s in enumerate(self.layers)]
        #: Indices of the layers that have a gate.
        self.gated = [i for i, s in enumerate(self.layers) if s.gated]
        self._check_shapes()
        self.outputs = self.layers[-1].mask.shape[0] // features
        reach = self._reach()
        self.level = _levels(reach[-1].view(features, self.outputs, features).any(1))
        self.levels = int(self.level.max()) + 1
        self.widest = int(torch.bincount(self.level).max())
        degree = [(seen * (self.level + 1)).amax(1) for seen in reach[:-1]]
        #: Features and, per hidden layer, units in the order in which they become known.
        self.order = torch.argsort(self.level, stable=True)
        self.rows = [torch.argsort(d, stable=True) for d in degree]
        first = self.order[:, None] * self.outputs
        self.rows.append((first + torch.arange(self.outputs, device="cpu")).flatten())
        #: Row 0: features of levels below t; row j + 1: units of layer j of degree t at most.
        steps = torch.arange(self.levels + 1, device="cpu")[:, None]
        self.counts = torch.stack(
            [(d <= steps).sum(1) for d in (self.level + 1, *degree, self.level.new_zeros(0))]
        )
        #: What kernels read: the order, the counts, and where the values that a residual adds lie.
        parts = [self.order, self.counts.flatten()]
        for i, layer in enumerate(self.layers):
            if layer.residual is not None:
                parts.append(torch.argsort(self.rows[layer.residual])[self.rows[i]])
        self.table = torch.cat(parts).to(torch.int32)
        self._structure = self._numbers()
        self._on_device: dict[torch.device, _Indices] = {}

    # --- evaluation -----------------------------------------------------------------------------

    def parameters(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gates: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the network's output ``[N, D, outputs]`` in plain PyTorch."""
        masks = self.indices(x.device).masks

        def linear(i: int, h: Tensor) -> Tensor:
            bias = biases[i]
            shared = bias if bias is None or bias.dim() == 1 else None
            value = functional.linear(h, torch.where(masks[i], weights[i], 0.0), shared)
            return value if bias is None or bias.dim() == 1 else value + bias

        return self.evaluate(x, linear, gates)

    def evaluate(
        self, x: Tensor, linear: Callable[[int, Tensor], Tensor], gates: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the network's output ``[N, D, outputs]``, with ``linear(i, h)`` for the masked product of layer i."""
        values = layer_values(x, self.indices(x.device).connections, linear, gates)
        return values[-1].view(-1, self.features, self.outputs)

    def pack(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gates: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights in the order of :attr:`rows`, masked entries zero, rows padded to 16 bytes; biases and gates.

        On the CPU packed weights and biases are kept, and used again where no gradient is wanted and they are equal to
        what they were: comparing them is ten times faster than packing.  What differs between samples is not kept.
        """
        at = self.indices(weights[0].device)
        shared = [None if b is not None and b.dim() > 1 else b for b in biases]
        made_from = [*weights, *(at.missing if b is None else b for b in shared)]
        packed, offsets = at.packed.get(made_from, self._pack_shared, weights, shared, at)
        if len(gates) or any(b is not None and b.dim() > 1 for b in biases):
            offsets = [
                kept if b is None or b.dim() == 1 else b.index_select(-1, rows)
                for kept, b, rows in zip(offsets, biases, at.rows, strict=True)
            ]
            for i, gate in zip(self.gated, gates, strict=True):
                offsets.append(gate.index_select(-1, at.rows[i]))
        return packed, offsets

    def _pack_shared(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], at: _Indices
    ) -> tuple[list[Tensor], list[Tensor]]:
        packed, offsets = [], []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            packed.append(self._pack_weight(i, weight, at))
            b = weight.new_zeros(weight.shape[0]) if bias is None else bias
            offsets.append(b.index_select(-1, at.rows[i]))
        return packed, offsets

    def _pack_weight(self, i: int, weight: Tensor, at: _Indices) -> Tensor:
        columns = at.order if self.sources[i] < 0 else at.rows[self.sources[i]]
        masked = torch.where(at.masks[i], weight, 0.0)
        ordered = masked.index_select(0, at.rows[i]).index_select(1, columns)
        return functional.pad(ordered, (0, -ordered.shape[1] % ALIGN))

    def indices(self, device: torch.device) -> _Indices:
        """Return the index tensors and masks on a device."""
        if device not in self._on_device:
            self._on_device[device] = _Indices(self, device)
        return self._on_device[device]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_on_device": {}}

    def structure(self) -> list[int]:
        """Return what the kernels need to know on the host.

        They are the numbers of :class:`~pyflowkern.core.codes.StructureHead`, then those of
        :class:`~pyflowkern.core.codes.StructureLayer` for each layer.
        """
        return self._structure

    def _numbers(self) -> list[int]:
        codes = numbered(MaskedActivation)
        raw = {s.residual for s in self.layers} | {
            source
            for s, source in zip(self.layers, self.sources, strict=True)
            if s.activation == "identity"
        }
        seen_through = [0] * len(self.layers)
        for s, source in zip(self.layers, self.sources, strict=True):
            if source >= 0 and s.activation != "identity":
                seen_through[source] = codes[s.activation]
        numbers = [self.features, self.outputs, self.levels, self.widest]
        for i, s in enumerate(self.layers):
            residual = -1 if s.residual is None else s.residual
            numbers += [
                self.sources[i],
                int(s.activation != "identity"),
                residual,
                seen_through[i],
                _KEEPS_RAW * (i in raw) + _GATED * s.gated,
            ]
        return numbers

    # --- checks ---------------------------------------------------------------------------------

    def _check_shapes(self) -> None:
        if not self.layers:
            raise ValueError("layers must hold at least one layer")
        through: dict[int, set[str]] = {}
        for i, layer in enumerate(self.layers):
            units, inputs = layer.mask.shape
            source = self.sources[i]
            if not -1 <= source < i or (
                layer.residual is not None and not 0 <= layer.residual < i
            ):
                raise ValueError(f"layers[{i}] must read from earlier layers")
            width = self.features if source < 0 else self.layers[source].mask.shape[0]
            if inputs != width:
                raise ValueError(f"layers[{i}] reads {inputs} values, its source has {width}")
            if source < 0 and layer.activation != "identity":
                raise ValueError(f"layers[{i}]: the input is read as it is, without an activation")
            if layer.residual is not None and self.layers[layer.residual].mask.shape[0] != units:
                raise ValueError(f"layers[{i}] and its residual differ in width")
            if layer.activation != "identity":
                through.setdefault(source, set()).add(layer.activation)
        for source, names in through.items():
            if len(names) > 1:
                raise ValueError(
                    f"layers[{source}] is read through several activations: {', '.join(sorted(names))}"
                )
        last = self.layers[-1].mask.shape[0]
        if last % self.features or last == 0:
            raise ValueError(f"the last layer has {last} units, not a multiple of {self.features}")

    def _reach(self) -> list[Tensor]:
        """Return, for each layer, which inputs each unit depends on ``[units, D]``."""
        reach: list[Tensor] = []
        # a plan is made on the host, whatever torch's default dtype and device are
        inputs = torch.eye(self.features, dtype=torch.float32, device="cpu")
        for layer, source in zip(self.layers, self.sources, strict=True):
            below = inputs if source < 0 else reach[source].float()
            seen = layer.mask.float() @ below > 0
            if layer.residual is not None:
                seen |= reach[layer.residual]
            reach.append(seen)
        return reach


class _Indices:
    """A plan's tensors on one device, and what no file can hold."""

    def __init__(self, plan: MaskedPlan, device: torch.device) -> None:
        self.device = device
        pairs = zip(plan.sources, plan.layers, strict=True)
        #: What each layer reads and adds.
        self.connections = [
            Connection(i, ACTIVATIONS[s.activation], s.residual, s.gated) for i, s in pairs
        ]
        #: The packed weights, and the sorted biases that all samples share.
        self.packed: Kept[tuple[list[Tensor], list[Tensor]]] = Kept()
        #: Stands for a bias that is missing where tensors are compared: no bias has its shape.
        self.missing = torch.zeros((), device="cpu")
        self.order = plan.order.to(device)
        self.inverse_order = torch.argsort(plan.order).to(device)
        self.level = plan.level.to(device)
        self.rows = [r.to(device) for r in plan.rows]
        self.masks = [layer.mask.to(device) for layer in plan.layers]
        self.table = plan.table.to(device)


def _levels(depends: Tensor) -> Tensor:
    """Return the level of each feature: one more than the highest that it depends on."""
    waits = depends.sum(1)
    level = torch.full_like(waits, -1)
    for step in range(len(waits)):
        ready = (waits == 0) & (level < 0)
        if not ready.any():
            break
        level[ready] = step
        waits = waits - depends[:, ready].sum(1)
    if (level < 0).any():
        stuck = torch.nonzero(level < 0).flatten().tolist()
        raise ValueError(
            f"the masks are not autoregressive: features {stuck[:8]} depend on themselves or on each other"
        )
    return level
