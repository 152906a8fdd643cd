"""A benchmark case: its inputs, its providers, and the passes that are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Case",
    "InputSet",
    "Inputs",
    "Lazy",
    "Outputs",
    "Provider",
    "caller",
    "direction",
    "disagreement",
    "kept_bytes",
    "make_sets",
    "nbytes",
    "outputs_of",
    "random_inputs",
    "read_and_write",
    "runs_kernel",
]

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Provider = Callable[..., Any]
TIMED = ("forward", "forward+backward", "inverse", "inverse+backward", "call")
#: Largest accepted ||out - ref|| / ||ref|| against the eager provider on float64 inputs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


# --- the description of a case -------------------------------------------------------------------


def nbytes(*values: Any) -> int:
    """Return the bytes of the tensors among ``values``."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def read_and_write(inputs: Inputs, outputs: Outputs) -> int:
    """Return the bytes of a pass that reads every input and writes every output once."""
    return nbytes(*inputs.values(), *outputs)


def random_inputs(channels_last: bool = False, **shapes: Sequence[int]) -> Callable[..., Inputs]:
    """Return a ``make_inputs`` of standard normal tensors with these names and shapes."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        found: Inputs = {}
        for name, shape in shapes.items():
            drawn = torch.randn(tuple(shape), generator=generator, device=device).to(dtype)
            image = channels_last and drawn.dim() == 4
            found[name] = drawn.contiguous(memory_format=torch.channels_last) if image else drawn
        return found

    return make


@dataclass(frozen=True)
class Lazy:
    """A provider built from one input set when its case runs: another library, or a module with weights.

    ``build`` imports what it needs; an ImportError becomes a row "not installed".  Unless ``comparable``, results are
    not compared with eager's, for example because the weights differ.
    """

    build: Callable[[Inputs], Provider]
    comparable: bool = True


@dataclass(frozen=True)
class Case:
    """A computation to time, by several providers.

    Providers are called as ``provider(**inputs)``, with ``inverse=True`` added for an inverse.

    Args:
        name: shown in tables, and the key of a row.
        make_inputs: makes a random input set; its first entry is what the function transforms.
        providers: must hold ``eager`` and ``ours``; ``compile`` is made from ``eager``.
        passes: of :data:`TIMED`; ``call`` runs the provider as it is, gradients enabled.
        forward_bytes: bytes that any forward must move, from inputs and outputs.
        backward_bytes: bytes that any backward must move; the default is twice a forward's.
        flops: floating-point operations of a forward; a backward is counted as twice that.
        constants: inputs that need no gradient.
        parameters: inputs that exist anyway, so that keeping them for the backward costs no memory.
        targets: such as ``{"forward vs eager": 6.0, "forward vs floor": 1.5}``.
        extra: skipped by ``--quick``.
        devices: device types on which it runs.
    """

    name: str
    make_inputs: Callable[[torch.Generator, torch.device, torch.dtype], Inputs]
    providers: Mapping[str, Provider | Lazy]
    passes: Sequence[str] = TIMED[:4]
    forward_bytes: Callable[[Inputs, Outputs], int] = read_and_write
    backward_bytes: Callable[[Inputs, Outputs], int] = lambda i, o: 2 * read_and_write(i, o)
    flops: Callable[[Inputs], float] | None = None
    constants: Sequence[str] = ()
    parameters: Sequence[str] = ()
    dtype: torch.dtype = torch.float32
    compiles: bool = True
    targets: Mapping[str, float] = field(default_factory=dict)
    extra: bool = False
    devices: Sequence[str] = ("cpu", "cuda")


# --- inputs --------------------------------------------------------------------------------------


@dataclass
class InputSet:
    inputs: Inputs
    leaves: dict[str, Tensor]
    grads: list[Tensor] = field(default_factory=list)


def outputs_of(value: Any) -> Outputs:
    """Return the tensors of a provider's result in order."""
    if isinstance(value, Tensor):
        return (value,)
    return (
        tuple(t for v in value for t in outputs_of(v)) if isinstance(value, (tuple, list)) else ()
    )


def direction(pass_: str) -> Inputs:
    """Return the keyword argument for the direction of a pass."""
    return {"inverse": True} if pass_.startswith("inverse") else {}


def _as_set(case: Case, inputs: Inputs) -> InputSet:
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.is_floating_point() and name not in case.constants
    }
    return InputSet(inputs | leaves, leaves)


def make_sets(
    case: Case, device: torch.device, cache_bytes: int, eager: Provider, pass_: str
) -> list[InputSet]:
    """Return input sets with output gradients, twice as large as the cache together, but 64 at most."""
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**31)
    sets: list[InputSet] = []
    outputs: Outputs = ()
    wanted = 3
    while len(sets) < wanted:
        inputs = case.make_inputs(generator, device, case.dtype)
        with torch.no_grad():
            if pass_.startswith("inverse"):  # the output of a forward lies in the function's range
                inputs[next(iter(inputs))] = outputs_of(eager(**inputs))[0].clone()
            if pass_.endswith("backward") and not sets:
                outputs = outputs_of(eager(**inputs, **direction(pass_)))
        new = _as_set(case, inputs)
        for out in outputs:
            real = out.is_floating_point()
            new.grads.append(torch.empty_like(out).normal_(generator=generator) if real else out)
        sets.append(new)
        wanted = min(64, max(3, math.ceil(2 * cache_bytes / max(1, nbytes(*inputs.values())))))
    return sets


