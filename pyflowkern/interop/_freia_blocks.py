"""Couplings of FrEIA on vectors and images whose networks are called: what is left of them runs by one op each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor, the_library_itself
from pyflowkern.interop._freia_layers import global_numbers
from pyflowkern.interop._freia_moves import Coupling, Move, all_in_one
from pyflowkern.interop._freia_parts import Constants, FreiaLayer, called, global_map_of
from pyflowkern.interop._images import Form, Forms, evaluate_sequential, served_samples
from pyflowkern.interop._layers import Runs, layer_of
from pyflowkern.ops import ScaleMap

__all__ = ["AllInOneForm", "BlockDoor", "CouplingForm", "block_disagreement"]

#: Measured: channels of images up to which scale, shift and matrix are faster by one op.
_FEW = 16
#: Measured: numbers of vectors from which on an op for each half is faster than the library's, its networks apart.
_MANY = 50_000
Read = Callable[[torch.nn.Module], Form | None]


class CouplingForm(Form):
    """A coupling of halves, which networks are called for."""

    def __init__(self, module: Any, coupling: Coupling) -> None:
        super().__init__()
        self.coupling, self.channels = coupling, coupling.count
        self.link.watch(module, *coupling.facts)
        self.nets: dict[str, tuple[torch.nn.Module, list[Any], list[Any]]] = {}
        for move in coupling.moves:
            for name in move.nets:
                self.nets[name] = self._net(module._modules[name])

    @classmethod
    def read(cls, of: Callable[[Any], Coupling | None], module: torch.nn.Module) -> Form | None:
        """Return the form; None for halves of other sizes than those that the op divides channels in."""
        coupling = of(module)
        if coupling is None or not cls._fits(coupling):
            return None
        if any(module._modules.get(name) is None for m in coupling.moves for name in m.nets):
            return None
        return cls(module, coupling)

    @staticmethod
    def _fits(coupling: Coupling) -> bool:
        return all(
            isinstance(move.map, ScaleMap)
            and move.second is not None
            and len(coupling.halves(move)[1])
            and ops.channel_split_sizes(coupling.count, not move.second)[1]
            == len(coupling.halves(move)[1])
            for move in coupling.moves
        )

    def _net(self, net: Any) -> tuple[torch.nn.Module, list[Any], list[Any]]:
        """Return a network, and its convolutions and activations if it is a Sequential of them."""
        if type(net) is torch.nn.Sequential and type(next(iter(net), None)) is torch.nn.Conv2d:
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
        for move in reversed(self.coupling.moves) if inverse else self.coupling.moves:
            params = self._parameters(x, move, conditions)
            if params is None:
                return None
            x, log_det = ops.affine_coupling(
                x,
                params,
                swap=not move.second,
                scale_map=move.map,  # type: ignore[arg-type]
                params_layout="blocked_raw_first",
                inverse=inverse,
            )
            total = log_det if total is None else total + log_det
        return None if total is None else (x, total)

    def _parameters(self, x: Tensor, move: Move, conditions: Sequence[Tensor]) -> Tensor | None:
        reads, moved = self.coupling.halves(move)
        given = x[:, reads.start : reads.stop]
        if self.coupling.context:
            given = torch.cat([given, *conditions], 1)
        found = [evaluate_sequential(given, *self.nets[name]) for name in move.nets]
        params = found[0] if len(found) == 1 else torch.cat(found, 1)
        additive = isinstance(move.map, ScaleMap) and move.map.kind == "additive"
        wanted = (x.shape[0], len(moved) * (1 if additive else 2), *x.shape[2:])
        fits = params.shape == wanted and params.dtype == x.dtype
        return params if fits else None  # what does not, the library itself refuses or takes


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
        if weight.dim() > 1 and x.shape[1] <= _FEW:
            log_scale, bias = global_numbers(module)
            square, zero = weight.view(weight.shape[:2]), self._zero.like(x)
            return ops.glow_step(x, log_scale, bias, square, zero, inverse=inverse)
        y, log_det = module._permute(x, rev=inverse)
        pixels = x[0, :1].numel()
        return y, -pixels * log_det if inverse else pixels * log_det


class BlockDoor(MethodDoor):
    """``forward`` of a transform, which runs both directions.

    Args:
        layer: what it is in a chain.
        read: finds what runs by ops of its own; None for nothing.
    """

    def __init__(self, layer: FreiaLayer, read: Read | None) -> None:
        super().__init__(layer.module)
        self.layer = layer
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
        if self._forms is None or not served_samples(x) or not _alike(x, conditions):
            return None
        if x.dim() == 2 and (self.layer.is_block or x.numel() < _MANY):
            return None
        ready = self._forms.ready(x, "forward")
        if ready is None:
            return None
        form, tensors = ready
        return form.run(x, tensors, rev, conditions)  # type: ignore[call-arg]


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
    one = len(move.nets) > 1 or (isinstance(move.map, ScaleMap) and move.map.kind == "additive")
    inputs, outputs = len(reads) + coupling.context, len(moved) * (1 if one else 2)
    if len(shape) == 1:
        return torch.nn.Linear(inputs, outputs)
    return torch.nn.Conv2d(inputs, outputs, 1)


def side_by_side(conditions: Sequence[Tensor]) -> Tensor | None:
    """Return all conditions in one tensor; None for none."""
    if not conditions:
        return None
    return conditions[0] if len(conditions) == 1 else torch.cat([*conditions], 1)
