"""Where one op, :func:`pyflowkern.ops.chain`, may replace calls of layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.dtypes import PLAIN_TENSORS, autocasts
from pyflowkern.nn._hooks import globally_hooked
from pyflowkern.nn.links import Link, Watched, joined, obstructed
from pyflowkern.ops.chain import CHAIN_DTYPES, computes, run_chain
from pyflowkern.ops.chain_program import ChainProgram
from pyflowkern.ops.chain_steps import ElementsStep, LUStep

__all__ = ["Chains", "Layer", "Run", "served", "undisturbed"]

Pair = tuple[Tensor, Tensor]


class Layer(Protocol):
    """What may stand in a run: a :class:`~pyflowkern.nn.Bijection`, or what stands for another library's transform."""

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Any:
        """Run from data to latent."""

    def inverse(self, z: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run from latent to data."""

    def _chain_link(self) -> Link | None: ...


#: Features, and units of any hidden layer, up to which one op runs on CUDA, where a block of threads has all of a tile:
#: wider layers are left to torch's products.
_WIDE_ON_CUDA = 128
#: States whose runs are kept.
_STATES = 3
#: Calls for which runs that were too wide are not looked at again.
_PATIENCE = 64
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_is_cpu = attrgetter("is_cpu")


class Run:
    """Layers one after another that one op replaces."""

    def __init__(self, layers: Sequence[Layer], link: Link, features: int) -> None:
        self.layers = list(layers)
        self.watched = Watched(link)
        self._link, self._features = link, features
        self._size = link.context_features or 0
        self._programs: dict[str, ChainProgram] = {}
        #: Whether layers are the faster ones while gradients are recorded on the CPU.
        self.wide = link.wide
        self._fits_cuda = max(features, *_hidden_sizes(link)) <= _WIDE_ON_CUDA
        #: Whether tensors have other shapes than the program says.
        self.outgrown = False

    def __call__(
        self, x: Tensor, context: Tensor | None, *, inverse: bool = False, checked: bool = False
    ) -> Pair:
        """Return what the layers return; ``checked`` where :func:`served` has said yes."""
        pair = self.fused(x, context, inverse=inverse, checked=checked)
        if pair is not None:
            return pair
        total: Tensor | None = None
        for layer in reversed(self.layers) if inverse else self.layers:
            x, log_det = layer.inverse(x, context) if inverse else layer(x, context)
            total = log_det if total is None else total + log_det
        assert total is not None
        return x, total

    def fused(
        self,
        x: Tensor,
        context: Tensor | None,
        base: str = "none",
        *,
        inverse: bool = False,
        checked: bool = False,
    ) -> Pair | None:
        """Return the result of the layers by one op, or None where they must be called."""
        if not (checked or served(x)) or not self._takes(x, context):
            return None
        program = self._program(base)
        inverse ^= self._link.backwards
        if not computes(program, x, inverse):
            return None
        tensors = self.watched.tensors(inverse)
        if tensors is None or not _together(x, tensors):
            return None
        try:
            z, log_det = run_chain(x, context, program, tensors, inverse)
        except RuntimeError as error:
            # the op compares all tensors with the program; it is asked what was wrong only here
            if type(error) is not RuntimeError:
                raise
            pairs = zip(tensors, program.tensors, strict=True)
            self.outgrown = any(tuple(t.shape) != wanted.shape for t, wanted in pairs)
            if self.outgrown or not _alike(program, tensors, x):
                return None
            raise
        if self._link.bounded and not torch.isfinite(log_det).all():
            return None  # the layers say why
        return z, log_det

    def _takes(self, x: Tensor, context: Tensor | None) -> bool:
        if x.shape[1] != self._features:
            return False
        if x.dtype == torch.float64 and not self._link.in_float64:
            return False
        if x.is_cuda:
            if not self._fits_cuda:
                return False
        elif self.wide and torch.is_grad_enabled():
            return False
        if context is None or not self._size:
            return context is None and not self._size
        return (
            type(context) in PLAIN_TENSORS
            and context.dtype == x.dtype
            and context.device == x.device
            and context.dim() == 2
            and context.shape[0] == x.shape[0]
            and context.shape[1] == self._size
        )

    def _program(self, base: str) -> ChainProgram:
        if (program := self._programs.get(base)) is None:
            program = ChainProgram(self._features, tuple(self._link.steps), self._size, base)
            self._programs[base] = program
        return program


class _Found(NamedTuple):
    """The runs of some layers as they were found."""

    layers: list[Any]
    #: Runs, and layers that are called.
    parts: list[Layer | Run]
    runs: list[Run]
    #: Whether what kept a layer out of the runs, such as a hook, is still there.
    blocked: list[Callable[[], bool]]

    def holds(self, layers: list[Any]) -> bool:
        return (
            layers == self.layers
            and all(run.watched.unchanged() and not run.outgrown for run in self.runs)
            and all(blocked() for blocked in self.blocked)
        )


class Chains:
    """The runs of a sequence of layers, found anew whenever a layer or what it consists of is another.

    Those of a few states are kept, as a training loop goes back and forth between training and evaluation.  A look at
    layers takes some ten microseconds, which those gain nothing from whose networks are too wide to be trained by one
    op: they are looked at once in a while.  Where they became narrow meanwhile, the op comes some calls later.
    """

    def __init__(self, owner: object = None) -> None:
        #: The modules of the sequence that this belongs to: shallow copies have others.
        self.owner = owner
        #: The last one first.  Never changed, but replaced: other threads may read it.
        self._known: list[_Found] = []
        #: How a call went in which a layer waited for its first data, until the next one.
        self._first: _Found | None = None
        #: For how many calls that record gradients no run would serve.
        self._refused = 0

    def refuse(self, x: Tensor) -> bool:
        """Whether all runs were too wide for such a call a few calls ago, so that the layers should be called."""
        # compilers would make a graph for each count
        if torch.compiler.is_compiling() or self._refused <= 0:
            return False
        if not torch.is_grad_enabled() or not x.is_cpu:
            return False
        self._refused -= 1
        return True

    def parts(self, layers: list[Any], x: Tensor) -> list[Layer | Run] | None:
        """Return runs, and layers that are called; None where there are no runs, or none that serves ``x``."""
        if self.refuse(x):
            return None
        known = self._known
        found = next((each for each in known if each.holds(layers)), None) or _find(layers)
        if not known or found is not known[0]:
            self._known = [found, *(each for each in known if each is not found)][:_STATES]
        if found.blocked or self._first is not None:
            found = self._as_before(found)
        self._refused = _PATIENCE if found.runs and all(run.wide for run in found.runs) else 0
        # as at the calls that follow: checkpointing, which repeats some, wants the same ops
        return found.parts if found.runs and not self.refuse(x) else None

    def _as_before(self, found: _Found) -> _Found:
        """Return the runs of a call, for one within a backward pass those of the call that it repeats.

        Checkpointing wants the same ops again, and a layer that waited for its data has started since.
        """
        before, self._first = self._first, found if found.blocked else None
        if before is None or found.blocked or torch._C._current_graph_task_id() == -1:
            return found
        if before.layers != found.layers or not all(r.watched.unchanged() for r in before.runs):
            return found
        self._first = before  # there may be other calls to repeat
        return before

    def __reduce__(self) -> tuple[type[Chains], tuple[()]]:
        """Copies and pickles start empty."""
        return Chains, ()


def _find(layers: list[Any]) -> _Found:
    parts: list[Layer | Run] = []
    blocked: list[Callable[[], bool]] = []
    run: list[Any] = []
    link, features = Link(), 0

    def close() -> None:
        nonlocal run, link, features
        if any(isinstance(step, (ElementsStep, LUStep)) for step in link.steps):
            parts.append(Run(run, link, features))
        else:
            parts.extend(run)
        run, link, features = [], Link(), 0

    for layer in layers:
        own = layer._chain_link() if hasattr(layer, "_chain_link") else None
        if own is not None and obstructed(own):
            blocked.append(partial(obstructed, own))
            own = None
        both = None
        if own is not None and features in (0, _features(layer)):
            both = joined(link, own)
        if both is None:
            close()
            if own is None:
                parts.append(layer)
                continue
        run.append(layer)
        link, features = both or own or link, _features(layer)
    close()
    return _Found(layers, parts, [part for part in parts if isinstance(part, Run)], blocked)


def served(x: Tensor) -> bool:
    """Whether the op takes such a tensor, and calling the layers would do nothing else than the op does."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN_TENSORS
        and x.dim() == 2
        and kernel_serves("chain", x, dtypes=CHAIN_DTYPES)
        and undisturbed(x)
    )