# --- one pass of one provider --------------------------------------------------------------------


def caller(provider: Provider, pass_: str) -> Callable[[InputSet], Any]:
    """Return a function that runs one pass on a set, as a user's code would."""
    extra = direction(pass_)
    if not pass_.endswith("backward"):
        return lambda s: provider(**s.inputs, **extra)

    def step(s: InputSet) -> Outputs:
        for leaf in s.leaves.values():
            leaf.grad = None
        outs = outputs_of(provider(**s.inputs, **extra))
        pairs = [(t, g) for t, g in zip(outs, s.grads, strict=True) if t.requires_grad]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return outs

    return step


def _results(provider: Provider, pass_: str, s: InputSet) -> list[Tensor | None]:
    """Return the outputs of a pass and, after a backward, the gradient of every leaf."""
    with torch.set_grad_enabled(pass_.endswith("backward") or pass_ == "call"):
        found: list[Tensor | None] = list(outputs_of(caller(provider, pass_)(s)))
    if pass_.endswith("backward"):
        found += [leaf.grad for leaf in s.leaves.values()]
    return [None if t is None else t.detach().double() for t in found]


def disagreement(case: Case, provider: Provider, eager: Provider, pass_: str, s: InputSet) -> str:
    """Return "" if the provider agrees with eager on float64 inputs, else what differs.

    An eager provider that draws random numbers of its own cannot be compared with; the result is then "".
    """
    rtol = 1e-3 if pass_ == "call" else TOLERANCE[case.dtype]
    want = _results(eager, pass_, s if pass_ == "call" else _in_float64(case, s))
    got = _results(provider, pass_, s)
    wrong = _difference(got, want, rtol)
    if wrong and _is_random(eager, pass_, s, rtol):
        return ""
    if wrong and pass_ != "call":
        # inverses of steep functions: eager itself rounds more than that in this type
        own = zip(_results(eager, pass_, s), want, strict=True)
        errors = [_relative_error(a, b) for a, b in own if a is not None and b is not None]
        wrong = _difference(got, want, max(rtol, min(2 * max(errors), 1e-2)))
    return wrong


def _in_float64(case: Case, s: InputSet) -> InputSet:
    exact = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in s.inputs.items()
    }
    made = _as_set(case, exact)
    made.grads = [g.double() for g in s.grads]
    return made


def _difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None], rtol: float) -> str:
    """Return "" where all results agree, else what is wrong with the first one that does not."""
    if len(got) != len(want):
        return f"{len(got)} results, eager has {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # a gradient that one of them does not have: its parameters are its own
        if a is None or b is None:
            continue
        if a.shape != b.shape:
            return f"result {i} has shape {tuple(a.shape)}, eager {tuple(b.shape)}"
        error = _relative_error(a, b)
        if not error <= rtol:
            return f"result {i} differs by {error:.1e}"
    return ""


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``||got - want|| / ||want||`` without the largest thousandth of the errors.

    Gradients of log-derivatives jump at the knots of a spline: a point that rounding puts into the next bin has
    another gradient, in float32 of eager PyTorch as well.
    """
    errors = (got - want).abs().flatten()
    if not errors.isfinite().all():
        return math.nan
    kept = errors.numel() - errors.numel() // 1000
    return float(errors.sort().values[:kept].norm() / want.norm().clamp_min(1e-30))


def _is_random(provider: Provider, pass_: str, s: InputSet, rtol: float) -> bool:
    """Return whether two runs on the same inputs differ by more than rounding."""
    first, second = (
        [t.nan_to_num() for t in _results(provider, pass_, s) if t is not None] for _ in range(2)
    )
    return "differs" in _difference(first, second, rtol)


class _SeesKernels(TorchDispatchMode):
    """Records whether an op of this package runs."""

    seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.seen |= func.namespace == "pyflowkern"
        return func(*args, **kwargs or {})


def runs_kernel(provider: Provider, pass_: str, s: InputSet) -> bool:
    """Return whether a pass of the public function runs a kernel rather than its reference."""
    with _SeesKernels() as mode:
        _results(provider, pass_, s)
    return mode.seen


def kept_bytes(case: Case, provider: Provider, s: InputSet) -> int:
    """Return the bytes that a forward keeps for its backward, without parameters."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = provider(**s.inputs)
    for name in case.parameters:
        kept.pop(s.inputs[name].untyped_storage().data_ptr(), None)
    del alive
    return sum(kept.values())
