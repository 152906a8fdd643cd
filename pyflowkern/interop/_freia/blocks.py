"""Couplings of FrEIA on vectors and images whose networks are called: what is left of them runs by one op each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.structure import Structure
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor, the_library_itself
from pyflowkern.interop._freia.layers import global_numbers
from pyflowkern.interop._freia.moves import Coupling, Move, all_in_one
from pyflowkern.interop._freia.parts import Constants, FreiaLayer, called, global_map_of
from pyflowkern.interop._freia.splines import watch_domain
from pyflowkern.interop._images import Form, Forms, evaluate_sequential, served_samples
from pyflowkern.interop._layers import Runs, layer_of, many
from pyflowkern.nn.relu_networks import linear_layers
from pyflowkern.ops import ScaleMap, SplineMap

__all__ = ["AllInOneForm", "BlockDoor", "CouplingForm", "SplineForm", "block_disagreement"]

#: Measured: channels of images up to which scale, shift and matrix are faster by one op.
_FEW = 16
_LAYERS = (torch.nn.Conv2d, torch.nn.Linear)
Read = Callable[[torch.nn.Module], Form | None]


class CouplingForm(Form):
    """A coupling of halves, which networks are called for."""

    def __init__(self, module: Any, coupling: Coupling) -> None:
        super().__init__()
        self.coupling, self.channels = coupling, coupling.count
        self.link.watch(module, *coupling.facts)
        self._masks = [_mask(coupling, move) for move in coupling.moves]
        self.nets: dict[str, tuple[torch.nn.Module, list[Any], list[Any]]] = {}
        for move in coupling.moves:
            for name in move.nets:
                self.nets[name] = self._net(module._modules[name])

    @classmethod
    def read(cls, of: Callable[[Any], Coupling | None], module: torch.nn.Module) -> Form | None:
        """Return the form; None for what is moved by conditions alone, and halves of no channels."""
        coupling = of(module)
        if coupling is None or any(move.second is None for move in coupling.moves):
            return None
        if not all(len(coupling.halves(move)[1]) for move in coupling.moves):
            return None
        if any(module._modules.get(name) is None for m in coupling.moves for name in m.nets):
            return None
        return cls(module, coupling)

    def _net(self, net: Any) -> tuple[torch.nn.Module, list[Any], list[Any]]:
        """Return a network, and its layers and activations if it is a Sequential of convolutions or linear layers."""
        if type(net) is torch.nn.Sequential and type(next(iter(net), None)) in _LAYERS:
            self.link.watch(net)
            layers = [*net._modules.values()]
            return net, layers[0::2], layers[1::2]
        return net, [], []

    def run(
        self,
        x: Tensor,
        tensors: list[Tensor],
        inverse: bool,
        conditions: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor] | None:
        """Move one half after the other."""
        total: Tensor | None = None
        moves = [*zip(self.coupling.moves, self._masks, strict=True)]
        for move, mask in reversed(moves) if inverse else moves:
            params = self._parameters(x, move, conditions)
            if params is None:
                return None
            x, log_det = self._moved(x, params, move, mask, inverse)
            total = log_det if total is None else total + log_det
        return None if total is None else (x, total)

    def _moved(
        self, x: Tensor, params: Tensor, move: Move, mask: Structure | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        scale_map = move.map
        if isinstance(scale_map, SplineMap):
            return self._splined(x, params, move, inverse)
        if move.centred:
            raw, shift = params.chunk(2, 1)
            log_scale = scale_map.log_scale(raw)
            params = torch.cat([log_scale - log_scale.mean(move.centred, keepdim=True), shift], 1)
            scale_map = ScaleMap("exp", shift_gain=scale_map.shift_gain)
        y, log_det = ops.affine_coupling(
            x,
            params,
            split="channel" if mask is None else mask.on(x.device),
            swap=mask is None and not move.second,
            scale_map=scale_map,
            params_layout="blocked_raw_first",
            inverse=inverse,
        )
        return y, torch.zeros_like(log_det) if move.centred else log_det

    def _splined(
        self, x: Tensor, params: Tensor, move: Move, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        assert move.domain is not None
        moved = self.coupling.halves(move)[1]
        raw = params.unflatten(1, (len(moved), move.numbers)).movedim(2, -1)
        y, log_det = move.domain.run(x[:, moved.start : moved.stop], raw, inverse)
        return torch.cat([x[:, : moved.start], y, x[:, moved.stop :]], 1), log_det

    def _parameters(self, x: Tensor, move: Move, conditions: Sequence[Tensor]) -> Tensor | None:
        reads, moved = self.coupling.halves(move)
        given = x[:, reads.start : reads.stop]
        if self.coupling.context:
            given = torch.cat([given, *conditions], 1)
        found = [_evaluate(given, *self.nets[name]) for name in move.nets]
        params = found[0] if len(found) == 1 else torch.cat(found, 1)
        wanted = (x.shape[0], len(moved) * move.numbers, *x.shape[2:])
        fits = params.shape == wanted and params.dtype == x.dtype
        return params if fits else None  # what does not, the library itself refuses or takes


def _mask(coupling: Coupling, move: Move) -> Structure | None:
    """Return which channels are moved, None where they are the half that ops call so."""
    moved = coupling.halves(move)[1]
    if len(moved) == ops.channel_split_sizes(coupling.count, not move.second)[1]:
        return None
    return Structure(torch.tensor([i in moved for i in range(coupling.count)], device="cpu"))


def _evaluate(
    x: Tensor, net: torch.nn.Module, layers: Sequence[Any], activations: Sequence[Any]
) -> Tensor:
    """Return ``net(x)``: by one op where that is faster."""
    if x.dim() != 2:
        return evaluate_sequential(x, net, layers, activations)
    if len(layers) == len(activations) + 1 > 1:
        known = linear_layers(x, layers, activations)
        if known is not None:
            return ops.relu_network(x, *known)
    out: Tensor = net(x)
    return out


class AllInOneForm(CouplingForm):
    """An AllInOneBlock: a coupling, then scales, shifts and a matrix or a permutation of channels."""

    def __init__(self, module: Any, coupling: Coupling) -> None:
        super().__init__(module, coupling)
        self.module = module
        self.link.watch(
            module, "global_scale_activation", "input_rank", "reverse_pre_permute", "householder"
        )
        self.link.read(module, "global_scale", "global_offset")
        self._zero = Constants([], 0.0)

    @classmethod
    def read_block(cls, module: torch.nn.Module) -> Form | None:
        """Return the form of an AllInOneBlock."""
        block: Any = module
        found = cls.read(all_in_one, module)
        known = global_map_of(block.global_scale_activation) is not None
        plain = not block.reverse_pre_permute and not block.householder
        return found if known and plain and block.input_rank in (0, 2) else None

    def run(
        self,
        x: Tensor,
        tensors: list[Tensor],
        inverse: bool,
        conditions: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor] | None:
        """Run the block: two ops, of which the library does one where that is faster."""
        if inverse:
            y, more = self._mixed(x, True)
            moved = super().run(y, tensors, True, conditions)
            return None if moved is None else (moved[0], more + moved[1])
        moved = super().run(x, tensors, False, conditions)
        if moved is None:
            return None
        y, more = self._mixed(moved[0], False)
        return y, more + moved[1]

    def _mixed(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        module = self.module
        weight = module._parameters["w_perm_inv" if inverse else "w_perm"]
        if weight.dim() > 1 and x.shape[1] <= _FEW and not module.GIN:
            log_scale, bias = global_numbers(module)
            square, zero = weight.view(weight.shape[:2]), self._zero.like(x)
            return ops.glow_step(x, log_scale, bias, square, zero, inverse=inverse)
        y, log_det = module._permute(x, rev=inverse)
        pixels = x[0, :1].numel()
        return y, -pixels * log_det if inverse else pixels * log_det


class SplineForm(CouplingForm):
    """A coupling by splines over intervals that its networks say."""

    @classmethod
    def read_spline(
        cls, of: Callable[[Any], Coupling | None], module: torch.nn.Module
    ) -> Form | None:
        """Return the form of a RationalQuadraticSpline or a LinearSpline."""
        found = cls.read(of, module)
        if found is not None:
            watch_domain(found.link, module.spline_base)
        return found


class BlockDoor(MethodDoor):
    """``forward`` of a transform, which runs both directions.

    Args:
        layer: what it is in a chain.
        read: finds what runs by ops of its own; None for nothing.
        quick: whether those are the faster ones for a few numbers, too.
    """

    def __init__(self, layer: FreiaLayer, read: Read | None, quick: bool = False) -> None:
        super().__init__(layer.module)
        self.layer, self._quick = layer, quick
        self._runs = Runs(layer_of)
        self._forms = None if read is None else Forms(layer.module, read)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run one op, or the elementwise part by one; the library's method where none serves."""
        try:
            call = called(*args, **kwargs)
        except TypeError:
            call = None
        pair = None if call is None else self._pair(*call)
        if pair is None:
            return self.own(*args, **kwargs)
        y, log_det = pair
        return (y,), 0.0 if self.layer.preserves_volume else log_det

    def _pair(self, x: Tensor, conditions: Sequence[Tensor], rev: bool) -> Any:
        if self.layer.features and x.dim() == 2:
            context = side_by_side(conditions)
            pair = self._runs.fused([self.module], x, context, inverse=rev)
            if pair is not None:
                return pair
        if self._forms is None or not self._pays(x):
            return None
        if not served_samples(x) or not _alike(x, conditions):
            return None
        ready = self._forms.ready(x, "forward")
        if ready is None:
            return None
        form, tensors = ready
        return form.run(x, tensors, rev, conditions)  # type: ignore[call-arg]

    def _pays(self, x: Tensor) -> bool:
        """Whether ops for each half are the faster ones."""
        return self._quick or x.dim() != 2 or (not self.layer.is_block and many(x))