def undisturbed(x: Tensor) -> bool:
    """Whether nothing would see that an op runs in the place of layers: autocast, hooks of all modules, tracers."""
    return (
        not autocasts(x)
        and not globally_hooked()
        and torch._C._get_tracing_state() is None  # to a tracer sizes are tensors
        and torch._C._get_dispatch_mode(_FAKE) is None  # which no test of values may meet
    )


def _together(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether all tensors are where ``x`` is: with one on meta, an op would return memory that nobody wrote."""
    if x.is_cpu:
        return all(map(_is_cpu, tensors))
    return all(t.device == x.device for t in tensors)


def _hidden_sizes(link: Link) -> Iterator[int]:
    """Yield the units of each hidden layer, and 0."""
    yield 0
    for step in link.steps:
        if isinstance(step, ElementsStep) and step.network is not None:
            yield from (layer.outputs for layer in step.network.layers[:-1])


def _features(layer: Any) -> int:
    inner = getattr(layer, "bijection", None)
    if isinstance(inner, torch.nn.Module):
        return _features(inner)
    size: int = getattr(layer, "channels", 0) or getattr(layer, "features", 0)
    return size


def _alike(program: ChainProgram, tensors: list[Tensor], x: Tensor) -> bool:
    """Whether all tensors have the device of ``x``, and those that are no indices its dtype."""
    return all(
        t.device == x.device and (wanted.integers or t.dtype == x.dtype)
        for t, wanted in zip(tensors, program.tensors, strict=True)
    )
