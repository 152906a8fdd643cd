"""One layer of a pass that keeps no activations: how it is run, and how its backward pass runs it again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.dtypes import PLAIN_TENSORS, autocasts, cast
from pyflowkern.nn._drift import (
    LARGEST,
    Guard,
    fingerprint,
    finite_samples,
    not_finite,
    relative_error,
    scale_of,
)
from pyflowkern.nn._hooks import HOOKS
from pyflowkern.nn._random_state import RandomState, drawing_again, random_state, same_state
from pyflowkern.ode.parameters import leaf_nodes

__all__ = ["Call", "Walk"]

Pair = tuple[Tensor, Tensor]
_ENGINE: Any = torch.autograd.Variable._execution_engine
#: A dictionary of a module, a name in it, and a number among the tensors of the layer.
_Slot = tuple[dict[str, Any], str, int]
#: Where a buffer lies, the buffer, and what it held before the call where calls may change it.
_Buffer = tuple[dict[str, Any], str, Tensor, Tensor | None]

#: Held while modules have other tensors than their own: two threads must not take those of each other for them.
_CHANGING = threading.RLock()


class Walk:
    """What the layers of one pass share: the random numbers before the next layer, and how far a backward pass is."""

    def __init__(self, guard: Guard, looks: bool, inverse: bool, *, keeps: bool = False) -> None:
        self.guard, self.looks, self.inverse = guard, looks, inverse
        #: Whether all layers keep their inputs.
        self.keeps = keeps
        self.state: RandomState | None = None
        #: Whether errors have been found to add up on the way back.
        self.drifted = False
        # of each backward pass, as a graph that is kept may have several
        self._reached: dict[int, tuple[Tensor, Tensor | None] | None] = {}

    def arrive(self, x: Tensor, bad: Tensor | None) -> None:
        """Leave a layer's input, and which of its samples are not finite, for the layer before it."""
        task = torch._C._current_graph_task_id()
        if task not in self._reached:
            # whichever layer the pass ends at, nothing stays with a graph
            _ENGINE.queue_callback(lambda: self._reached.pop(task, None))
        self._reached[task] = x, bad

    def here(self) -> tuple[Tensor, Tensor | None] | None:
        """Return what the layer behind has left; None where it left nothing."""
        task = torch._C._current_graph_task_id()
        if (found := self._reached.get(task)) is not None:
            self._reached[task] = None
        return found