def _alike(x: Tensor, conditions: Sequence[Tensor]) -> bool:
    return all(c.dtype == x.dtype and c.device == x.device for c in conditions)


def block_disagreement(module: torch.nn.Module, read: Read) -> str:
    """Return why ops must not stand for a transform, found by running both on a few numbers; empty if they may.

    Layers of one number take the place of its networks, which are called anyway.
    """
    form = read(module)
    if not isinstance(form, CouplingForm):
        return "its form is not known, or its halves are not those of an op"
    shape = tuple(module.dims_in[0])  # type: ignore[index]
    put_in: dict[int, Any] = {}
    for move in form.coupling.moves:
        for name in move.nets:
            put_in[id(module._modules[name])] = _stand_in(form.coupling, move, shape)
    try:
        twin: Any = comparable(copy.deepcopy(module, put_in))
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    draw = torch.Generator().manual_seed(1)
    numbers = partial(torch.randn, generator=draw, dtype=torch.float64)
    x, conditions = numbers(2, *shape), [numbers(2, *c) for c in twin.dims_c]
    forms = Forms(twin, read)
    for rev in (False, True):
        with torch.no_grad(), the_library_itself():
            try:
                (y,), log_det = twin((x,), conditions, rev=rev)
            except Exception as error:
                return (
                    f"the library itself fails on a few numbers: {type(error).__name__}: {error}"
                )
            ready = forms.ready(x, "forward")
            got = None if ready is None else ready[0].run(x, ready[1], rev, conditions)  # type: ignore[call-arg]
        if got is None:
            return "hooks or methods of its own hang on it"
        if not isinstance(log_det, Tensor):
            log_det = x.new_full((2,), float(log_det))
        if not same_values(got, (y, log_det)):
            return "its values are not those of the form that its name says"
    return ""


def _stand_in(coupling: Coupling, move: Move, shape: Sequence[int]) -> torch.nn.Module:
    reads, moved = coupling.halves(move)
    inputs = len(reads) + coupling.context
    outputs = len(moved) * move.numbers // len(move.nets)
    if len(shape) == 1:
        return torch.nn.Linear(inputs, outputs)
    return torch.nn.Conv2d(inputs, outputs, 1)


def side_by_side(conditions: Sequence[Tensor]) -> Tensor | None:
    """Return all conditions in one tensor; None for none."""
    if not conditions:
        return None
    return conditions[0] if len(conditions) == 1 else torch.cat([*conditions], 1)
