"""Passes that keep no activations between layers: a backward pass makes them again by the layers' inverses.

Each layer is one node of the autograd graph.  Of several one after another only the last keeps its output.  A node's
backward pass finds the layer's input from that, runs the layer once more, now with a graph, which gives the gradients,
and leaves the input for the node before it.  Each node's parameters are its inputs, so that their gradients are added
up, and hooks such as those of ``DistributedDataParallel`` run, as soon as the layer is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pyflowkern._library import transformed
from pyflowkern.core.dtypes import PLAIN_TENSORS, autocasts
from pyflowkern.core.first_derivative import first_derivative_only
from pyflowkern.nn._again import Call, Walk
from pyflowkern.nn._drift import Guard
from pyflowkern.nn._hooks import globally_hooked
from pyflowkern.nn._random_state import random_state
from pyflowkern.nn.chain import Run

__all__ = ["MEMORY", "makes_again", "run_again"]

#: What a sequence of layers may do with its activations.
MEMORY = ("stored", "reversible")
Pair = tuple[Tensor, Tensor]
_FAKE = torch._C._TorchDispatchModeKey.FAKE
#: Where torch defines what it does with the tensors that a checkpointed part keeps, in both of its runs.
_CHECKPOINT = "torch.utils.checkpoint"
_ONCE = (
    "memory='reversible' has first derivatives only, as the activations that a second one depends on were not kept: "
    "make the flow with memory='stored' for it"
)


def makes_again(x: Tensor, context: Tensor | None) -> bool:
    """Whether a pass through layers may do without activations: not where nothing records, and not before tracers."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and type(x) in PLAIN_TENSORS
        and (context is None or type(context) in PLAIN_TENSORS)
        and x.dim() > 0
        and not x.is_meta
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        and not transformed()
        and not globally_hooked()
        and torch._C._get_tracing_state() is None
        # weights that are computed once would come from the pass that has no graph
        and not parametrize._cache_enabled
        and torch._C._get_dispatch_mode(_FAKE) is None
    )


class _Step(NamedTuple):
    """What is done in the place of one layer, or of a run of layers."""

    part: Any
    #: Whether it is a node, and not called with a graph that keeps what autograd wants.
    remade: bool
    call: Call | None = None
    tensors: tuple[Tensor, ...] = ()


def run_again(
    parts: Iterable[Any], x: Tensor, context: Tensor | None, inverse: bool, guard: Guard
) -> Pair | None:
    """Run layers, and runs of them, in their order; return ``(y, log_det)``, None where there are none.

    Args:
        parts: in the order in which they are called.
        x: the input.
        context: of all layers.
        inverse: whether their inverses are called.
        guard: what is known of these layers.
    """
    parts = list(parts)
    flat: list[Any] = [t for p in parts for t in (p.layers if isinstance(p, Run) else [p])]
    walk = Walk(guard, guard.begin(flat), inverse, keeps=_run_again_by_torch())
    places = {id(layer): i for i, layer in enumerate(flat)}
    found = _run(parts, places, walk, x, context)
    guard.report()
    return found


def _run_again_by_torch() -> bool:
    """Whether a checkpoint of torch's runs these layers, now or again in a backward pass.

    It takes what the second run saves for what the first one did, so that both must save the same, whatever was found
    of errors between the two.  So all layers keep their inputs, which the checkpoint holds only once it needs them.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == _CHECKPOINT


def _run(
    parts: Sequence[Any], places: dict[int, int], walk: Walk, x: Tensor, context: Tensor | None
) -> Pair | None:
    total: Tensor | None = None
    steps = _plan(parts, places, walk, x, context)
    for i, step in enumerate(steps):
        call = step.call
        if isinstance(step.part, Run):
            # what one op computes it makes again itself, from the inputs of its steps
            pair = step.part.fused(x, context, inverse=walk.inverse)
            if pair is None:
                layers = step.part.layers
                layers = layers[::-1] if walk.inverse else layers
                pair = _run(layers, places, walk, x, context)
            assert pair is not None
        elif call is not None:
            call.first = i == 0 or not steps[i - 1].remade
            call.last = i + 1 == len(steps) or not steps[i + 1].remade
            walk.state = walk.state or random_state(x.device)
            pair = _Node.apply(call, x, context, *step.tensors)  # type: ignore[no-untyped-call]
        else:
            pair = step.part.inverse(x, context) if walk.inverse else step.part(x, context)
            walk.state = None
        x = pair[0]
        total = pair[1] if total is None else total + pair[1]
    return None if total is None else (x, total)


def _plan(
    parts: Sequence[Any], places: dict[int, int], walk: Walk, x: Tensor, context: Tensor | None
) -> list[_Step]:
    recorded = x.requires_grad or (context is not None and context.requires_grad)
    casts = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
    steps = []
    for part in parts:
        if isinstance(part, Run):
            steps.append(_Step(part, False))
            recorded = True  # or not: then the nodes behind it have nothing to do
            continue
        call = Call(part, places[id(part)], walk, casts)
        tensors = call.look_at_modules()
        if tensors is None:  # the layer does it itself, or must not be called twice
            recorded = True
            steps.append(_Step(part, False))
            continue
        recorded = recorded or any(t.requires_grad for t in tensors)
        if not recorded:
            steps.append(_Step(part, False))
            continue
        call.keeps = walk.keeps or part._way_back(walk.inverse) == "keep"
        call.keeps |= call.place in walk.guard.kept
        steps.append(_Step(part, True, call, tensors))
    return steps


class _Node(torch.autograd.Function):
    """One layer of a pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, context: Tensor | None, *tensors: Tensor) -> Pair:
        y, log_det = call.go(x, context)
        ctx.call, ctx.with_context = call, context is not None
        kept = [x] if call.keeps else [y] if call.last else []
        if context is not None:
            kept.append(context)
        ctx.save_for_backward(*kept, *tensors)
        ctx.set_materialize_grads(False)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: Call = ctx.call
        saved = list(ctx.saved_tensors)
        end = saved.pop(0) if call.keeps or call.last else None
        context = saved.pop(0) if ctx.with_context else None
        found = call.again(end, context, saved, grads, ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():  # create_graph=True
            given = (end, context, *saved, *grads)
            causes = tuple(t for t in given if t is not None and t.requires_grad)
            found = [g if g is None else first_derivative_only(g, causes, _ONCE) for g in found]
        return None, *found
