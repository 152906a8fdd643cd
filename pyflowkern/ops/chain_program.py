"""A chain of transforms as data, which one op runs from end to end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_list
from pyflowkern.core.codes import ChainBase, numbered
from pyflowkern.ops._chain_code import read_step, write_step
from pyflowkern.ops.chain_network import ChainNetwork
from pyflowkern.ops.chain_steps import (
    MOST_PLU,
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
    Step,
)

__all__ = ["ChainProgram", "Wanted"]

_BASES = numbered(ChainBase)
_KINDS = (PermuteStep, ActNormStep, LinearStep, PLUStep, LUStep, ShiftStep, ElementsStep)
_HEAD = 4


class Wanted(NamedTuple):
    """A tensor that a chain takes."""

    shape: tuple[int, ...]
    #: What it is, for errors.
    name: str
    #: Whether it holds indices and not numbers.
    integers: bool = False


@dataclass(frozen=True)
class ChainProgram:
    """Transforms of vectors, one after another, and a base density at the end.

    Made once, it is two tensors on the host, ``codes`` and ``numbers``, which kernels read; the tensors that it
    transforms with are given at each call of :func:`~pyflowkern.ops.chain`, in the order of the steps.

    Args:
        features: number ``D`` of features.
        steps: data side first: :class:`PermuteStep`, :class:`ActNormStep`, :class:`LinearStep`, :class:`PLUStep`,
            :class:`LUStep`, :class:`ShiftStep` and :class:`ElementsStep`.
        context_features: size ``K`` of the context; 0 for none.
        base: ``"normal"`` adds the log-density of the standard normal at ``z`` to the log-determinant; ``"none"`` not.

    Raises:
        TypeError: for sizes that are no ints, and steps that are none.
        ValueError: for steps that do not fit the features, or an unknown base.

    Example:
        >>> from pyflowkern.ops import ActNormStep, ChainProgram, PermuteStep
        >>> program = ChainProgram(2, [ActNormStep(), PermuteStep([1, 0])])
        >>> [wanted.shape for wanted in program.tensors]
        [(2,), (2,)]
        >>> ChainProgram.of(program.codes, program.numbers) == program
        True
    """

    features: int
    steps: Sequence[Step]
    context_features: int = 0
    base: str = "none"
    #: What kernels read, on the host: int32, and the constants of maps as float64.
    codes: Tensor = field(init=False, repr=False, compare=False)
    numbers: Tensor = field(init=False, repr=False, compare=False)
    #: The tensors that :func:`~pyflowkern.ops.chain` is given with this program.
    tensors: tuple[Wanted, ...] = field(init=False, repr=False, compare=False)
    #: How many tensors belong to each step.
    counts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    #: How many inputs of steps the backward pass needs, and the result.
    blocks: int = field(init=False, repr=False, compare=False)
    #: Whether there is an inverse: without a base.
    invertible: bool = field(init=False, repr=False, compare=False)
    #: Whether a step moves features that its network reads, so that its inverse finds one after the other.
    autoregressive: bool = field(init=False, repr=False, compare=False)
    #: Whether anything is in it that only some devices run: contexts other than a product that the first layer adds,
    #: dense weights in another order, angles, elements that are turned or centred, and matrices in packed triangles.
    special: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("features", self.features)
        check_count("context_features", self.context_features, 0)
        check_list("steps", self.steps)
        if self.base not in _BASES:
            raise ValueError(f"base must be one of {', '.join(_BASES)}, got {self.base!r}")
        program = [self.features, self.context_features, _BASES[self.base], len(self.steps)]
        numbers: list[float] = []
        tensors: list[Wanted] = []
        counts: list[int] = []
        for i, step in enumerate(self.steps):
            if not isinstance(step, _KINDS):
                raise TypeError(f"steps[{i}] must be a step of a chain, got {step!r:.80}")
            self._check_step(i, step)
            write_step(step, program, numbers)
            own = self._wanted(i, step)
            tensors += own
            counts.append(len(own))
        blocks = 1 + sum(not isinstance(step, PermuteStep) for step in self.steps)
        with torch.inference_mode(False):  # calls that are differentiated may use it later
            codes = torch.tensor(program, dtype=torch.int32, device="cpu")
            constants = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        values = {
            "steps": tuple(self.steps),
            "codes": codes,
            "numbers": constants,
            "tensors": tuple(tensors),
            "counts": tuple(counts),
            "blocks": blocks,
            "invertible": self.base == "none",
            "autoregressive": any(
                isinstance(s, ElementsStep) and {*s.moves} & {*s.reads} for s in self.steps
            ),
            "special": any(map(_is_special, self.steps)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, codes: Tensor, numbers: Tensor) -> ChainProgram:
        """Return the program that has these codes and numbers."""
        given = codes.tolist()
        left, constants = iter(given[_HEAD:]), numbers.tolist()
        features, context_features, base, count = given[:_HEAD]
        steps = tuple(read_step(features, left, constants) for _ in range(count))
        return cls(features, steps, context_features, list(_BASES)[base])

    def pairs(self) -> Iterable[tuple[Step, int]]:
        """Return each step with the number of its tensors."""
        return zip(self.steps, self.counts, strict=True)

    def _check_step(self, i: int, step: Step) -> None:
        if isinstance(step, PermuteStep) and len(step.order) != self.features:
            raise ValueError(f"steps[{i}] must order {self.features} features, got {step.order}")
        if isinstance(step, PLUStep | LUStep) and self.features > MOST_PLU:
            raise ValueError(
                f"steps[{i}] must be a LinearStep for more than {MOST_PLU} features, got {self.features}"
            )
        if isinstance(step, ElementsStep):
            if max((*step.moves, *step.reads)) >= self.features:
                raise ValueError(
                    f"steps[{i}] must name features below {self.features}, "
                    f"got moves={step.moves} and reads={step.reads}"
                )
            if step.network is not None and step.network.contexts and not self.context_features:
                raise ValueError(
                    f"steps[{i}] has a network with a context: context_features must be positive"
                )

    def _wanted(self, i: int, step: Step) -> list[Wanted]:
        """Return the tensors of a step."""
        vector, matrix, of = (self.features,), (self.features, self.features), f"of steps[{i}]"
        if isinstance(step, ActNormStep):
            return [Wanted(vector, f"log_scale {of}"), Wanted(vector, f"bias {of}")]
        if isinstance(step, LinearStep):
            return [Wanted(matrix, f"weight {of}"), Wanted((), f"log_abs_det {of}")]
        if isinstance(step, PLUStep):
            pairs = (("lower", matrix), ("upper", matrix), ("log_diag", vector), ("sign", vector))
            first = Wanted(vector, f"permutation {of}", integers=True)
            return [first, *(Wanted(shape, f"{name} {of}") for name, shape in pairs)]
        if isinstance(step, LUStep):
            packed = (self.features * (self.features - 1) // 2,)
            names = (("lower", packed), ("upper", packed), ("raw_diag", vector), ("bias", vector))
            return [Wanted(shape, f"{name} {of}") for name, shape in names]
        if isinstance(step, ShiftStep):
            return [Wanted(vector, f"shift {of}")]
        if isinstance(step, PermuteStep):
            return []
        if step.network is None:
            return [Wanted((step.outputs,), f"parameters {of}")]
        return self._wanted_of_network(step.network, of)

    def _wanted_of_network(self, network: ChainNetwork, of: str) -> list[Wanted]:
        wanted = []
        for k, layer in enumerate(network.layers):
            joined = self.context_features if k == 0 and network.context == "joined" else 0
            shape = layer.outputs, layer.inputs + joined
            wanted.append(Wanted(shape, f"weight of layers[{k}] {of}"))
            if layer.bias:
                wanted.append(Wanted(shape[:1], f"bias of layers[{k}] {of}"))
            if layer.context != "none":
                shape = layer.outputs, self.context_features
                wanted.append(Wanted(shape, f"weight of the context of layers[{k}] {of}"))
            if layer.context == "gate" or layer.context_bias:
                name = "gate" if layer.context == "gate" else "context"
                wanted.append(Wanted(shape[:1], f"bias of the {name} of layers[{k}] {of}"))
        if network.context in ("add", "activated"):
            shape = network.layers[0].outputs, self.context_features
            wanted.append(Wanted(shape, f"weight of the context {of}"))
            if network.context == "activated":
                wanted.append(Wanted(shape[:1], f"bias of the context {of}"))
        return wanted


def _is_special(step: Step) -> bool:
    """Whether a step needs what only some devices have."""
    if isinstance(step, LUStep):
        return True
    if not isinstance(step, ElementsStep):
        return False
    if step.centred or step.turned:
        return True
    if step.network is None:
        return False
    if step.network.frequencies is not None:
        return True
    layers, context = step.network.layers, step.network.context
    if context in ("joined", "activated") or (context == "add" and layers[0].rows is not None):
        return True
    return any(
        layer.context != "none" or (layer.prefixes is None and (layer.columns or layer.rows))
        for layer in layers
    )