class Call:
    """One call of a layer, in one direction, and everything that calling it again needs but tensors of the graph."""

    #: Whether the call before it, and the one behind, are not of the same walk.
    first = last = False
    #: Whether the input is kept.
    keeps = False

    def __init__(self, layer: Any, place: int, walk: Walk, casts: torch.dtype | None) -> None:
        self.layer, self.place, self.walk, self.casts = layer, place, walk, casts
        self._modes: list[tuple[dict[str, Any], bool]] = []
        self._slots: list[_Slot] = []
        self._buffers: list[_Buffer] = []
        self._starts = False
        self._dtype: torch.dtype | None = None
        self._drawn: RandomState | None = None
        self._mark: tuple[Tensor, Tensor] | None = None

    def look_at_modules(self) -> tuple[Tensor, ...] | None:
        """Return the parameters of the layer; None where a part of it must be called as it is, and once."""
        with _CHANGING:
            return self._look_at_modules()

    def _look_at_modules(self) -> tuple[Tensor, ...] | None:
        tensors: dict[int, tuple[int, Tensor]] = {}
        for module in self.layer.modules():
            known = module.__dict__
            if any(known[hooks] for hooks in HOOKS) or _called_once(module, self.walk.inverse):
                return None
            self._modes.append((known, module.training))
            for name, t in known["_parameters"].items():
                if t is None:
                    continue
                if type(t) not in PLAIN_TENSORS:  # as of a sharded layer
                    return None
                number, _ = tensors.setdefault(id(t), (len(tensors), t))
                self._slots.append((known["_parameters"], name, number))
            self._starts |= not getattr(module, "_started", True) and module.training
            if known["_buffers"]:
                self._note_buffers(module)
        return tuple(t for _, t in tensors.values())

    def _note_buffers(self, module: torch.nn.Module) -> None:
        # calls in training mode may change those of others, such as a batch normalization's
        changing = module.training and not type(module).__module__.startswith("pyflowkern.")
        for name, t in module._buffers.items():
            if t is not None:
                self._buffers.append((module._buffers, name, t, t.clone() if changing else None))

    # --- forward -----------------------------------------------------------------------------------------------

    def go(self, x: Tensor, context: Tensor | None) -> Pair:
        """Run the layer without a graph."""
        walk, device = self.walk, x.device
        before = walk.state
        assert before is not None
        self._dtype = x.dtype
        self.keeps |= x.dtype not in LARGEST  # there and back in half precision is another number
        with self._autocast([x]):
            # ActNorm starts from data on their way back only while gradients are recorded
            with torch.set_grad_enabled(self._starts and walk.inverse):
                y, log_det = self._run(x, context)
            if y is x or y.requires_grad:
                y, log_det = y.detach(), log_det.detach()
            after = random_state(device)
            if not same_state(before, after):
                self._drawn, walk.state = before, after
            if walk.looks and not self.keeps:
                self._look(x, y, context)
        return y, log_det

    def _run(self, x: Tensor, context: Tensor | None) -> Pair:
        pair: Pair = (
            self.layer.inverse(x, context) if self.walk.inverse else self.layer(x, context)
        )
        return pair

    def _undo(self, y: Tensor, context: Tensor | None) -> Tensor:
        pair: Pair = (
            self.layer(y, context) if self.walk.inverse else self.layer.inverse(y, context)
        )
        return pair[0]

    def _look(self, x: Tensor, y: Tensor, context: Tensor | None) -> None:
        """Go there and back, and keep the input where it is not found."""
        guard, device = self.walk.guard, x.device
        finite = finite_samples(x) & finite_samples(y)
        try:
            with self._as_it_was(), drawing_again(self._drawn, device):
                back = self._undo(y, context)
            with self._as_it_was(), drawing_again(self._drawn, device):
                again = self._run(back, context)[0]
        except NotImplementedError:  # there is no way back
            guard.kept, self.keeps = {*guard.kept, self.place}, True
            return
        except RuntimeError as error:
            guard.keep(self.place, f"has no inverse ({error})")
            self.keeps = True
            return
        # the second one is large where digits are lost in the layer itself, as those of data far from zero
        off = max(relative_error(back, x, finite), relative_error(again, y, finite))
        if off > guard.bound(x, self.casts):
            guard.keep(self.place, f"has a relative error of {off:.1e} there and back")
            self.keeps = True
            return
        self._mark = fingerprint(x), scale_of(x, finite)

    # --- backward ----------------------------------------------------------------------------------------------

    def again(
        self,
        end: Tensor | None,
        context: Tensor | None,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the gradients of input, context and tensors, and leave the input for the layer before.

        Args:
            end: what was kept: the input or, of the last layer, the output; None for what the layer behind left.
            context: of the call.
            tensors: of the layer.
            grads: of the output and of the log-determinant.
            needs: which gradients are wanted.
        """
        leaf = None if context is None else context.detach().requires_grad_(needs[1])
        given = self._stand_in(tensors, needs[2:])
        with torch.enable_grad(), self._autocast(grads), self._as_it_was(given):
            inputs, pair, grads = self._make_again(end, leaf, grads, needs[0])
            wanted = [*inputs, leaf, *given]
            needed = [*[needs[0]] * len(inputs), *needs[1:]]
            places = [i for i, need in enumerate(needed) if need]
            if self.walk.looks:
                self._find_all(pair, wanted, inputs[0], leaf)
            pairs = [(o, g) for o, g in zip(pair, grads, strict=True) if g is not None]
            pairs = [(o, g) for o, g in pairs if o.requires_grad]
            found: list[Tensor | None] = [None] * len(wanted)
            if pairs and places:
                outputs, upstream = zip(*pairs, strict=True)
                leaves: Any = tuple(wanted[i] for i in places)
                for i, g in zip(places, _products(outputs, leaves, upstream), strict=True):
                    found[i] = g
        parts = [g for g in found[: len(inputs)] if g is not None]
        whole = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return [whole, *found[len(inputs) :]]

    def _make_again(
        self,
        end: Tensor | None,
        context: Tensor | None,
        grads: Sequence[Tensor | None],
        needs: bool,
    ) -> tuple[tuple[Tensor, ...], Pair, Sequence[Tensor | None]]:
        """Return leaves the sum of whose gradients is that of the input, what the layer makes of it, and ``grads``."""
        walk, lost = self.walk, None
        if self.keeps:
            walk.here()  # forgotten: the input itself is at hand
            assert end is not None
            x = end.detach().requires_grad_(needs)
            with drawing_again(self._drawn, x.device):
                pair = self._run(x, context)
            self._leave(x, not_finite(x), needs)
            return (x,), pair, grads
        left = walk.here() if end is None else (end.detach(), not_finite(end))
        assert left is not None
        y, bad = left
        if bad is not None:
            y = _without_dead(y, bad, grads)

        def found(x: Tensor) -> Tensor:
            """Note the input that was found, and make it a leaf."""
            nonlocal lost
            assert self._dtype is not None
            x = cast(x, self._dtype)  # under autocast a product has another one
            missing = not_finite(x)
            if missing is not None:
                lost = missing if bad is None else missing & ~bad
                walk.guard.lose(self.place, lost.sum())
                x = _cleared(x, lost)
            self._compare(x)
            self._leave(x, missing, needs)
            return x.detach().requires_grad_(needs)

        shortcut = getattr(self.layer, "_made_again", None)
        with drawing_again(self._drawn, y.device):
            made = None if shortcut is None else shortcut(y, context, walk.inverse, found)
            if made is None:
                # buffers that a call changes are as they were for the other one, too
                with torch.no_grad(), self._as_it_was():
                    x = self._undo(y, context)
        if made is None:
            x = found(x)
            with drawing_again(self._drawn, y.device):
                made = (x,), self._run(x, context)
        if lost is not None:  # these samples end here, and spoil no other's gradients
            grads = [None if g is None else _cleared(g, lost) for g in grads]
        return *made, grads

    def _leave(self, x: Tensor, bad: Tensor | None, needs: bool) -> None:
        if needs and not self.first:
            self.walk.arrive(x.detach(), bad)

    def _compare(self, x: Tensor) -> None:
        """Let the input be kept from the next pass on where errors have added up on the way back to it."""
        if self._mark is None:
            return
        mark, scale = self._mark
        guard = self.walk.guard
        errors = (fingerprint(x) - mark) / scale
        errors = errors[errors.isfinite()]
        error = float(errors.square().mean().sqrt()) if errors.numel() else 0.0
        if error > guard.bound(x, self.casts) and not self.walk.drifted:
            self.walk.drifted = True  # the layers before are as far off for the same reason
            guard.keep(self.place, f"comes back with a relative error of {error:.1e} from the end")
            guard.report()

    def _find_all(
        self, pair: Pair, known: Sequence[Tensor | None], x: Tensor, context: Tensor | None
    ) -> None:
        """Raise RuntimeError where the layer reads a tensor whose gradient would be lost."""
        others = _leaves(pair).difference(known)
        if not others:
            return
        with drawing_again(self._drawn, x.device):
            again = self._run(x, context)
        # what a call makes for itself, to differentiate by it, is another tensor at each call
        for t in others & _leaves(again):
            raise RuntimeError(
                f"a {type(self.layer).__name__} reads a tensor of shape {tuple(t.shape)} that requires a gradient "
                "and is no parameter of it: memory='reversible' would lose this gradient.  Make it a parameter, or "
                "use memory='stored'"
            )

    # --- how it was --------------------------------------------------------------------------------------------

    def _autocast(self, at: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
        """Cast as in the first call, without the cache: copies that were made without a graph lie there."""
        t = next((t for t in at if t is not None), None)
        if t is None or (self.casts is None and not autocasts(t)):
            return nullcontext()
        casts = self.casts is not None
        return torch.autocast(t.device.type, self.casts, enabled=casts, cache_enabled=False)

    def _stand_in(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """Return the tensors to differentiate by: copies of those that are others by now, or whose hooks run later."""
        given = list(tensors)
        for slots, name, i in self._slots:
            t = given[i]
            frozen = needs[i] and not t.requires_grad  # since then
            if slots.get(name) is not t or t._backward_hooks or frozen:
                given[i] = t.detach().requires_grad_(needs[i])
        return given

    def _as_it_was(self, given: Sequence[Tensor] = ()) -> AbstractContextManager[Any]:
        """Give the layer the modes and the buffers of the first call, and these tensors, in a block."""
        changes: list[tuple[dict[str, Any], str, Any]] = []
        for known, mode in self._modes:
            if known["training"] != mode:
                changes.append((known, "training", mode))
        for slots, name, buffer, value in self._buffers:
            if value is not None:
                changes.append((slots, name, value.clone()))
            elif slots.get(name) is not buffer:
                changes.append((slots, name, buffer))
        for slots, name, i in self._slots if given else ():
            if slots.get(name) is not given[i]:
                changes.append((slots, name, given[i]))
        return _changed(changes) if changes else nullcontext()


def _called_once(module: torch.nn.Module, inverse: bool) -> bool:
    """Whether calls of a module change what others see, or it cannot be looked into."""
    way = getattr(type(module), "_way_back", None)
    if way is not None and way(module, inverse) == "call":
        return True
    # processes that take other ways would exchange other numbers of sums
    if isinstance(module, torch.nn.SyncBatchNorm):
        return module.training
    return isinstance(module, torch.jit.ScriptModule)


def _leaves(pair: Pair) -> set[Tensor]:
    """Return the tensors that a result depends on and whose gradients autograd would add up."""
    nodes = {*leaf_nodes(pair[0]), *leaf_nodes(pair[1])}
    found = (getattr(node, "variable", None) for node in nodes)
    return {t for t in found if isinstance(t, Tensor)}  # by identity


def _products(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
) -> Sequence[Tensor | None]:
    """Return what ``torch.autograd.grad`` does, None for unused inputs, without its checks, which take time."""
    found: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        outputs, upstream, False, False, inputs, True, accumulate_grad=False
    )
    return found


@contextmanager
def _changed(changes: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values under names of dictionaries in a block."""
    with _CHANGING:
        before = [(slots, name, slots.get(name)) for slots, name, _ in changes]
        for slots, name, value in changes:
            slots[name] = value
        try:
            yield
        finally:
            for slots, name, value in before:
                slots[name] = value


def _rows(which: Tensor, like: Tensor) -> Tensor:
    return which.view(-1, *[1] * (like.dim() - 1))


def _cleared(t: Tensor, which: Tensor) -> Tensor:
    return torch.where(_rows(which, t), 0.0, t)


def _without_dead(y: Tensor, bad: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """Put zeros into samples that are not finite and that no gradient asks for: 0 times NaN would spoil the others."""
    asked = torch.zeros_like(bad)
    for g in grads:
        if g is not None:
            asked |= (g != 0).flatten(1).any(1) if g.dim() > 1 else g != 0
    return _cleared(y, bad & ~asked)
