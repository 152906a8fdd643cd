"""Steps of a chain as the numbers that its kernels read, there and back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pyflowkern.core.codes import (
    ChainContext,
    ChainLayerFlag,
    ChainStep,
    MaskedActivation,
    numbered,
)
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork
from pyflowkern.ops.chain_steps import (
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
    Step,
)
from pyflowkern.ops.elements import ElementCode, element_code, element_of_code

__all__ = ["read_step", "write_step"]

_ACTIVATIONS = numbered(MaskedActivation)
_NAMES = list(_ACTIVATIONS)
_FIRST = numbered(ChainContext)
_MASKED, _COLUMNS, _ROWS, _ADDED, _GATED, _BIAS = (flag.value for flag in ChainLayerFlag)
_CONTEXTS = {"none": 0, "add": _ADDED, "gate": _GATED}


def write_step(step: Step, program: list[int], numbers: list[float]) -> None:
    """Append a step to a program and its numbers."""
    if isinstance(step, PermuteStep):
        program += [ChainStep.PERMUTE.value, *step.order]
    elif isinstance(step, ActNormStep):
        program.append(ChainStep.ACTNORM.value)
    elif isinstance(step, LinearStep):
        program.append(ChainStep.LINEAR.value)
    elif isinstance(step, PLUStep):
        program.append(ChainStep.PLU.value)
    elif isinstance(step, ShiftStep):
        program += [ChainStep.SHIFT.value, len(numbers)]
        numbers.append(step.bound)
    elif isinstance(step, LUStep):
        program += [ChainStep.LU.value, len(numbers)]
        numbers.append(step.eps)
    else:
        _write_elements(step, program, numbers)


def _write_elements(step: ElementsStep, program: list[int], numbers: list[float]) -> None:
    code, net, per = element_code(step.element_map), step.network, step.parameters
    count = len(step.moves)
    program += [
        ChainStep.ELEMENTS.value,
        *(code.family, code.kind, code.tails, code.parameterization, code.bins, code.flags),
        *(len(numbers), len(code.numbers), per),
        *((per, 1) if step.layout == "feature_major" else (1, count)),
        *(len(step.reads), count),
    ]
    numbers += code.numbers
    if net is None:
        program += [0, 0, 1, 0, 0]
    else:
        flags = int(net.residual), int(net.activate_last)
        program += [len(net.layers), *flags, _ACTIVATIONS[net.activation], _FIRST[net.context]]
    program += [*step.reads, *step.moves]
    for layer in () if net is None else net.layers:
        flag = _MASKED * (layer.prefixes is not None)
        flag += _COLUMNS * (layer.columns is not None) + _ROWS * (layer.rows is not None)
        flag += _CONTEXTS[layer.context] + _BIAS * layer.context_bias
        program += [layer.outputs, layer.inputs, int(layer.bias), flag]
        program += [*(layer.prefixes or ()), *(layer.columns or ()), *(layer.rows or ())]


def read_step(features: int, program: Iterator[int], numbers: list[float]) -> Step:
    """Return the next step of a program."""
    kind = ChainStep(next(program))
    if kind == ChainStep.PERMUTE:
        return PermuteStep(tuple(islice(program, features)))
    if kind == ChainStep.SHIFT:
        return ShiftStep(numbers[next(program)])
    if kind == ChainStep.LU:
        return LUStep(numbers[next(program)])
    if kind == ChainStep.ELEMENTS:
        return _read_elements(program, numbers)
    if kind == ChainStep.ACTNORM:
        return ActNormStep()
    return LinearStep() if kind == ChainStep.LINEAR else PLUStep()


def _read_elements(program: Iterator[int], numbers: list[float]) -> ElementsStep:
    family, kind, tails, parameterization, bins, flags, at, size = islice(program, 8)
    own = numbers[at : at + size]
    transform = element_of_code(
        ElementCode(family, kind, tails, parameterization, bins, own, flags)
    )
    _, _, param_step, reads, moves = islice(program, 5)
    depth, residual, activate_last, activation, context = islice(program, 5)
    features = tuple(islice(program, reads)), tuple(islice(program, moves))
    layers = []
    for _ in range(depth):
        outputs, inputs, bias, flag = islice(program, 4)
        prefixes = tuple(islice(program, outputs)) if flag & _MASKED else None
        columns = tuple(islice(program, inputs)) if flag & _COLUMNS else None
        rows = tuple(islice(program, outputs)) if flag & _ROWS else None
        how = "gate" if flag & _GATED else "add" if flag & _ADDED else "none"
        orders = prefixes, columns, rows
        layers.append(ChainLayer(outputs, inputs, bool(bias), *orders, how, bool(flag & _BIAS)))
    network = None
    if layers:
        form = _NAMES[activation], bool(residual), bool(activate_last), list(_FIRST)[context]
        network = ChainNetwork(tuple(layers), *form)
    layout = "feature_major" if param_step == 1 else "blocked"
    return ElementsStep(transform, features[1], features[0], network, layout)
